"""The records of the coordinator and the words for them.

unit        a group of rollouts, or of programs, that travels together; its key is (stream, step, slot)
stage       what is done to a unit: `roll` makes its payload, `score` gives each of its samples a score
job         what one call asks of one worker: a unit's payload, or the scores of some of its samples
attempt     one try at a job by one incarnation of a worker; the first that succeeds counts, the others never
version     weights are named by the number of training steps behind them
strike      an incarnation of a worker ended while it had the job
masked      a sample without a score: it is left out of the update, never counted as 0
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from coupled.rl.errors import CoupledError

Stage = Literal["roll", "score"]
TRAINING = "train"
"""The stream of units that training consumes, step by step; every other stream is done at once."""
STRIKES = 3
"""So many incarnations may end over a job before it is quarantined: it is taken for poison."""
INFRA_BUDGET = 5
"""So often a sample is tried whose worker says that it could not run it."""
DATA_BUDGET = 2
"""So often a job is tried whose worker raises an error: on a second worker, in case it is the first one's fault."""


class State(enum.StrEnum):
    """What has become of a unit."""

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
        """Nothing more is computed for it."""
        return self in (State.SCORED, State.TRAINED, State.QUARANTINED, State.STALE)


class Failure(enum.StrEnum):
    """Whose fault it is that an attempt failed, and so what is done about it."""

    INFRA = "infra"
    """Nobody's: tried again elsewhere."""
    DATA = "data"
    """The work's, or ours: the worker raised an error, and would again."""
    POISON = "poison"
    """The work ends whoever touches it."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class GroupKey:
    """Names a unit. Example: `GroupKey(stream="train", step=3, slot=0)`."""

    stream: str = TRAINING
    step: int
    slot: int

    def __str__(self) -> str:
        return f"{self.stream}/{self.step}/{self.slot}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unit:
    """Work to do. Without `work` it begins at scoring, with `samples` given; without `is_scored` it ends rolled."""

    key: GroupKey
    version: int = -1
    """Weights to roll out with; -1 where none are needed."""
    work: Any = None
    """What a rollout worker is called with."""
    samples: tuple[Any, ...] = ()
    """What a scoring worker is called with, where nothing is rolled out."""
    is_scored: bool = False
    patience: float | None = None
    """Seconds that scoring all samples may take; none: judged by how long others took."""

    @property
    def order(self) -> tuple[bool, int, int]:
        """What is waited for comes first: evaluations before training, then the earlier step."""
        return (self.key.stream == TRAINING, self.key.step, self.key.slot)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """In the place of a score: the sample could not be scored."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How long to wait before something counts as hanging, in seconds. See `PATIENT` and `FAST`."""

    least_seconds: float = 60.0
    """No attempt is suspect before this, or before 3 times what 99 % of the latest ones took."""
    first_seconds: float = 1800.0
    """The same while none has been seen yet."""
    start_seconds: float = 600.0
    """A worker may take so long to start: import, load a model, prove its sandbox."""
    stall_seconds: float = 3600.0
    """The run ends (to be resumed) when nothing at all comes of any worker for so long."""
    restarts_per_hour: int = 30
    """A worker that ends more often is retired."""


PATIENT = Health()
"""For real models, and networks with interruptions of seconds."""
FAST = Health(least_seconds=10.0, first_seconds=120.0, start_seconds=120.0, stall_seconds=600.0)
"""For one host or a quiet network, and steps of seconds."""
HEALTH = {"patient": PATIENT, "fast": FAST}
"""By the recipe's `cluster.health`."""


@runtime_checkable
class EventSink(Protocol):
    """Takes the events of a run. Example: `emit("start", key=key, worker="roll-0#1", version=3)`."""

    def __call__(self, event: str, **facts: Any) -> None: ...


def _drop(event: str, **facts: Any) -> None:
    """Keep nothing."""


NO_EVENTS: EventSink = _drop
"""The sink of a caller that keeps no events."""


class WorkerLost(Exception):
    """A worker, its host or its answer is gone; the work may be tried elsewhere."""


class WorkFailed(Exception):
    """What a worker ran raised `cause`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause = cause


class ClusterError(CoupledError):
    """The cluster cannot go on: too few workers, or nothing moves. Resuming the run may well succeed."""

    exit_code = 75


@dataclass(slots=True, kw_only=True)
class Counters:
    """What has happened since the last `take`, for the metrics."""

    num_dispatched: int = 0
    num_redispatched: int = 0
    """Attempts at what had been tried before."""
    num_hedged: int = 0
    """Attempts beside one that takes suspiciously long."""
    num_duplicates: int = 0
    """Results that came second, and were dropped."""
    num_quarantined: int = 0
    num_masked: int = 0
    """Samples left without a score."""
    num_lost_workers: int = 0
    busy_seconds: dict[str, float] = field(default_factory=dict)
    """Stage → worker-seconds with something to do."""
    present_seconds: dict[str, float] = field(default_factory=dict)
    """Stage → worker-seconds ready for work."""
