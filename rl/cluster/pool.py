"""Workers of one stage: the incarnation and jobs of each, and the choice of a worker for the next job."""

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
"""Number of recent durations from which the next deadline is computed."""
MAX_BACKOFF_SECONDS = 60.0


class WorkerState(enum.StrEnum):
    """State of a worker. A READY one takes jobs up to its pool's capacity, also while it has some."""

    RESTARTING = "restarting"
    READY = "ready"
    SUSPECT = "suspect"
    """Past a deadline: it gets no further jobs until it answers, and is killed at twice the deadline."""
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """Settings of a pool. `places` has one entry per worker; None lets the transport choose."""

    stage: Stage
    spec: WorkerSpec
    places: Sequence[Any]
    method: str
    """The worker's method that does the work."""
    capacity: int = 1
    """Jobs that a worker holds at a time."""
    min_workers: int = 1
    """The run stops (and can be resumed) when fewer workers are left."""
    has_weights: bool = False
    """Whether workers must hold the weight version that a unit requires."""
    infra_errors: tuple[type[BaseException], ...] = ()
    """Errors of the infrastructure, not of the job: the job is retried on another worker."""
    check: Callable[[Any], None] = lambda hello: None
    """Raises when a worker's reply to `hello` does not meet the requirements of the run."""


@dataclass(slots=True, eq=False)
class Worker:
    """One place in a pool, held by one incarnation after another."""

    stage: Stage
    name: str
    place: Any
    handle: Any = None
    incarnation: int = 0
    state: WorkerState = WorkerState.RESTARTING
    version: int = -1
    """Weight version that it has confirmed; -1: none."""
    attempts: list[Attempt] = field(default_factory=list)
    since: float = 0.0
    """Time at which its start began; while it waits for a restart, the time at which the restart is due."""
    is_waiting: bool = False
    restarts: deque[float] = field(default_factory=deque)
    num_failures: int = 0
    """Number of times that it ended since its last finished job."""
    hello: Any = None
    why: str = ""
    """Cause of the last incarnation's end; empty while one is ready."""
    error: BaseException | None = None

    @property
    def holder(self) -> str:
        """Name of the incarnation. Example: `roll-0#3`."""
        return f"{self.name}#{self.incarnation}"


class WorkerPool:
    """The workers of one stage."""

    def __init__(self, spec: PoolSpec, health: Health) -> None:
        self.spec = spec
        self._health = health
        self.workers = [Worker(spec.stage, f"{spec.stage}-{index}", place) for index, place in enumerate(spec.places)]
        self._recent: deque[float] = deque(maxlen=RECENT)

    def pick(self, job: Job) -> Worker | None:
        """Choose a worker for a job; None when all are full.

        One that did not fail the job comes first, then one that holds its weights, then the one with the fewest jobs.
        """
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
        """Record the duration of an attempt that succeeded."""
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
        """Whether a worker that ended may be restarted; False when it ends too often."""
        while worker.restarts and worker.restarts[0] < now - HOUR:
            worker.restarts.popleft()
        worker.restarts.append(now)
        return len(worker.restarts) <= self._health.restarts_per_hour

    def backoff(self, worker: Worker) -> float:
        """Seconds before the next start: 0 at first, then doubling for a worker that never finishes a job."""
        return 0.0 if worker.num_failures <= 2 else min(MAX_BACKOFF_SECONDS, 2.0 ** (worker.num_failures - 3))

    @property
    def has_room(self) -> bool:
        """Whether any worker could take one more job."""
        return any(w.state is WorkerState.READY and len(w.attempts) < self.spec.capacity for w in self.workers)

    @property
    def num_ready(self) -> int:
        """Number of workers that take jobs, now or after their current ones."""
        return sum(worker.state is WorkerState.READY for worker in self.workers)

    @property
    def num_left(self) -> int:
        """Number of workers that are not retired."""
        return sum(worker.state is not WorkerState.RETIRED for worker in self.workers)

    def _has_room(self, worker: Worker, job: Job) -> bool:
        if not worker.attempts:
            return True
        if job.is_alone or len(worker.attempts) >= self.spec.capacity:
            return False
        return not any(attempt.job.is_alone or attempt.job is job for attempt in worker.attempts)
