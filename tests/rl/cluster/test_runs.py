"""Whole runs of the embedded model on workers outside of this process: faults cost time, and change no number."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import coupled.rl.trainer.learner
from coupled.rl.judging import ray_sandbox
from coupled.rl.judging.grader import Grader
from coupled.rl.monitoring.metrics import DETERMINISTIC_EXCEPT
from coupled.rl.recipe.read import load_recipe
from coupled.rl.recipe.schema import Recipe
from coupled.rl.run_folder.folder import committed_checkpoints, read_rows
from coupled.rl.train import TrainResult, train
from coupled.rl.trainer import rl_learner

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
SMALL = (
    "num_threads=1",
    "num_steps=4",
    "optimizer.warmup_steps=0",
    "rollout.num_prompts=3",
    "rollout.group_size=4",
    "rollout.denoising_steps=8",
    "rollout.batch_size=3",
    "sandbox.num_workers=1",
    "data.eval_path=null",
    "cluster.health=fast",
)
PROCESSES = ("rollout.workers=process", "rollout.num_workers=2")


def small(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, (*SMALL, f"output_dir={folder}", *overrides))


def assert_same_run(one: TrainResult, other: TrainResult) -> None:
    """The same batches were trained on, down to every token, log-probability and verdict, with the same result."""
    steps = [path.name for path in sorted((one.path / "rollouts").glob("*.parquet"))]
    assert len(steps) == 4
    for name in steps:
        left, right = (pq.read_table(run.path / "rollouts" / name).to_pylist() for run in (one, other))
        assert left == right, name
    left_rows, right_rows = (read_rows(run.path / "metrics.jsonl") for run in (one, other))
    for left_row, right_row in zip(left_rows, right_rows, strict=True):
        known = [k for k in left_row if not k.startswith(DETERMINISTIC_EXCEPT)]
        assert [left_row[k] for k in known] == [right_row[k] for k in known]
    left_weights, right_weights = (load_file(run.checkpoint / "model.safetensors") for run in (one, other))
    assert all(torch.equal(left_weights[name], right_weights[name]) for name in left_weights)


def events(run: Path) -> list[dict[str, object]]:
    return read_rows(run / "events.jsonl") if (run / "events.jsonl").is_file() else []


@pytest.mark.ray
@pytest.mark.slow
def test_actors_and_supervisors_that_are_killed_and_stopped_in_mid_step_change_no_number(
    inline: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rollout actors and one supervisor: each is killed once and stopped once."""
    monkeypatch.setattr(ray_sandbox, "_patience", lambda jobs: 10.0)
    run = tmp_path / "quickstart-001"
    faults = [
        when(run, is_start_of("train/1/", "roll-0#1"), hit("roll-0#1", signal.SIGKILL)),
        when(run, is_start_of("train/3/", "roll-1#1"), hit("roll-1#1", signal.SIGSTOP)),
        when(run, is_start_of("programs/1/", "score-0#1"), hit("score-0#1", signal.SIGKILL)),
        when(run, is_start_of("programs/", "score-0#2"), hit("score-0#2", signal.SIGSTOP)),
    ]
    result = train(small(tmp_path, "rollout.workers=ray", "rollout.num_workers=2", "sandbox.workers=ray"))
    for fault in faults:
        fault.join(timeout=10)
        assert not fault.is_alive(), "every fault happened"
    assert_same_run(inline, result)
    lost = {str(event["worker"]) for event in events(result.path) if event["event"] == "lost"}
    assert {"roll-0#1", "score-0#1", "score-0#2"} <= lost


def when(
    run: Path, happened: Callable[[dict[str, object]], bool], do: Callable[[list[dict[str, object]]], None]
) -> threading.Thread:
    """Do something, once, as soon as an event is in the log."""

    def watch() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            found = events(run)
            if any(happened(event) for event in found):
                do(found)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def hit(worker: str, number: signal.Signals) -> Callable[[list[dict[str, object]]], None]:
    return lambda found: os.kill(pid_of(found, worker), number)


def pid_of(found: list[dict[str, object]], worker: str) -> int:
    return next(
        int(str(e["pid"])) for e in reversed(found) if e["event"] == "ready" and str(e["worker"]).startswith(worker)
    )


def is_start_of(key: str, worker: str) -> Callable[[dict[str, object]], bool]:
    return lambda e: e["event"] == "start" and str(e["key"]).startswith(key) and e["worker"] == worker


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Nobody dies, and nobody could."""
    return train(small(tmp_path_factory.mktemp("inline")))


def test_programs_are_run_while_later_batches_are_denoised_and_no_verdict_differs(
    inline: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    begin, denoise, score = Grader.begin, rl_learner.roll_out, Grader.score

    def note(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            seen.append(name)
            return do(*arguments, **named)

        return noted

    monkeypatch.setattr(Grader, "begin", note("run", begin))
    monkeypatch.setattr(rl_learner, "roll_out", note("denoise", denoise))
    monkeypatch.setattr(Grader, "score", note("score", score))
    assert_same_run(inline, train(small(tmp_path / "ahead")))
    del seen[: seen.index("run") - 1]  # the parity check before the first step
    assert seen == [*["denoise", "run"] * 4, "score"] * 4, "twelve completions, three at a time"
    monkeypatch.setattr(Grader, "begin", lambda *_: None)
    assert_same_run(inline, train(small(tmp_path / "afterwards")))


@pytest.mark.slow
def test_processes_that_are_killed_and_stopped_in_mid_step_change_no_number(
    inline: TrainResult, tmp_path: Path
) -> None:
    run = tmp_path / "quickstart-001"
    faults = [
        when(run, is_start_of("train/2/", "roll-0#1"), hit("roll-0#1", signal.SIGKILL)),
        when(run, is_start_of("train/3/", "roll-1#1"), hit("roll-1#1", signal.SIGSTOP)),
    ]
    result = train(small(tmp_path, *PROCESSES))
    for fault in faults:
        fault.join(timeout=10)
    assert_same_run(inline, result)
    rows = read_rows(result.path / "metrics.jsonl")
    assert sum(row["cluster/redispatched"] + row["cluster/hedged"] for row in rows) >= 2
    assert sum(row["cluster/lost_workers"] for row in rows) >= 1
    assert {row["cluster/staleness"] for row in rows} == {0.0}


def test_checkpoints_that_cannot_be_written_are_told_and_training_goes_on(
    inline: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = coupled.rl.trainer.learner.write_checkpoint
    full = iter((True, True, False, False))

    def fill(folder: Path, *rest: object) -> None:
        write(folder, *rest)  # type: ignore[arg-type]
        if next(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(coupled.rl.trainer.learner, "write_checkpoint", fill)
    result = train(small(tmp_path))
    assert_same_run(inline, result)
    assert [row.get("failed_saves") for row in read_rows(result.path / "metrics.jsonl")] == [None, 1.0, 2.0, None]
    assert capsys.readouterr().out.count("alarm: could not write checkpoint") == 2
    assert [event["step"] for event in events(result.path) if event["event"] == "save_failed"] == [1, 2]
    assert [path.name for path in committed_checkpoints(result.path / "checkpoints")] == ["step_000003", "step_000004"]


@pytest.mark.slow
def test_a_trainer_that_hangs_ends_with_a_status_that_asks_for_resumption_and_resumes_to_the_same_run(
    inline: TrainResult, tmp_path: Path
) -> None:
    program = (
        "import sys, time\nfrom coupled.rl import run\nfrom coupled.rl.cli import main\n"
        "run.stall_seconds = lambda recipe: 6.0\nupdate = run.Run.update\n"
        "def hang(self, step, *rest):\n    update(self, step, *rest) if step < 3 else self.hangs()\n"
        "def hangs(self):\n    with self._clock('update'):\n        time.sleep(600)\n"
        "run.Run.update, run.Run.hangs = hang, hangs\nmain()\n"
    )
    command = [sys.executable, "-c", program, "train", str(QUICKSTART), *SMALL, f"output_dir={tmp_path}"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 75, done.stderr
    assert "no progress in phase 'update' for" in done.stderr
    assert "in hangs" in (tmp_path / "quickstart-001" / "stalled.txt").read_text()
    assert_same_run(inline, train(small(tmp_path), resume="auto"))


@pytest.mark.slow
def test_a_run_with_lag_that_is_killed_resumes_to_the_same_batches_and_weights(tmp_path: Path) -> None:
    lag = 2
    ahead = (*PROCESSES, f"cluster.lag={lag}", "num_updates=2", "loss.kl_beta=0.05")
    whole = train(small(tmp_path / "whole", *ahead))
    rows = read_rows(whole.path / "metrics.jsonl")
    assert [row["cluster/staleness"] for row in rows] == [min(step, lag) for step in range(4)]
    assert rows[0]["ratio"] == pytest.approx(1.0, abs=0.2)
    assert all(row["cluster/policy_drift"] > 0 for row in rows[1:])
    assert "cluster/policy_drift" not in rows[0], "the first step has the weights that it is trained with"
    for step in range(1, 5):
        table = pq.read_table(whole.path / "rollouts" / f"step_{step:06d}.parquet").to_pylist()
        assert {row["weight_version"] for row in table} == {max(0, step - 1 - lag)}
    command = [sys.executable, "-m", "coupled.rl.cli", "train", str(QUICKSTART), *SMALL, *ahead]
    process = subprocess.Popen([*command, f"output_dir={tmp_path / 'killed'}"], stdout=subprocess.DEVNULL)
    run = tmp_path / "killed" / "quickstart-001"
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "step_000002").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    workers = [int(str(event["pid"])) for event in events(run) if event["event"] == "ready"]
    resumed = train(small(tmp_path / "killed", *ahead), resume="auto")
    assert resumed.path == run
    assert_same_run(whole, resumed)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers), "workers end with their driver"
