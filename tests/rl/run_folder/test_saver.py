"""Checkpoints that cannot be written: the run goes on, up to a limit, whatever the stage."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from coupled.rl.errors import SaveError
from coupled.rl.fit import fit
from coupled.rl.recipe.read import load_recipe
from coupled.rl.recipe.schema import Recipe
from coupled.rl.run_folder.folder import RunFolder, committed_checkpoints, open_run_folder, read_rows
from coupled.rl.run_folder.saver import MAX_FAILED_SAVES, CheckpointSaver
from coupled.rl.train import train

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[3] / "recipes"
DISK_BYTES = 64 * 2**20
ROOM_BYTES = 2**19
"""Room for the logs of a run, and for no checkpoint."""
COMMON = ("num_threads=1", "name=full", "optimizer.warmup_steps=0", "checkpoint.every=1")
STAGES: dict[str, tuple[str, tuple[str, ...], Callable[[Recipe], object]]] = {
    "train": (
        "quickstart.yaml",
        (
            "rollout.num_prompts=2",
            "rollout.group_size=2",
            "rollout.denoising_steps=8",
            "sandbox.num_workers=1",
            "data.eval_path=null",
        ),
        train,
    ),
    "fit": ("tiny/sft.yaml", ("fit.batch_size=4",), fit),
}


def small(stage: str, folder: Path, num_steps: int) -> Recipe:
    file, overrides, _ = STAGES[stage]
    return load_recipe(RECIPES / file, (*COMMON, *overrides, f"num_steps={num_steps}", f"output_dir={folder}"))


class Saves:
    """A saver whose writes fail at chosen steps."""

    def __init__(self, folder: RunFolder, full: set[int], *, num_steps: int, every: int) -> None:
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.reports: list[str] = []
        self.tried: list[int] = []
        self._full = full
        self.saver = CheckpointSaver(
            folder, num_steps=num_steps, every=every, emit=self._emit, report=self.reports.append
        )

    def step(self, step: int) -> None:
        def write(to: Path) -> None:
            self.tried.append(step)
            (to / "state").write_text(str(step))
            if step in self._full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.saver.save_if_due(step, write)

    def _emit(self, event: str, **facts: Any) -> None:
        self.events.append((event, facts))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path, keep=9)


def test_a_failed_save_is_reported_and_retried_after_the_next_step(folder: RunFolder) -> None:
    saves = Saves(folder, {2, 3}, num_steps=7, every=2)
    for step in range(1, 8):
        saves.step(step)
    assert saves.tried == [2, 3, 4, 6, 7], "when due, after a failure, and after the last step"
    assert [(event, facts["step"]) for event, facts in saves.events] == [("save_failed", 2), ("save_failed", 3)]
    assert all("Training goes on, and the next step is tried" in text for text in saves.reports)
    assert len(saves.reports) == 2
    assert [path.name[-1] for path in committed_checkpoints(folder.checkpoints)] == ["4", "6", "7"]


def test_saves_that_fail_again_and_again_end_the_run_and_a_success_in_between_begins_the_count_anew(
    folder: RunFolder,
) -> None:
    failing = {*range(1, MAX_FAILED_SAVES), *range(MAX_FAILED_SAVES + 1, 99)}
    saves = Saves(folder, failing, num_steps=99, every=1)
    last = 2 * MAX_FAILED_SAVES
    for step in range(1, last):
        saves.step(step)
    assert saves.saver.num_failed == MAX_FAILED_SAVES - 1
    with pytest.raises(SaveError, match="could not write checkpoint"):
        saves.step(last)


def test_a_last_checkpoint_that_cannot_be_written_ends_the_run(folder: RunFolder) -> None:
    saves = Saves(folder, {3}, num_steps=3, every=1)
    saves.step(1)
    saves.step(2)
    with pytest.raises(SaveError):
        saves.step(3)


def test_a_new_run_begins_at_step_0_and_a_resumed_one_drops_the_rows_of_steps_done_again(folder: RunFolder) -> None:
    saver = CheckpointSaver(folder, num_steps=9, every=1)
    assert saver.restore(lambda path: pytest.fail("there is no checkpoint")) == {"step": 0}
    folder.log({"step": 1})
    folder.log({"step": 2})
    saver.save_if_due(1, lambda to: None)
    assert saver.restore(lambda path: {"step": int(path.name[-1]), "cursor": 7}) == {"step": 1, "cursor": 7}
    assert folder.rows() == [{"step": 1}]


# --- a disk that is really full ---------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("mount is not installed, so that no disk can be filled")
    if done.returncode:
        pytest.skip(f"a file system of its own needs privileges: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Fill the disk up to `ROOM_BYTES`."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast = disk / "ballast"
    ballast.write_bytes(b"\0" * (free - ROOM_BYTES))
    return ballast


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_while_the_disk_is_full_and_commits_when_it_is_not(
    stage: str, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ballast, log = fill(disk), RunFolder.log

    def make_room(self: RunFolder, row: Mapping[str, Any], **named: Any) -> None:
        if row["step"] == 3:
            ballast.unlink()
        log(self, row, **named)

    monkeypatch.setattr(RunFolder, "log", make_room)
    STAGES[stage][2](small(stage, disk, num_steps=3))
    run = disk / "full-001"
    assert [row.get("failed_saves") for row in read_rows(run / "metrics.jsonl")] == [None, 1.0, 2.0]
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("alarm: could not write checkpoint") == 2
    assert "Training goes on, and the next step is tried" in shown
    assert [path.name for path in committed_checkpoints(run / "checkpoints")] == ["step_000003"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_stays_full_ends_the_run_after_several_steps(stage: str, disk: Path) -> None:
    fill(disk)
    with pytest.raises(SaveError, match=r"could not write checkpoint .* Free some space") as failed:
        STAGES[stage][2](small(stage, disk, num_steps=MAX_FAILED_SAVES + 2))
    assert failed.value.exit_code == SaveError.exit_code
    rows = read_rows(disk / "full-001" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, MAX_FAILED_SAVES + 1))
    assert not list((disk / "full-001" / "checkpoints").iterdir()), "a full disk is not filled further"


# --- generations ------------------------------------------------------------------------------------------------------


def test_a_folder_of_an_earlier_version_is_continued_with_the_next_generation(tmp_path: Path) -> None:
    recipe = small("fit", tmp_path, num_steps=1)
    path = open_run_folder(recipe).path
    for claimed in (path / "fence").iterdir():
        claimed.unlink()
    for number in (1, 2):
        (path / "fence" / f"epoch_{number:06d}").touch()
    heir = open_run_folder(recipe, resume=str(path))
    assert sorted(file.name for file in (path / "fence").iterdir()) == [
        "epoch_000001",
        "epoch_000002",
        "generation_000003",
    ]
    heir.commit(1, lambda to: None)
    assert '"generation": 3' in (heir.checkpoints / "step_000001" / "MANIFEST.json").read_text()
