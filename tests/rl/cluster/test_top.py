"""What `coupled top` shows is what the events say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console
from schedules import Faults, Run, check, random_run
from typer.testing import CliRunner

from coupled.rl.cli import app
from coupled.rl.cluster.top import show, view_of
from coupled.rl.events import EventLog


@dataclass
class LoggedRun(Run):
    events: EventLog = field(default_factory=EventLog)

    def told(self, event: str, **facts: object) -> None:
        super().told(event, **facts)
        self.events.tell(event, **facts)


def rows(events: EventLog) -> list[dict[str, object]]:
    return [json.loads(line) for line in events._waiting]


@pytest.mark.parametrize("seed", range(30))
def test_after_a_run_nobody_has_anything_and_the_counts_are_those_of_the_coordinator(seed: int) -> None:
    plain = random_run(seed)
    run = LoggedRun(seed, plain.faults, lag=plain.lag, num_steps=plain.num_steps, num_scorers=plain.num_scorers)
    check(run)
    view = view_of(rows(run.events))
    assert view.oldest() is None
    assert {worker.state for worker in view.workers.values()} == {"ready"}
    assert view.step == run.num_steps
    counters = run.coordinator.take_counters()
    assert view.counts["lost"] == counters.num_lost_workers
    assert view.counts["quarantined"] == counters.num_quarantined
    assert view.counts["duplicate"] == counters.num_duplicates
    assert view.counts["hedged"] == counters.num_hedged


def test_in_mid_step_it_names_the_oldest_unit_and_who_has_it(tmp_path: Path) -> None:
    run = LoggedRun(0, Faults())
    while run.coordinator.ledger.counters.num_dispatched < 3:
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
    assert "nothing has gone wrong" in capture.get()
    run.events.bind(tmp_path)
    run.events.close()
    done = CliRunner().invoke(app, ["top", str(tmp_path)])
    assert done.exit_code == 0
    assert "train/1/0" in done.output
    assert isinstance(CliRunner().invoke(app, ["top", str(tmp_path / "nowhere")]).exception, ValueError)
