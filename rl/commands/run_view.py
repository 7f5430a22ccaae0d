"""A run as its files tell it: its workers, what waits, and what its two sides cost. Needs no running process."""

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
"""What a step costs is the median over so many of the latest."""


@dataclass(slots=True)
class WorkerView:
    """A worker as the events leave it."""

    holder: str = ""
    state: str = "restarting"
    host: str = ""
    pid: int = 0
    num_done: int = 0
    num_lost: int = 0
    why: str = ""
    has: dict[str, float] = field(default_factory=dict)
    """Unit → when it was given to the worker, in seconds since the epoch."""


@dataclass(slots=True)
class RunView:
    """A run as its events leave it."""

    workers: dict[str, WorkerView] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    step: int = 0
    """The latest that has been begun."""
    version: int = -1
    """Of its weights."""
    last: float = 0.0
    """When the latest event was, in seconds since the epoch."""
    pending: dict[str, dict[str, float]] = field(default_factory=lambda: {"roll": {}, "score": {}})
    """Stage → jobs that it is not done with, a unit or one sample of it → since when they are asked for."""
    rollout_seconds: dict[int, float] = field(default_factory=dict)
    """Training step → worker-seconds that its rollouts took."""
    _parts: dict[str, list[int]] = field(default_factory=dict)
    """Unit that is being scored → its samples."""

    def add(self, event: Mapping[str, Any]) -> None:
        """Take the next event. A process of the run begins anew: its workers are not those of the one before."""
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
        """Jobs that a stage has to do and nobody has, the oldest first."""
        held = {job for view in self.workers.values() for job in view.has}
        return [job for job in self.pending[stage] if job not in held]

    def oldest(self) -> tuple[str, str, float] | None:
        """The unit that somebody has had longest, who has it, and since when; None when nobody has any."""
        held = [(since, unit, view.holder) for view in self.workers.values() for unit, since in view.has.items()]
        if not held:
            return None
        since, unit, holder = min(held)
        return unit, holder, since

    def _ask(self, stage: str, stream: str, event: Mapping[str, Any]) -> None:
        for slot in range(event.get("units", 0)):
            self.pending[stage][f"{stream}/{event['step']}/{slot}"] = event["time"]

    def _split(self, event: Mapping[str, Any]) -> None:
        """A unit whose supervisor ended is scored sample by sample."""
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
    """What a training step costs on its two sides, medians over the latest steps.

    Example: `Balance(rollout_seconds=412.0, trainer_seconds=100.0, num_workers=2, rollout_idle=0.03,
    trainer_idle=0.55)` wants five workers and has two.
    """

    rollout_seconds: float
    """Worker-seconds of rollouts."""
    trainer_seconds: float
    """Seconds of everything that is not waiting for them."""
    num_workers: int
    rollout_idle: float
    """Share of the workers' time."""
    trainer_idle: float
    """Share of the step."""

    @property
    def suggested_workers(self) -> int:
        """So many that their part of a step takes no longer than the trainer's, when they run ahead of it."""
        return max(1, math.ceil(self.rollout_seconds / self.trainer_seconds - 0.1))


def balance_of(run: RunView, rows: Sequence[Mapping[str, Any]]) -> Balance | None:
    """From a run's events and the rows of its metrics.jsonl; None while no step is finished, or without workers."""
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
    """What the events add up to."""
    run = RunView()
    for event in events:
        run.add(event)
    return run


class EventReader:
    """Reads the events of a run that goes on: each time only those that are new."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._offset = 0
        self.view = RunView()

    def read(self) -> RunView:
        """The run after all events that are written whole."""
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
