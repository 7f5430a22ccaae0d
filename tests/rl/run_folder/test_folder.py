from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from helpers.toys import MakePolicy, make_recipe

from coupled.rl.errors import CheckpointError, FencedError
from coupled.rl.model.loading import add_adapter, load_policy
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import keep_reference
from coupled.rl.model.weights import save_policy, trainable_state
from coupled.rl.recipe.objective import Optimizer
from coupled.rl.recipe.schema import Recipe
from coupled.rl.run_folder.folder import (
    MANIFEST,
    RunFolder,
    atomic_write,
    broken_files,
    committed_checkpoints,
    open_run_folder,
    read_rows,
    read_run_recipe,
    run_folders,
)
from coupled.rl.trainer.checkpoint import read_checkpoint, write_checkpoint
from coupled.rl.trainer.optimizer import apply_step, make_optimizer


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path, keep=2)


def write_number(number: int) -> Callable[[Path], None]:
    def write(to: Path) -> None:
        (to / "weights").write_text(str(number))
        (to / "inner").mkdir()
        (to / "inner" / "state").write_text(str(number))

    return write


def recipe_in(folder: Path, **fields: object) -> Recipe:
    return make_recipe(output_dir=str(folder), **fields)


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_a_commit_makes_a_whole_folder_named_after_the_step(folder: RunFolder) -> None:
    assert folder.latest() is None
    made = folder.commit(3, write_number(3))
    assert made == folder.path / "checkpoints/step_000003"
    assert (made / "weights").read_text() == "3"
    assert (made / "inner/state").read_text() == "3"
    assert folder.latest() == made
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step_000003"], "nothing partial is left"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("lost"), OSError(errno.ENOSPC, "no space left")])
def test_a_commit_that_fails_leaves_no_step_and_the_earlier_one_whole(
    folder: RunFolder, error: BaseException | type[BaseException]
) -> None:
    earlier = folder.commit(1, write_number(1))

    def fail(to: Path) -> None:
        (to / "weights.half").touch()
        raise error

    with pytest.raises((KeyboardInterrupt, RuntimeError, CheckpointError)):
        folder.commit(2, fail)
    assert committed_checkpoints(folder.checkpoints) == [earlier]
    assert folder.latest() == earlier
    assert (earlier / "weights").read_text() == "1"
    after = folder.commit(2, write_number(2))
    assert not (after / "weights.half").exists(), "what a crash left behind is not in the next attempt"
    assert (after / "weights").read_text() == "2"
    assert not list(folder.checkpoints.glob(".partial*"))


def test_the_step_does_not_exist_while_it_is_being_written(folder: RunFolder) -> None:
    seen: list[list[Path]] = []

    def write(to: Path) -> None:
        (to / "weights").write_text("2")
        seen.append(committed_checkpoints(folder.checkpoints))

    folder.commit(2, write)
    assert seen == [[]]


def test_a_full_disk_is_told_with_its_remedy(folder: RunFolder) -> None:
    def fail(to: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        CheckpointError, match=r"step_000002.*No space left.*earlier checkpoints are whole.*resume=auto"
    ):
        folder.commit(2, fail)
    assert not list(folder.checkpoints.iterdir()), "a full disk is not filled further"


def test_a_disk_that_fills_up_under_the_real_writer_is_told_with_its_remedy(
    folder: RunFolder, tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch and safetensors raise errors of their own when a write fails."""
    policy = tiny_policy()
    optimizer = make_optimizer(policy, Optimizer())
    reference = keep_reference(policy, "none")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this host has no /dev/full")
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda what, where: save(what, full))
    with pytest.raises(CheckpointError, match="Free some space"):
        folder.commit(1, lambda to: write_checkpoint(to, policy, reference, optimizer, {"step": 1}))
    assert folder.latest() is None


def test_only_the_newest_checkpoints_are_kept(folder: RunFolder) -> None:
    for step in (1, 2, 9, 10, 100):
        folder.commit(step, write_number(step))
    assert [p.name for p in committed_checkpoints(folder.checkpoints)] == ["step_000010", "step_000100"]
    assert folder.latest() == folder.checkpoints / "step_000100"


def test_a_step_can_be_committed_again(folder: RunFolder) -> None:
    folder.commit(1, write_number(1))
    folder.commit(1, write_number(5))
    assert (folder.checkpoints / "step_000001/weights").read_text() == "5"


def test_unfinished_checkpoints_are_never_the_latest(folder: RunFolder) -> None:
    made = folder.commit(1, write_number(1))
    for name in (".partial-step_000002", "step_000003.tmp", "step_x", "other"):
        (folder.checkpoints / name).mkdir()
    assert folder.latest() == made


# --- logs ---------------------------------------------------------------------------------------------------------


def test_rows_are_read_back_as_they_were_logged(folder: RunFolder) -> None:
    rows = [{"step": 1, "reward": 0.5, "text": "a\u2028b"}, {"step": 2, "reward": 0.25, "text": ""}]
    for row in rows:
        folder.log(row)
    folder.close()
    assert folder.rows() == rows
    assert folder.rows("evaluation.jsonl") == []
    assert list((folder.path / "tensorboard").iterdir())


def test_a_last_line_that_a_crash_cut_off_is_left_out(folder: RunFolder) -> None:
    path = folder.path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_rows(path) == [{"step": 1}], "a number may have been cut, too: 2 may have been 25"


def test_what_was_logged_beyond_the_checkpoint_is_forgotten(folder: RunFolder) -> None:
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    (folder.path / "evaluation.jsonl").write_text('{"step": 0}\n{"step": 3}\n')
    (folder.path / "rollouts").mkdir()
    for step in (1, 2, 3):
        (folder.path / f"rollouts/step_{step:06d}.parquet").touch()
    folder.forget_after(2)
    assert folder.rows() == [{"step": 1}, {"step": 2}]
    assert folder.rows("evaluation.jsonl") == [{"step": 0}]
    assert sorted(p.name for p in (folder.path / "rollouts").iterdir()) == [
        "step_000001.parquet",
        "step_000002.parquet",
    ]


def test_completions_that_could_not_be_scored_do_not_stop_a_resumption(folder: RunFolder) -> None:
    (folder.path / "rollouts").mkdir()
    for name in ("step_000001.parquet", "step_000002.unscored.parquet"):
        (folder.path / "rollouts" / name).touch()
    folder.forget_after(1)
    left = [p.name for p in (folder.path / "rollouts").iterdir()]
    assert "step_000001.parquet" in left


def test_forgetting_in_an_empty_folder_is_harmless(folder: RunFolder) -> None:
    folder.forget_after(0)
    assert folder.rows() == []


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    atomic_write(path, "old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="no"):
            atomic_write(path, "new")
    assert path.read_text() == "old"
    atomic_write(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


# --- run folders --------------------------------------------------------------------------------------------------


def test_run_folders_are_numbered_and_hold_their_recipe(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "runs", name="quick")
    made = [open_run_folder(recipe).path for _ in range(3)]
    assert [p.name for p in made] == ["quick-001", "quick-002", "quick-003"]
    assert read_run_recipe(made[0]) == recipe
    (tmp_path / "runs/quick-010").mkdir()
    (tmp_path / "runs/quick-start-099").mkdir()
    (tmp_path / "runs/quick-old").mkdir()
    assert open_run_folder(recipe).path.name == "quick-011", "numbers of other runs do not count"
    assert open_run_folder(recipe_in(tmp_path / "runs", name="other")).path.name == "other-001"


def test_two_runs_that_start_in_the_same_moment_get_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path)
    first = open_run_folder(recipe).path
    with monkeypatch.context() as patched:
        patched.setattr(Path, "glob", lambda self, pattern: iter(()))
        second = open_run_folder(recipe).path
    assert (first.name, second.name) == ("run-001", "run-002")


def test_resume_auto_takes_the_newest_run_or_starts_one(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    first = open_run_folder(recipe, "auto").path
    assert first.name == "run-001"
    assert open_run_folder(recipe, "auto").path == first
    second = open_run_folder(recipe, "never").path
    assert open_run_folder(recipe, "auto").path == second
    assert open_run_folder(recipe, str(first)).path == first


def test_every_start_records_what_it_is_done_with(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    run = open_run_folder(recipe)
    run.commit(4, write_number(4))
    with (run.path / "environment.jsonl").open("a") as log:
        log.write('{"step": 9, "cut')
    open_run_folder(recipe, "auto")
    first, second = read_rows(run.path / "environment.jsonl")
    assert (first["step"], second["step"]) == (0, 4)
    assert first["versions"]["torch"] == torch.__version__
    assert first["num_cores"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["started"])
    assert first["commit"] is None or re.fullmatch("[0-9a-f]{40}", first["commit"])


def test_resuming_with_another_recipe_names_what_differs(tmp_path: Path) -> None:
    open_run_folder(recipe_in(tmp_path))
    other = recipe_in(tmp_path, seed=5, optimizer={"learning_rate": 0.5})
    with pytest.raises(CheckpointError, match=r"another recipe: seed, optimizer differ\. .*resume=never"):
        open_run_folder(other, "auto")
    assert open_run_folder(other, "never").path.name == "run-002"


def test_resuming_may_change_threads_ranks_and_checkpoint_frequency(tmp_path: Path) -> None:
    first = open_run_folder(recipe_in(tmp_path)).path
    changed = recipe_in(tmp_path, num_threads=3, checkpoint={"every": 5, "keep": 7}, cluster={"trainer_ranks": 4})
    assert open_run_folder(changed, "auto").path == first


def test_resuming_from_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no recipe\.yaml"):
        open_run_folder(recipe_in(tmp_path), str(tmp_path / "nowhere"))


# --- what a checkpoint holds --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_checkpoint_brings_back_weights_moments_and_step(
    tiny_policy: MakePolicy, tmp_path: Path, has_adapter: bool
) -> None:
    """Two more steps after reading it are bit for bit those that would have followed."""
    save_policy(tiny_policy(), tmp_path / "base")

    def opened(seed: int) -> tuple[Policy, torch.optim.AdamW]:
        policy = load_policy(tmp_path / "base")
        if has_adapter:
            policy = add_adapter(policy, rank=2, alpha=4.0, targets=("q_proj",), seed=seed)
        return policy, make_optimizer(policy, Optimizer(weight_decay=0.1))

    def step(policy: Policy, optimizer: torch.optim.AdamW, seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        for parameter in policy.trainable_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=stream)
        apply_step(optimizer, policy, 1e-2, 1.0)

    policy, optimizer = opened(0)
    step(policy, optimizer, 0)
    (tmp_path / "saved").mkdir()
    write_checkpoint(tmp_path / "saved", policy, keep_reference(policy, "none"), optimizer, {"step": 1})
    resumed, resumed_optimizer = opened(9)
    no_reference = keep_reference(resumed, "none")
    assert read_checkpoint(tmp_path / "saved", resumed, no_reference, resumed_optimizer) == {"step": 1}
    for seed in (1, 2):
        step(policy, optimizer, seed)
        step(resumed, resumed_optimizer, seed)
    expected, found = trainable_state(policy), trainable_state(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("name", ["state.json", "optimizer.pt"])
def test_a_checkpoint_without_its_state_can_only_be_evaluated(
    tiny_policy: MakePolicy, tmp_path: Path, name: str
) -> None:
    policy = tiny_policy()
    optimizer = make_optimizer(policy, Optimizer())
    reference = keep_reference(policy, "none")
    write_checkpoint(tmp_path, policy, reference, optimizer, {"step": 1})
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 1}
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {name}: it cannot be resumed from"):
        read_checkpoint(tmp_path, policy, reference, optimizer)


# --- manifest, fence and failed saves -------------------------------------------------------------------------------


def write_weights(to: Path) -> None:
    (to / "weights").write_text("whole")


def test_the_manifest_names_every_file_and_a_damaged_checkpoint_is_passed_over(folder: RunFolder) -> None:
    folder.commit(1, write_weights, {"exactness": "E2"})
    newest = folder.commit(2, write_weights)
    about = json.loads((folder.checkpoints / "step_000001" / MANIFEST).read_text())
    assert about == {"step": 1, "generation": 0, "exactness": "E2", "sha256": {"weights": sha256(b"whole").hexdigest()}}
    assert folder.latest() == newest
    (newest / "weights").write_text("hole!")
    assert broken_files(newest) == ["weights"]
    latest = folder.latest()
    assert latest is not None
    assert latest.name == "step_000001"
    (latest / MANIFEST).unlink()
    assert folder.latest() == latest, "a checkpoint of an earlier version has no manifest"
    (latest / MANIFEST).write_text("{")
    assert folder.latest() is None


def test_a_process_that_was_replaced_cannot_commit(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    zombie = open_run_folder(recipe)
    zombie.commit(1, write_weights)
    heir = open_run_folder(recipe, resume=str(zombie.path))
    with pytest.raises(FencedError, match=r"process 2 has taken over .* since this one, process 1"):
        zombie.commit(2, write_weights)
    heir.commit(2, write_weights)
    assert [path.name for path in committed_checkpoints(heir.checkpoints)] == ["step_000001", "step_000002"]


def test_a_process_that_was_replaced_cannot_log_a_step_a_second_time(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    zombie = open_run_folder(recipe)
    heir = open_run_folder(recipe, resume=str(zombie.path))
    heir.log({"step": 1})
    with pytest.raises(FencedError, match="process 2 has taken over"):
        zombie.log({"step": 1})
    assert heir.rows() == [{"step": 1}]


def test_a_process_that_is_replaced_while_it_writes_cannot_commit(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    zombie = open_run_folder(recipe)

    def write(to: Path) -> None:
        write_weights(to)
        open_run_folder(recipe, resume=str(zombie.path))

    with pytest.raises(FencedError):
        zombie.commit(1, write)
    assert zombie.latest() is None


def test_rows_that_a_full_disk_does_not_take_are_written_when_it_does(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder.log({"step": 1})
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        folder.log({"step": 2})
        folder.log({"step": 3})
    assert [row["step"] for row in folder.rows()] == [1]
    assert "alarm:" in capsys.readouterr().out
    folder.log({"step": 4})
    assert [row["step"] for row in folder.rows()] == [1, 2, 3, 4]


def test_the_folders_of_a_recipe_are_not_those_of_one_whose_name_begins_like_it(tmp_path: Path) -> None:
    for name in ("run-010", "run-002", "run-ray-001", "run-1b", "other-001"):
        (tmp_path / name).mkdir()
    found = run_folders(make_recipe(name="run", output_dir=str(tmp_path)))
    assert [path.name for path in found] == ["run-002", "run-010"]
