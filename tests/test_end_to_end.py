"""Whole runs of the embedded model, short: what is asked for happens, and nothing is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coupled.rl.monitoring.metrics import DETERMINISTIC_EXCEPT
from coupled.rl.recipe.read import load_recipe
from coupled.rl.recipe.schema import Recipe
from coupled.rl.run_folder.folder import read_rows
from coupled.rl.train import TrainResult, train

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
MBPP = ROOT / ".." / "shared" / "data" / "mbpp" / "mbpp.jsonl"
SMALL = (
    "num_threads=1",
    "num_steps=2",
    "optimizer.warmup_steps=0",
    "rollout.num_prompts=3",
    "rollout.group_size=4",
    "rollout.denoising_steps=8",
    "rollout.batch_size=6",
    "sandbox.num_workers=1",
    "data.eval_path=null",
)


def small(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, (*SMALL, f"output_dir={folder}", *overrides))


def comparable(path: Path) -> list[dict[str, float]]:
    """The metrics that do not depend on the machine's speed."""
    rows = read_rows(path / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(DETERMINISTIC_EXCEPT)} for row in rows]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    (file,) = (f for f in result.checkpoint.glob("*.safetensors"))
    return load_file(file)


def assert_same_weights(one: TrainResult, other: TrainResult) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def _long(*overrides: str) -> Any:
    """Switches whose effect on loss and masks is proven by unit tests, repeated here in whole runs."""
    return pytest.param(overrides, marks=pytest.mark.long)


@pytest.mark.slow
def test_training_raises_the_reward_on_the_prompts_it_trains_on(tmp_path: Path) -> None:
    rows = (ROOT / "recipes" / "tiny" / "tasks" / "rl.jsonl").read_text().splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(rows) + "\n")
    recipe = small(
        tmp_path,
        "num_steps=12",
        f"data.path={tmp_path / 'few.jsonl'}",
        "rollout.num_prompts=8",
        "rollout.group_size=8",
        "rollout.denoising_steps=20",
        "rollout.batch_size=32",
        "estimator.num_pairs=1",
        "optimizer.learning_rate=1e-4",
        # So that the first steps, which are compared with the last, still show the untrained model.
        "optimizer.warmup_steps=3",
    )
    rewards = [row["reward"] for row in read_rows(train(recipe).path / "metrics.jsonl")]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert last > first + 0.2, rewards


def test_a_run_leaves_recipe_metrics_rollouts_checkpoint_and_tensorboard(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    result = train(small(tmp_path, f"data.eval_path={ROOT}/recipes/tiny/tasks/test.jsonl", "evaluation.num_problems=3"))
    assert result.before is not None
    assert result.after is not None
    assert len(result.after.sampled.rates) == 3
    assert [row["step"] for row in read_rows(result.path / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in read_rows(result.path / "evaluation.jsonl")] == [0, 2]
    assert list((result.path / "tensorboard").glob("events*"))
    assert (result.path / "recipe.yaml").is_file()
    assert json.loads((result.checkpoint / "state.json").read_text()) == {"step": 2}
    table = pq.read_table(result.path / "rollouts" / "step_000001.parquet").to_pylist()
    assert len(table) == 12
    assert all(len(row["canvas_ids"]) == 40 and row["total"] > 0 and row["score"] is not None for row in table)


@pytest.mark.parametrize(
    "overrides",
    [
        _long("estimator.name=decoupled"),
        ("estimator.name=full_mask", "estimator.num_pairs=1", "advantage=z"),
        _long("estimator.num_pairs=2", "advantage=loo", "estimator.post_eos=mask"),
        _long("loss.kl_beta=0", "num_updates=1"),
        _long("loss.kl_beta=0", "num_updates=2"),
        _long("num_updates=1"),
        ("model.adapter.rank=4", "optimizer.learning_rate=1e-3"),
        ("loss.reference=synced", "loss.sync_every=1", "loss.kl=k2", "loss.norm=fixed"),
        _long("loss.reference=old", "loss.kl=k1", "loss.dual_clip=3", "group_filter=zero_std"),
        # wd1
        (
            "loss.objective=likelihood",
            "advantage=softmax",
            "estimator.name=full_mask",
            "estimator.num_pairs=1",
            "estimator.prompt_mask_probability=0.15",
            "loss.kl_beta=0",
        ),
        _long("estimator.post_eos=excluded", "rollout.top_p=0.9"),
        _long("loss.ratio=sequence", "loss.norm=sequence", "rollout.top_p=0.9"),
        _long("model.compute_dtype=bfloat16", "rollout.order=maskgit", "rollout.top_p=0.9"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_switch_of_the_recipe_trains_and_moves_the_weights(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    result = train(small(tmp_path, *overrides))
    rows = comparable(result.path)
    assert all(torch.isfinite(torch.tensor([row["loss"], row["grad_norm"], row["kl"]])).all() for row in rows)
    assert rows[0]["learning_rate"] > 0
    base = load_file(ROOT / "recipes" / "tiny" / "checkpoint" / "model.safetensors")
    moved = weights(result)
    if any("adapter" in override for override in overrides):
        assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in moved.items())
        assert not set(moved) & set(base)
    else:
        assert any(not torch.equal(moved[name], base[name]) for name in base)


def test_the_first_update_is_on_policy_and_its_kl_to_the_start_is_zero(tmp_path: Path) -> None:
    row = comparable(train(small(tmp_path, "num_steps=1", "num_updates=1")).path)[0]
    assert row["kl"] == pytest.approx(0.0, abs=1e-6)
    assert row["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert row["clip_fraction_low"] == row["clip_fraction_high"] == 0.0


def test_the_same_recipe_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    one, two = (train(small(tmp_path / name)) for name in ("one", "two"))
    assert comparable(one.path) == comparable(two.path)
    assert_same_weights(one, two)
    other = train(small(tmp_path / "three", "seed=1"))
    assert comparable(one.path) != comparable(other.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches",
    [
        (),
        _long("model.adapter.rank=4", "optimizer.learning_rate=1e-3"),
        _long("loss.reference=synced", "loss.sync_every=1", "loss.sync_mix=0.6"),
    ],
    ids=["full", "lora", "synced reference"],
)
def test_a_killed_run_resumes_to_the_same_metrics_and_weights(tmp_path: Path, switches: tuple[str, ...]) -> None:
    overrides = ("num_steps=4", *switches)
    whole = train(small(tmp_path / "whole", *overrides))
    command = [sys.executable, "-m", "coupled.rl.cli", "train", str(QUICKSTART), *SMALL, *overrides]
    process = subprocess.Popen(
        [*command, f"output_dir={tmp_path / 'killed'}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    run = tmp_path / "killed" / "quickstart-001"
    while not (run / "checkpoints" / "step_000002").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(comparable(run)) < 5
    resumed = train(small(tmp_path / "killed", *overrides), resume="auto")
    assert resumed.path == run
    assert comparable(resumed.path) == comparable(whole.path)
    assert_same_weights(resumed, whole)


def test_a_step_whose_groups_are_all_dropped_is_said_logged_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No group of this model has more than 99.9 % and less than all of its four completions right."""
    result = train(small(tmp_path, "group_filter=accuracy", "accuracy_range=[0.999, 1.0]"))
    rows = comparable(result.path)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["dropped_groups"] == 3
        assert row["dropped_groups/too_hard"] + row["dropped_groups/too_easy"] == 3
        assert not {"loss", "kl", "grad_norm"} & row.keys(), "nothing was optimised"
    base = load_file(ROOT / "recipes" / "tiny" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(result).items())
    shown = " ".join(capsys.readouterr().out.split())
    assert "step 2: group_filter=accuracy drops all 3 groups; the weights stay as they are" in shown


def test_a_finished_run_resumed_does_nothing_again(tmp_path: Path) -> None:
    done = train(small(tmp_path))
    before = (done.path / "metrics.jsonl").read_text()
    again = train(small(tmp_path), resume="auto")
    assert again.path == done.path
    assert (done.path / "metrics.jsonl").read_text() == before


@pytest.mark.ray
@pytest.mark.slow
def test_ray_actors_roll_out_bit_for_bit_what_the_process_itself_does(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    inline = train(small(tmp_path / "inline"))
    with_actors = load_recipe(ROOT / "recipes" / "quickstart-ray.yaml", (*SMALL, f"output_dir={tmp_path / 'ray'}"))
    assert with_actors.rollout.workers == "ray"
    actors = train(with_actors)
    for step in (1, 2):
        name = f"rollouts/step_{step:06d}.parquet"
        assert pq.read_table(inline.path / name).to_pylist() == pq.read_table(actors.path / name).to_pylist()
    assert comparable(inline.path) == comparable(actors.path)
    assert_same_weights(inline, actors)


@pytest.mark.skipif(not MBPP.is_file(), reason=f"the MBPP problems are not at {MBPP}")
@pytest.mark.filterwarnings("ignore:.*left out .* tasks whose tests cannot be judged.*:UserWarning")
def test_a_short_run_on_real_mbpp_problems_breaks_nothing(tmp_path: Path) -> None:
    columns = "{prompt: text, hidden_tests: test_list, uid: task_id, setup: test_setup_code, solution: code}"
    recipe = small(
        tmp_path, f"data.path={MBPP}", f"data.columns={columns}", "data.max_prompt_tokens=150", "rollout.num_prompts=2"
    )
    rows = comparable(train(recipe).path)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["unscored"] == 0 and 0 <= row["reward"] <= 2.5 for row in rows)
