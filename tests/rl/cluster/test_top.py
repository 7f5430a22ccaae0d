"""What `coupled top` shows is what the events say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers.schedules import Faults, Run, check, random_run, units_of
from rich.console import Console
from typer.testing import CliRunner

from coupled.rl.cli import app
from coupled.rl.cluster.types import GroupKey, Unit
from coupled.rl.commands.run_view import Balance, EventReader, balance_of, view_of
from coupled.rl.commands.top import show
from coupled.rl.monitoring.events import EventLog
from coupled.rl.recipe.read import dump_recipe, load_recipe


@dataclass
class LoggedRun(Run):
    events: EventLog = field(default_factory=EventLog)

    def told(self, event: str, **facts: object) -> None:
        super().told(event, **facts)
        self.events.emit(event, **facts)


def rows(events: EventLog) -> list[dict[str, object]]:
    return [json.loads(line) for line in events._waiting]


@pytest.mark.parametrize("seed", range(30))
def test_after_a_run_nobody_has_anything_and_the_counts_are_those_of_the_coordinator(seed: int) -> None:
    plain = random_run(seed)
    run = LoggedRun(seed, plain.faults, lag=plain.lag, num_steps=plain.num_steps, num_scorers=plain.num_scorers)
    check(run)
    view = view_of(rows(run.events))
    assert view.oldest() is None
    assert view.waiting("roll") == view.waiting("score") == []
    assert {worker.state for worker in view.workers.values()} == {"ready"}
    assert view.step == run.num_steps
    counters = run.coordinator.take_counters()
    assert view.counts["lost"] == counters.num_lost_workers
    assert view.counts["quarantined"] == counters.num_quarantined
    assert view.counts["duplicate"] == counters.num_duplicates
    assert view.counts["hedged"] == counters.num_hedged


def test_in_mid_step_it_names_the_oldest_unit_and_who_has_it(tmp_path: Path) -> None:
    run = LoggedRun(0, Faults())
    while run.coordinator.ledger.counters.num_dispatched < 2:
        run.pump()
    before = rows(run.events)
    first = next(event for event in before if event["event"] == "start")
    view = view_of(before)
    oldest = view.oldest()
    assert oldest is not None
    assert oldest[1:] == (first["worker"], first["time"])
    console = Console(width=200)
    with console.capture() as capture:
        console.print(show(view, float(str(first["time"])) + 7))
    assert f"oldest: train/1/0, {first['worker']} for 7 s" in capture.get()
    assert "no failures" in capture.get()
    run.events.bind(tmp_path)
    run.events.close()
    done = CliRunner().invoke(app, ["top", str(tmp_path)])
    assert done.exit_code == 0
    assert "train/1/0" in done.output
    assert isinstance(CliRunner().invoke(app, ["top", str(tmp_path / "nowhere")]).exception, ValueError)


def pumped(run: LoggedRun) -> Iterator[None]:
    """After every pump of a run whose trainer takes no time."""
    for step in range(1, run.num_steps + 1):
        run.coordinator.issue(units_of, run.num_steps)
        keys = run.coordinator.ledger.keys_of(step)
        while not run.coordinator.ledger.is_done(keys):
            run.pump()
            yield
        run.train(step, run.coordinator.take(keys))


@pytest.mark.parametrize("seed", range(10))
def test_what_waits_is_what_the_coordinator_has_waiting(seed: int) -> None:
    plain = random_run(seed)
    run = LoggedRun(seed, plain.faults, lag=plain.lag, num_steps=plain.num_steps, num_rollers=1)
    seen = set()
    for _ in pumped(run):
        waiting = run.coordinator.ledger.waiting["roll"]
        # A hedged job waits for a second worker while the first one has it.
        expected = {str(job.entry.unit.key) for job in waiting if not job.num_live}
        found = view_of(rows(run.events)).waiting("roll")
        assert set(found) == expected
        seen.add(len(found))
    assert max(seen) > 0


def test_programs_wait_until_they_are_scored_also_one_by_one() -> None:
    run = LoggedRun(0, Faults(), num_steps=0, num_scorers=1)
    units = [
        Unit(key=GroupKey(stream="programs", step=1, slot=slot), samples=("a", "b"), is_scored=True)
        for slot in range(4)
    ]
    run.coordinator.submit(units)
    assert view_of(rows(run.events)).waiting("score") == [f"programs/1/{slot}" for slot in range(4)]
    while not run.coordinator.pools["score"].workers[0].attempts:
        run.pump()
    assert view_of(rows(run.events)).waiting("score") == ["programs/1/2", "programs/1/3"], "a scorer has two at a time"
    run.transport.kill(run.coordinator.pools["score"].workers[0].handle)
    run.pump()
    while not run.coordinator.pools["score"].workers[0].attempts:
        run.pump()
    waiting = view_of(rows(run.events)).waiting("score")
    assert waiting == ["programs/1/1", "programs/1/2", "programs/1/3", "programs/1/0[1]"]
    while not run.coordinator.ledger.is_done([unit.key for unit in units]):
        run.pump()
    assert view_of(rows(run.events)).waiting("score") == []


RECORDED = [
    {"time": 0.0, "event": "spawn", "worker": "roll-0#1"},
    {"time": 0.0, "event": "issue", "step": 1, "version": 0, "units": 2},
    {"time": 1.0, "event": "ready", "worker": "roll-0#1", "host": "here", "pid": 7},
    {"time": 1.0, "event": "start", "key": "train/1/0", "stage": "roll", "part": [], "worker": "roll-0#1"},
    {"time": 5.0, "event": "rolled", "key": "train/1/0", "worker": "roll-0#1"},
    {"time": 5.0, "event": "start", "key": "train/1/1", "stage": "roll", "part": [], "worker": "roll-0#1"},
    {"time": 11.0, "event": "rolled", "key": "train/1/1", "worker": "roll-0#1"},
    {"time": 14.0, "event": "issue", "step": 2, "version": 1, "units": 2},
    {"time": 14.0, "event": "start", "key": "train/2/0", "stage": "roll", "part": [], "worker": "roll-0#1"},
]
"""A step of ten worker-seconds, and the next one begun."""
STEP = {"step": 1, "time/step_seconds": 14.0, "cluster/rollout_idle": 0.25, "cluster/trainer_idle": 0.75}
"""3.5 seconds of the trainer."""


def test_the_suggested_split_is_what_the_two_sides_cost() -> None:
    view = view_of(RECORDED)
    balance = balance_of(view, [STEP])
    assert balance == Balance(
        rollout_seconds=10.0, trainer_seconds=3.5, num_workers=1, rollout_idle=0.25, trainer_idle=0.75
    )
    assert balance.suggested_workers == 3
    assert balance_of(view, []) is None
    assert balance_of(view, [{"step": 1, "time/step_seconds": 14.0}]) is None, "the run has no workers"
    console = Console(width=200)
    with console.capture() as capture:
        console.print(show(view, 20.0, balance))
    text = capture.get()
    assert "10.0 worker-seconds of rollouts and 3.5 s of the trainer: 3 rollout workers" in text
    assert "idle: rollout workers 25%, trainer 75%" in text
    assert "waiting: 1 to roll (first train/2/1)" in text
    assert "oldest: train/2/0, roll-0#1 for 6 s" in text


def test_a_resumed_run_has_the_workers_of_its_newest_process() -> None:
    again = [{"time": 100.0, "event": "spawn", "worker": "roll-0#1"}]
    view = view_of([*RECORDED, *again])
    assert view.workers["roll-0"].state == "restarting"
    assert view.oldest() is None
    assert view.waiting("roll") == []


def test_a_log_that_grows_is_read_on_from_where_it_ended(tmp_path: Path) -> None:
    lines = [json.dumps(row) + "\n" for row in RECORDED]
    log = tmp_path / "events.jsonl"
    log.write_text("".join(lines[:4]) + lines[4][:9])
    reader = EventReader(tmp_path)
    assert reader.read() == view_of(RECORDED[:4]), "a line that is not whole waits"
    log.write_text("".join(lines))
    assert reader.read() == view_of(RECORDED)
    assert reader.read() == view_of(RECORDED)


def test_a_finished_run_and_one_without_a_cluster_say_so(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDED))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")

    def frame(*overrides: str) -> str:
        (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("quickstart", overrides)))
        done = CliRunner().invoke(app, ["top", str(tmp_path), "--once"])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    remote = frame("rollout.workers=process", "num_steps=2", "optimizer.warmup_steps=0")
    assert "1 of 2 steps trained, no event for" in remote
    assert "no cluster" not in remote
    assert "at cluster.lag=0 the two take turns" in remote
    finished = frame("rollout.workers=process", "cluster.lag=1", "num_steps=1", "optimizer.warmup_steps=0")
    assert "1 of 1 steps trained, finished" in finished
    assert "take turns" not in finished
    assert "roll-0#1 for 0 s" in finished, "time ended with the run"
    assert "no cluster: rollout.workers and sandbox.workers are inline" in frame()
