"""Workers of one kind: which incarnation each is at, what it is doing, and which one to ask next."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coupled.rl.cluster.ledger import Attempt, Job
from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import Health, Stage

HOUR = 3600.0
RECENT = 256
"""Durations that the next deadline is judged by."""
MAX_BACKOFF_SECONDS = 60.0


class WorkerState(enum.StrEnum):
    """READY takes work up to its pool's capacity, also while it has some."""

    RESTARTING = "restarting"
    READY = "ready"
    SUSPECT = "suspect"
    """It is past a deadline: it gets nothing more until it answers, and is ended at twice the deadline."""
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """What a pool is made of. `places` has one entry per worker, None where the transport chooses."""

    stage: Stage
    spec: WorkerSpec
    places: Sequence[Any]
    method: str
    """The worker's method that does the work."""
    capacity: int = 1
    """Jobs that a worker has at a time."""
    min_workers: int = 1
    """The run ends (to be resumed) when fewer can be had."""
    has_weights: bool = False
    """Whether workers must hold the version that a unit asks for."""
    infra_errors: tuple[type[BaseException], ...] = ()
    """Errors that say nothing of the work: it is tried elsewhere."""
    check: Callable[[Any], None] = lambda hello: None
    """Raises when what a worker says of itself is not what the run needs."""


@dataclass(slots=True, eq=False)
class Worker:
    """One place in a pool; whoever holds it may change."""

    stage: Stage
    name: str
    place: Any
    handle: Any = None
    incarnation: int = 0
    state: WorkerState = WorkerState.RESTARTING
    version: int = -1
    """Weights it has confirmed; -1: none."""
    attempts: list[Attempt] = field(default_factory=list)
    since: float = 0.0
    """When it began to start; while it waits to be started again, when that is due."""
    is_waiting: bool = False
    restarts: deque[float] = field(default_factory=deque)
    num_failures: int = 0
    """How often it ended since it last did its work."""
    hello: Any = None
    why: str = ""
    """What ended the last incarnation; empty while one is ready."""
    error: BaseException | None = None

    @property
    def holder(self) -> str:
        """Names the incarnation. Example: `roll-0#3`."""
        return f"{self.name}#{self.incarnation}"


class WorkerPool:
    """The workers of one stage."""

    def __init__(self, spec: PoolSpec, health: Health) -> None:
        self.spec = spec
        self._health = health
        self.workers = [Worker(spec.stage, f"{spec.stage}-{index}", place) for index, place in enumerate(spec.places)]
        self._recent: deque[float] = deque(maxlen=RECENT)

    def pick(self, job: Job) -> Worker | None:
        """The worker to ask: one that did not fail the job, holds its weights and has little to do."""
        version = job.entry.unit.version if self.spec.has_weights else -1
        best: tuple[bool, bool, int] | None = None
        chosen = None
        for worker in self.workers:
            if worker.state is not WorkerState.READY or not self._has_room(worker, job):
                continue
            rank = (worker.name == job.avoid, worker.version != version, len(worker.attempts))
            if best is None or rank < best:
                best, chosen = rank, worker
        return chosen

    def took(self, seconds: float) -> None:
        """An attempt succeeded in this time."""
        self._recent.append(seconds)

    def patience(self, job: Job) -> float:
        """Seconds until an attempt at the job is suspect."""
        unit = job.entry.unit
        if self.spec.stage == "score" and unit.patience is not None:
            return unit.patience
        if not self._recent:
            return self._health.first_seconds
        ordered = sorted(self._recent)
        p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        return max(self._health.least_seconds, 3 * p99)

    def may_restart(self, worker: Worker, now: float) -> bool:
        """Whether a worker that ended may be started again; False when it ends too often."""
        while worker.restarts and worker.restarts[0] < now - HOUR:
            worker.restarts.popleft()
        worker.restarts.append(now)
        return len(worker.restarts) <= self._health.restarts_per_hour

    def backoff(self, worker: Worker) -> float:
        """Seconds before the next start: none at first, then more and more for one that never gets to work."""
        return 0.0 if worker.num_failures <= 2 else min(MAX_BACKOFF_SECONDS, 2.0 ** (worker.num_failures - 3))

    @property
    def has_room(self) -> bool:
        """Whether any worker could take one more job."""
        return any(w.state is WorkerState.READY and len(w.attempts) < self.spec.capacity for w in self.workers)

    @property
    def num_ready(self) -> int:
        """Workers that could take work, now or after what they have."""
        return sum(worker.state is WorkerState.READY for worker in self.workers)

    @property
    def num_left(self) -> int:
        """Workers that are not given up."""
        return sum(worker.state is not WorkerState.RETIRED for worker in self.workers)

    def _has_room(self, worker: Worker, job: Job) -> bool:
        if not worker.attempts:
            return True
        if job.is_alone or len(worker.attempts) >= self.spec.capacity:
            return False
        return not any(attempt.job.is_alone or attempt.job is job for attempt in worker.attempts)
