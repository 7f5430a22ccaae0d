"""State of every unit. It uses no transport and no clock: the coordinator reports events, the ledger records them.

Only the first result of a job counts. Later ones, from a worker that was given up or from an incarnation that a
network failure had hidden, change nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coupled.rl.cluster.types import (
    DATA_BUDGET,
    INFRA_BUDGET,
    NO_EVENTS,
    STRIKES,
    TRAINING,
    Counters,
    EventSink,
    Failure,
    GroupKey,
    Masked,
    Stage,
    State,
    Unit,
)


@dataclass(slots=True, eq=False)
class Entry:
    """A unit and its recorded state."""

    unit: Unit
    state: State
    payload: Any = None
    samples: tuple[Any, ...] = ()
    scores: list[Any] = field(default_factory=list)
    """One per sample; None until it is known."""
    num_open: int = 0
    """Number of samples without a score yet."""
    reason: str = ""
    """Reason of the quarantine."""
    error: BaseException | None = None
    """Error that workers raised more often than the budget allows."""

    @property
    def is_done(self) -> bool:
        """True when no further result is expected: finished, quarantined or failed."""
        if self.error is not None or self.state.is_final:
            return True
        return self.state is State.ROLLED and not self.unit.is_scored


@dataclass(slots=True, eq=False)
class Job:
    """The work of one call to one worker."""

    entry: Entry
    stage: Stage
    part: tuple[int, ...] = ()
    """Indices of the samples to score."""
    strikes: frozenset[str] = frozenset()
    num_infra: int = 0
    num_data: int = 0
    avoid: str | None = None
    """The worker that failed it last."""
    is_alone: bool = False
    """The job may be what kills workers: it gets one to itself, so that no other job is lost with it."""
    is_hedged: bool = False
    is_done: bool = False
    num_live: int = 0

    @property
    def order(self) -> tuple[bool, int, int, tuple[int, ...]]:
        return (*self.entry.unit.order, self.part)

    @property
    def is_wanted(self) -> bool:
        """Whether a result would still count."""
        return not (self.is_done or self.entry.is_done)


@dataclass(slots=True, eq=False)
class Attempt:
    """An attempt at a job by one incarnation of a worker."""

    job: Job
    number: int
    holder: str
    """`name#incarnation` of the worker."""
    started: float
    patience: float
    """Seconds until it is suspect."""
    is_ended: bool = False


class Ledger:
    """All units that have not been taken out, and the queues of their jobs."""

    def __init__(
        self,
        *,
        to_samples: Callable[[Unit, Any], Sequence[Any]] = lambda unit, payload: payload,
        is_infra: Callable[[Any], bool] = lambda score: False,
        emit: EventSink = NO_EVENTS,
    ) -> None:
        self.entries: dict[GroupKey, Entry] = {}
        self.counters = Counters()
        self.waiting: dict[Stage, list[Job]] = {"roll": [], "score": []}
        self._to_samples = to_samples
        self._is_infra = is_infra
        self._emit = emit
        self._num_attempts = 0

    def add(self, unit: Unit) -> None:
        """Admit a unit. AssertionError when its key is already present."""
        assert unit.key not in self.entries, f"{unit.key} was admitted before"
        entry = Entry(unit=unit, state=State.TODO if unit.work is not None else State.ROLLED)
        self.entries[unit.key] = entry
        if unit.work is not None:
            self._wait(Job(entry, "roll"))
        else:
            self._to_score(entry, unit.samples)

    def start(self, job: Job, holder: str, now: float, patience: float) -> Attempt:
        """Record that a worker starts a job, and return the attempt."""
        self.waiting[job.stage].remove(job)
        self._num_attempts += 1
        job.num_live += 1
        entry = job.entry
        if entry.state is State.TODO:
            entry.state = State.ROLLING
        elif entry.state is State.ROLLED:
            entry.state = State.SCORING
        self.counters.num_dispatched += 1
        self.counters.num_redispatched += bool(job.strikes or job.num_infra or job.num_data)
        self._emit(
            "start", key=entry.unit.key, stage=job.stage, part=job.part, worker=holder, version=entry.unit.version
        )
        return Attempt(job, self._num_attempts, holder, now, patience)

    def rolled(self, attempt: Attempt, payload: Any) -> bool:
        """Record a unit's payload; False when it arrives too late."""
        if not self._is_first(attempt):
            return False
        entry = attempt.job.entry
        entry.payload = payload
        entry.state = State.ROLLED
        self._emit("rolled", key=entry.unit.key, worker=attempt.holder)
        if entry.unit.is_scored:
            self._to_score(entry, self._to_samples(entry.unit, payload))
        return True

    def scored(self, attempt: Attempt, scores: Sequence[Any]) -> bool:
        """Record the scores of a job's samples; False when they arrive too late. INFRA scores are retried elsewhere."""
        if not self._is_first(attempt):
            return False
        job = attempt.job
        entry = job.entry
        self._emit("scored", key=entry.unit.key, part=job.part, worker=attempt.holder)
        again = []
        for place, score in zip(job.part, scores, strict=True):
            if self._is_infra(score) and job.num_infra + 1 < INFRA_BUDGET:
                again.append(place)
            else:
                self.counters.num_masked += self._is_infra(score)
                self._settle(entry, place, score)
        if again:
            self._emit("infra", key=entry.unit.key, part=again, worker=attempt.holder)
            avoid = attempt.holder.partition("#")[0]
            self._wait(
                Job(entry, "score", tuple(again), job.strikes, job.num_infra + 1, job.num_data, avoid, job.is_alone)
            )
        return True

    def fail(self, attempt: Attempt, failure: Failure, error: BaseException) -> None:
        """Record a failed attempt: its job waits for another worker, or has used up its budget."""
        job = attempt.job
        entry = job.entry
        self.end(attempt)
        if not job.is_wanted:
            return
        reason = f"{type(error).__name__}: {error}"[:500]
        self._emit(
            "failed",
            key=entry.unit.key,
            stage=job.stage,
            part=job.part,
            worker=attempt.holder,
            kind=failure,
            why=reason,
        )
        job.avoid = attempt.holder.partition("#")[0]
        if failure is Failure.DATA:
            job.num_data += 1
            if job.num_data >= DATA_BUDGET:
                job.is_done = True
                self._unwait(entry)
                entry.error = error
                return
        else:
            job.strikes |= {attempt.holder}
        if len(job.strikes) >= STRIKES:
            job.is_done = True
            self._unwait(entry, job)
            self._quarantine(job, reason)
        elif job.num_live == 0 and job not in self.waiting[job.stage]:
            if job.stage == "score" and len(job.part) > 1 and job.strikes:
                job.is_done = True
                for place in job.part:
                    self._wait(Job(entry, "score", (place,), job.strikes, job.num_infra, 0, job.avoid, is_alone=True))
            else:
                job.is_alone = bool(job.strikes)
                job.is_hedged = False
                self._wait(job)

    def end(self, attempt: Attempt) -> None:
        """Close an attempt: later results of it do not count."""
        if not attempt.is_ended:
            attempt.is_ended = True
            attempt.job.num_live -= 1

    def hedge(self, job: Job) -> bool:
        """Queue a second attempt beside the slow one; at most once per job, False after that."""
        if job.is_hedged or job.is_done:
            return False
        job.is_hedged = True
        self.counters.num_hedged += 1
        self._wait(job)
        self._emit("hedged", key=job.entry.unit.key, stage=job.stage, part=job.part)
        return True

    def is_done(self, keys: Iterable[GroupKey]) -> bool:
        """Whether no further result is expected for these units."""
        return all(self.entries[key].is_done for key in keys)

    def keys_of(self, step: int) -> list[GroupKey]:
        """Keys of a step's training units, by slot."""
        return sorted(key for key in self.entries if key.stream == TRAINING and key.step == step)

    def forget(self, keys: Iterable[GroupKey]) -> list[Entry]:
        """Remove units, done or not, and return their entries; later results of them are dropped."""
        taken = [self.entries.pop(key) for key in keys]
        for entry in taken:
            self._unwait(entry)
            if not entry.is_done:
                entry.state = State.STALE
            elif entry.unit.key.stream == TRAINING and entry.state is not State.QUARANTINED:
                entry.state = State.TRAINED
        return taken

    def _is_first(self, attempt: Attempt) -> bool:
        job = attempt.job
        is_late = attempt.is_ended or not job.is_wanted
        self.end(attempt)
        if is_late:
            self.counters.num_duplicates += 1
            self._emit("duplicate", key=job.entry.unit.key, stage=job.stage, part=job.part, worker=attempt.holder)
            return False
        job.is_done = True
        if job.is_hedged:
            self._unwait(job.entry, job)
        return True

    def _to_score(self, entry: Entry, samples: Sequence[Any]) -> None:
        entry.samples = tuple(samples)
        entry.scores = [None] * len(entry.samples)
        entry.num_open = len(entry.samples)
        if entry.num_open:
            self._wait(Job(entry, "score", tuple(range(entry.num_open))))
        else:
            entry.state = State.SCORED

    def _settle(self, entry: Entry, place: int, score: Any) -> None:
        assert entry.scores[place] is None, f"{entry.unit.key} sample {place} has a score already"
        entry.scores[place] = score
        entry.num_open -= 1
        if entry.num_open == 0:
            entry.state = State.SCORED

    def _quarantine(self, job: Job, reason: str) -> None:
        """Rollouts: the unit is left out. Scores: its samples are masked, which is not a score of 0."""
        entry = job.entry
        self.counters.num_quarantined += 1
        holders = ", ".join(sorted(job.strikes))
        entry.reason = f"it ended {len(job.strikes)} workers ({holders}): {reason}"
        self._emit("quarantined", key=entry.unit.key, stage=job.stage, part=job.part, why=entry.reason)
        if job.stage == "roll":
            entry.state = State.QUARANTINED
            return
        for place in job.part:
            self.counters.num_masked += 1
            self._settle(entry, place, self.masked(entry.reason))

    @staticmethod
    def masked(reason: str) -> Any:
        """Placeholder for the score of a sample that no worker could score."""
        return Masked(reason=reason)

    def _wait(self, job: Job) -> None:
        bisect.insort(self.waiting[job.stage], job, key=lambda waiting: waiting.order)

    def _unwait(self, entry: Entry, job: Job | None = None) -> None:
        for stage, jobs in self.waiting.items():
            if jobs:
                self.waiting[stage] = [w for w in jobs if w.entry is not entry or (job is not None and w is not job)]
