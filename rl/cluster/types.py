"""The records of the coordinator and its vocabulary.

unit        a group of rollouts, or of programs, that travels together; its key is (stream, step, slot)
stage       an operation on a unit: `roll` makes its payload, `score` gives each of its samples a score
job         the work of one call to one worker: a unit's payload, or the scores of some of its samples
attempt     an attempt at a job by one incarnation of a worker; only the first that succeeds counts
version     weights are named by the number of training steps behind them
strike      an incarnation of a worker died while it held the job
masked      a sample without a score: it is left out of the update, never counted as 0
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from coupled.rl.errors import CoupledError

Stage = Literal["roll", "score"]
TRAINING = "train"
"""The stream of units that training consumes, step by step; every other stream is computed at once."""
STRIKES = 3
"""Number of incarnations that die on a job before it is quarantined as poison."""
INFRA_BUDGET = 5
"""Attempts at a sample whose workers report that they could not run it."""
DATA_BUDGET = 2
"""Attempts at a job that raises an error; the second runs on another worker, in case the first one is faulty."""


class State(enum.StrEnum):
    """State of a unit."""

    TODO = "todo"
    ROLLING = "rolling"
    ROLLED = "rolled"
    SCORING = "scoring"
    SCORED = "scored"
    TRAINED = "trained"
    QUARANTINED = "quarantined"
    STALE = "stale"

    @property
    def is_final(self) -> bool:
        """True when nothing more is computed for the unit."""
        return self in (State.SCORED, State.TRAINED, State.QUARANTINED, State.STALE)


class Failure(enum.StrEnum):
    """Cause of a failed attempt, which determines the reaction."""

    INFRA = "infra"
    """The infrastructure: the job is retried elsewhere."""
    DATA = "data"
    """The data or the code: the worker raised an error, and would again."""
    POISON = "poison"
    """The job kills any worker that runs it."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class GroupKey:
    """Key of a unit. Example: `GroupKey(stream="train", step=3, slot=0)`."""

    stream: str = TRAINING
    step: int
    slot: int

    def __str__(self) -> str:
        return f"{self.stream}/{self.step}/{self.slot}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unit:
    """A unit of work. Without `work` it begins at scoring, with its `samples`; without `is_scored` it ends rolled."""

    key: GroupKey
    version: int = -1
    """Weight version to roll out with; -1: none is needed."""
    work: Any = None
    """Argument of the call to a rollout worker."""
    samples: tuple[Any, ...] = ()
    """Arguments of the call to a scoring worker, where nothing is rolled out."""
    is_scored: bool = False
    patience: float | None = None
    """Seconds that scoring all samples may take; None: derived from recent durations."""

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sort key: evaluations before training, then by step."""
        return (self.key.stream == TRAINING, self.key.step, self.key.slot)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """Placeholder for the score of a sample that could not be scored."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Timeouts after which a worker or a run counts as hanging, in seconds. See `PATIENT` and `FAST`."""

    least_seconds: float = 60.0
    """No attempt is suspect before this, or before 3 times the 99th percentile of recent durations."""
    first_seconds: float = 1800.0
    """The same before any attempt has succeeded."""
    start_seconds: float = 600.0
    """Time that a worker may take to start: import, load a model, prove its sandbox."""
    stall_seconds: float = 3600.0
    """The run stops (and can be resumed) when no worker finishes a call for this long."""
    restarts_per_hour: int = 30
    """A worker that ends more often is retired."""


PATIENT = Health()
"""For real models, and networks with interruptions of seconds."""
FAST = Health(least_seconds=10.0, first_seconds=120.0, start_seconds=120.0, stall_seconds=600.0)
"""For one host or a quiet network, and steps of seconds."""
HEALTH = {"patient": PATIENT, "fast": FAST}
"""Values of the recipe's `cluster.health`."""


@runtime_checkable
class EventSink(Protocol):
    """Receives the events of a run. Example: `emit("start", key=key, worker="roll-0#1", version=3)`."""

    def __call__(self, event: str, **facts: Any) -> None: ...


def _drop(event: str, **facts: Any) -> None:
    """Drop an event."""


NO_EVENTS: EventSink = _drop
"""The sink of a caller that keeps no events."""


class WorkerLost(Exception):
    """A worker, its host or its answer is gone; the work may be retried elsewhere."""


class WorkFailed(Exception):
    """The call of a worker raised `cause`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause = cause


class ClusterError(CoupledError):
    """The cluster cannot continue: too few workers, or no progress. Resuming the run may succeed."""

    exit_code = 75


@dataclass(slots=True, kw_only=True)
class Counters:
    """Counts since the last `take_counters`, for the metrics."""

    num_dispatched: int = 0
    num_redispatched: int = 0
    """Attempts at jobs that had been attempted before."""
    num_hedged: int = 0
    """Second attempts beside a slow one."""
    num_duplicates: int = 0
    """Results that arrived late, and were dropped."""
    num_quarantined: int = 0
    num_masked: int = 0
    """Samples left without a score."""
    num_lost_workers: int = 0
    busy_seconds: dict[str, float] = field(default_factory=dict)
    """Stage → worker-seconds with a job."""
    present_seconds: dict[str, float] = field(default_factory=dict)
    """Stage → worker-seconds ready for work."""
