"""State of a run from its files: workers, queues, and the cost of rollouts and training. Needs no running process."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coupled.rl.cluster.types import TRAINING
from coupled.rl.monitoring.events import FILE

RECENT_STEPS = 20
"""Number of recent steps over which the cost of a step is a median."""


@dataclass(slots=True)
class WorkerView:
    """State of a worker after the events."""

    holder: str = ""
    state: str = "restarting"
    host: str = ""
    pid: int = 0
    num_done: int = 0
    num_lost: int = 0
    why: str = ""
    has: dict[str, float] = field(default_factory=dict)
    """Job → time at which the worker received it, in seconds since the epoch."""


@dataclass(slots=True)
class RunView:
    """State of a run after its events."""

    workers: dict[str, WorkerView] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    step: int = 0
    """The latest step that has started."""
    version: int = -1
    """Version of that step's weights."""
    last: float = 0.0
    """Time of the latest event, in seconds since the epoch."""
    pending: dict[str, dict[str, float]] = field(default_factory=lambda: {"roll": {}, "score": {}})
    """Unfinished jobs per stage: job (a unit or one sample of it) → submission time."""
    rollout_seconds: dict[int, float] = field(default_factory=dict)
    """Training step → worker-seconds that its rollouts took."""
    _parts: dict[str, list[int]] = field(default_factory=dict)
    """Unit that is being scored → indices of its samples."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Apply the next event. A resumed run has new workers: the workers of its earlier process are forgotten."""
        kind = event["event"]
        self.counts[kind] += 1
        self.last = event["time"]
        if kind == "issue":
            self.step, self.version = event["step"], event["version"]
            self._ask("roll", TRAINING, event)
        elif kind == "submit":
            self._ask(event["stage"], event["stream"], event)
        elif kind == "start" and event["stage"] == "score":
            self._split(event)
        elif kind in ("rolled", "quarantined", "scored"):
            for jobs in self.pending.values():
                jobs.pop(_job(event), None)
        elif kind == "infra":
            self.pending["score"][_job(event)] = event["time"]
        if "worker" in event:
            self._of_worker(kind, event)

    def waiting(self, stage: str) -> list[str]:
        """Unfinished jobs of a stage that no worker holds, the oldest first."""
        held = {job for view in self.workers.values() for job in view.has}
        return [job for job in self.pending[stage] if job not in held]

    def oldest(self) -> tuple[str, str, float] | None:
        """The job that a worker has held longest, that worker, and the time since; None when no worker has a job."""
        held = [(since, unit, view.holder) for view in self.workers.values() for unit, since in view.has.items()]
        if not held:
            return None
        since, unit, holder = min(held)
        return unit, holder, since

    def _ask(self, stage: str, stream: str, event: Mapping[str, Any]) -> None:
        for slot in range(event.get("units", 0)):
            self.pending[stage][f"{stream}/{event['step']}/{slot}"] = event["time"]

    def _split(self, event: Mapping[str, Any]) -> None:
        """Split a unit whose supervisor died: it is scored sample by sample."""
        jobs, key, part = self.pending["score"], str(event["key"]), event["part"]
        if len(part) == 1 and key in jobs:
            since = jobs.pop(key)
            jobs.update({f"{key}[{place}]": since for place in self._parts.pop(key, part)})
        elif len(part) > 1:
            self._parts[key] = part

    def _of_worker(self, kind: str, event: Mapping[str, Any]) -> None:
        name, _, incarnation = str(event["worker"]).partition("#")
        if kind == "spawn" and incarnation == "1" and name in self.workers:
            self.workers.clear()
            self.pending = {"roll": {}, "score": {}}
            self._parts.clear()
        worker = self.workers.setdefault(name, WorkerView())
        worker.holder = str(event["worker"])
        if kind == "spawn":
            worker.state = "restarting"
        elif kind == "ready":
            worker.state, worker.why = "ready", ""
            worker.host, worker.pid = event.get("host", ""), event.get("pid", 0)
        elif kind in ("suspect", "retired"):
            worker.state = kind
        elif kind == "lost":
            worker.state, worker.why = "lost", event.get("why", "")
            worker.num_lost += 1
            worker.has.clear()
        elif kind == "start":
            worker.has[_job(event)] = event["time"]
        elif kind in ("rolled", "scored", "duplicate", "failed"):
            since = worker.has.pop(_job(event), None)
            if kind == "rolled":
                self._rolled(str(event["key"]), 0.0 if since is None else event["time"] - since)
            worker.num_done += kind in ("rolled", "scored")
            if worker.state == "suspect" and kind != "failed":
                worker.state = "ready"

    def _rolled(self, unit: str, seconds: float) -> None:
        stream, step, _ = unit.split("/")
        if stream == TRAINING:
            self.rollout_seconds[int(step)] = self.rollout_seconds.get(int(step), 0.0) + seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Cost of a training step on its two sides, medians over the latest steps.

    Example: `Balance(rollout_seconds=412.0, trainer_seconds=100.0, num_workers=2, rollout_idle=0.03,
    trainer_idle=0.55)` suggests five workers and has two.
    """

    rollout_seconds: float
    """Worker-seconds of rollouts."""
    trainer_seconds: float
    """Seconds of a step without the wait for rollouts."""
    num_workers: int
    rollout_idle: float
    """Idle share of the workers' time."""
    trainer_idle: float
    """Idle share of the trainer's time in a step."""

    @property
    def suggested_workers(self) -> int:
        """Number of workers for which rollouts of a step take no longer than its training, when they run ahead."""
        return max(1, math.ceil(self.rollout_seconds / self.trainer_seconds - 0.1))


def balance_of(run: RunView, rows: Sequence[Mapping[str, Any]]) -> Balance | None:
    """Balance from a run's events and the rows of its metrics.jsonl; None before the first step, or without workers."""
    recent = [row for row in rows[-RECENT_STEPS:] if "cluster/trainer_idle" in row and row["time/step_seconds"]]
    rollouts = [run.rollout_seconds[int(row["step"])] for row in recent if int(row["step"]) in run.rollout_seconds]
    training = [row["time/step_seconds"] * (1 - row["cluster/trainer_idle"]) for row in recent]
    if not rollouts or not statistics.median(training):
        return None
    return Balance(
        rollout_seconds=statistics.median(rollouts),
        trainer_seconds=statistics.median(training),
        num_workers=sum(name.startswith("roll-") and view.state != "retired" for name, view in run.workers.items()),
        rollout_idle=statistics.median(row["cluster/rollout_idle"] for row in recent),
        trainer_idle=statistics.median(row["cluster/trainer_idle"] for row in recent),
    )


def view_of(events: Iterable[Mapping[str, Any]]) -> RunView:
    """State of a run after the given events."""
    run = RunView()
    for event in events:
        run.add(event)
    return run


class EventReader:
    """Reads the events of a running run: each call reads only the new ones."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._offset = 0
        self.view = RunView()

    def read(self) -> RunView:
        """The run's state after all completely written events."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self.view.add(json.loads(line))
        return self.view


def _job(event: Mapping[str, Any]) -> str:
    part = event.get("part") or []
    return str(event["key"]) + (f"[{part[0]}]" if len(part) == 1 else "")
