"""One single-threaded state machine over ledger, pools and transport.

It never blocks: `handle` takes finished calls, `tick` checks deadlines and dispatches jobs, and both return at once.
It does not depend on its caller (a thread in real time, a test in virtual time). Every call it makes has a deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from coupled.rl.cluster.admission import InOrder
from coupled.rl.cluster.ledger import Attempt, Entry, Job, Ledger
from coupled.rl.cluster.pool import PoolSpec, Worker, WorkerPool, WorkerState
from coupled.rl.cluster.transport import Transport
from coupled.rl.cluster.types import (
    NO_EVENTS,
    PATIENT,
    ClusterError,
    Counters,
    EventSink,
    Failure,
    GroupKey,
    Health,
    Stage,
    Unit,
    WorkerLost,
    WorkFailed,
)

MakeUnits = Callable[[int, int], Sequence[Unit]]
"""(step, version) → the units of a training step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A version of the weights for the workers. `handle` belongs to the carrier; `digest` identifies the contents."""

    version: int
    handle: Any
    digest: str


@dataclass(slots=True, eq=False)
class _Call:
    """A call in progress and its purpose: a greeting, loading weights, or the work of an attempt."""

    worker: Worker
    purpose: str
    deadline: float
    attempt: Attempt | None = None
    version: int = -1


class Coordinator:
    """Owns ledger, admission, pools and the weights of the versions in use."""

    def __init__(
        self,
        transport: Transport,
        pools: Iterable[PoolSpec],
        *,
        admission: InOrder | None = None,
        health: Health = PATIENT,
        to_samples: Callable[[Unit, Any], Sequence[Any]] = lambda unit, payload: payload,
        is_infra: Callable[[Any], bool] = lambda score: False,
        on_rolled: Callable[[Unit, Any], None] = lambda unit, payload: None,
        emit: EventSink = NO_EVENTS,
    ) -> None:
        self.transport = transport
        self.admission = admission or InOrder()
        self.ledger = Ledger(to_samples=to_samples, is_infra=is_infra, emit=emit)
        self.pools: dict[Stage, WorkerPool] = {spec.stage: WorkerPool(spec, health) for spec in pools}
        self.num_trained = 0
        self.calls: dict[Any, _Call] = {}
        self._health = health
        self._on_rolled = on_rolled
        self._emit = emit
        self._weights: dict[int, Weights] = {}
        self._next_step = 1
        self._accounted = self._progress = transport.now()
        for pool in self.pools.values():
            for worker in pool.workers:
                self._spawn(pool, worker)

    # --- calls of the run ------------------------------------------------------------------------------------------

    def publish(self, weights: Weights) -> list[int]:
        """Make a version available to units; versions that no unit needs any more are dropped.

        Returns the versions that are kept.
        """
        self._weights[weights.version] = weights
        needed = [entry.unit.version for entry in self.ledger.entries.values()]
        oldest = min([self.admission.version_for(self._next_step), weights.version, *(v for v in needed if v >= 0)])
        for version in [version for version in self._weights if version < oldest]:
            del self._weights[version]
        return list(self._weights)

    def begin(self, num_trained: int, versions: dict[int, int], make: MakeUnits, last: int) -> None:
        """Continue after `num_trained` steps. `versions`: step → weight version of steps in progress, which is kept."""
        self.num_trained = num_trained
        self._next_step = num_trained + 1
        for step, version in sorted(versions.items()):
            self._issue(step, version, make)
        self.issue(make, last)

    def issue(self, make: MakeUnits, last: int) -> list[int]:
        """Begin every step up to `last` that admission allows, and return them."""
        begun = []
        while self._next_step <= last and self.admission.allow(self.num_trained, self._next_step):
            begun.append(self._next_step)
            self._issue(self._next_step, self.admission.version_for(self._next_step), make)
        return begun

    def submit(self, units: Iterable[Unit]) -> None:
        """Add units outside of training: they are computed at once, before all others."""
        self._mark_start()
        units = list(units)
        for unit in units:
            self.ledger.add(unit)
        if units:
            first, stage = units[0], "score" if units[0].work is None else "roll"
            self._emit("submit", stream=first.key.stream, step=first.key.step, stage=stage, units=len(units))
        self.dispatch()

    def take(self, keys: Sequence[GroupKey]) -> list[Entry]:
        """Remove finished units and return their entries. Raises the error that a worker raised on one of them."""
        for key in keys:
            error = self.ledger.entries[key].error
            if error is not None:
                self.ledger.forget(keys)
                raise error
        return self.ledger.forget(keys)

    def trained(self, step: int) -> None:
        """Record that step `step` has been trained: the weights have that version now."""
        assert step == self.num_trained + 1, f"steps are trained in order: {step} after {self.num_trained}"
        self.num_trained = step

    def snapshot(self) -> dict[str, Any]:
        """State for a checkpoint: the number of trained steps, and the version of every step issued beyond them."""
        entries = self.ledger.entries
        versions = {key.step: entries[key].unit.version for key in entries if key.stream == "train"}
        return {"num_trained": self.num_trained, "lag": self.admission.lag, "versions": versions}

    # --- calls of the pump ----------------------------------------------------------------------------------------

    def handle(self, done: Iterable[Any]) -> None:
        """Process finished calls. A call that is no longer known belongs to an incarnation that was given up."""
        for call in done:
            known = self.calls.pop(call, None)
            if known is None:
                continue
            worker = known.worker
            pool = self.pools[worker.stage]
            try:
                value = self.transport.result(call)
            except WorkerLost as error:
                self._account()
                self._lost(pool, worker, error)
            except WorkFailed as error:
                self._account()
                self._failed(pool, known, error.cause)
            else:
                self._progress = self.transport.now()
                self._account()
                self._succeeded(pool, known, value)

    def tick(self) -> None:
        """Check every deadline, start workers that are due, and dispatch jobs.

        Raises:
            ClusterError: too few workers are left, or none has made progress for too long.
        """
        now = self.transport.now()
        for handle, call in list(self.calls.items()):
            if now >= call.deadline and handle in self.calls:
                self._overdue(call, now)
        for pool in self.pools.values():
            for worker in pool.workers:
                if worker.is_waiting and now >= worker.since:
                    self._spawn(pool, worker)
            if pool.num_left < pool.spec.min_workers:
                whys = "; ".join(f"{worker.name}: {worker.why}" for worker in pool.workers if worker.why)
                raise ClusterError(
                    f"stage {pool.spec.stage!r} needs {pool.spec.min_workers} workers and {pool.num_left} are left; "
                    f"the others ended too often: {whys}. Fix the cause, then resume with resume=auto"
                )
        self.dispatch()
        if all(entry.is_done for entry in self.ledger.entries.values()):
            self._progress = now
        elif now - self._progress > self._health.stall_seconds:
            raise ClusterError(
                f"no worker has finished a call for {now - self._progress:.0f} s. {self.oldest()}. Checkpoints are "
                "intact; resume with resume=auto"
            )

    def next_deadline(self) -> float:
        """Time at which `tick` is due if no call finishes before."""
        due = [call.deadline for call in self.calls.values()]
        due += [w.since for pool in self.pools.values() for w in pool.workers if w.is_waiting]
        return min(due, default=self.transport.now() + self._health.least_seconds)

    def dispatch(self) -> None:
        """Assign waiting jobs to workers with free capacity, the most urgent first."""
        self._account()
        for stage, pool in self.pools.items():
            for job in list(self.ledger.waiting[stage]):
                worker = pool.pick(job)
                if worker is None:
                    if not pool.has_room:
                        break
                    continue
                self._begin(pool, worker, job)

    def oldest(self) -> str:
        """The most urgent unfinished unit with its workers, then the state of every worker, for error messages."""
        now = self.transport.now()
        told = []
        for entry in sorted(self.ledger.entries.values(), key=lambda entry: entry.unit.order):
            if not entry.is_done:
                held = [
                    f"{attempt.holder} for {now - attempt.started:.0f} s"
                    for pool in self.pools.values()
                    for worker in pool.workers
                    for attempt in worker.attempts
                    if attempt.job.entry is entry
                ]
                told.append(f"{entry.unit.key} is {entry.state}, held by {', '.join(held) or 'no worker'}")
                break
        pools = [
            f"{worker.holder} {worker.state}" + (f" ({worker.why})" if worker.why else "")
            for pool in self.pools.values()
            for worker in pool.workers
        ]
        return "; ".join([*told, *pools])

    def take_counters(self) -> Counters:
        """Counts since the last call, for the metrics."""
        self._account()
        taken, self.ledger.counters = self.ledger.counters, Counters()
        return taken

    def close(self) -> None:
        """End every worker."""
        for pool in self.pools.values():
            for worker in pool.workers:
                if worker.handle is not None:
                    self.transport.kill(worker.handle)
        self.calls.clear()
        self.transport.close()

    # --- workers --------------------------------------------------------------------------------------------------

    def _spawn(self, pool: WorkerPool, worker: Worker) -> None:
        now = self.transport.now()
        worker.incarnation += 1
        worker.state = WorkerState.RESTARTING
        worker.is_waiting = False
        worker.since = now
        worker.version = -1
        worker.handle = self.transport.spawn(pool.spec.spec, worker.place)
        self._emit("spawn", worker=worker.holder)
        self._call(worker, "hello", "hello", (), self._health.start_seconds)

    def _call(
        self, worker: Worker, purpose: str, method: str, arguments: tuple[Any, ...], seconds: float, **more: Any
    ) -> None:
        handle = self.transport.call(worker.handle, method, *arguments)
        self.calls[handle] = _Call(worker, purpose, self.transport.now() + seconds, **more)

    def _lost(self, pool: WorkerPool, worker: Worker, error: BaseException, *, is_counted: bool = True) -> None:
        """Give up an incarnation, or record that it is gone; its calls are dropped."""
        attempts, worker.attempts = worker.attempts, []
        self.calls = {handle: call for handle, call in self.calls.items() if call.worker is not worker}
        self.transport.kill(worker.handle)
        worker.handle = None
        worker.why, worker.error = f"{type(error).__name__}: {error}"[:300], error
        self.ledger.counters.num_lost_workers += 1
        self._emit("lost", worker=worker.holder, why=worker.why)
        for attempt in attempts:
            self.ledger.fail(attempt, Failure.INFRA, error)
        worker.state = WorkerState.RESTARTING
        now = self.transport.now()
        if is_counted and not pool.may_restart(worker, now):
            worker.state = WorkerState.RETIRED
            self._emit("retired", worker=worker.holder, why=worker.why)
            return
        worker.num_failures += 1
        worker.is_waiting = True
        worker.since = now + pool.backoff(worker)

    def _overdue(self, call: _Call, now: float) -> None:
        worker, attempt = call.worker, call.attempt
        pool = self.pools[worker.stage]
        self._account()
        if attempt is None:
            # A place that is unavailable now may come back later, so this does not count against the worker.
            why = f"not ready {now - worker.since:.0f} s after its start"
            self._lost(pool, worker, WorkerLost(why), is_counted=False)
        elif worker.state is WorkerState.READY:
            worker.state = WorkerState.SUSPECT
            call.deadline = attempt.started + 2 * attempt.patience
            self._emit("suspect", worker=worker.holder, key=attempt.job.entry.unit.key)
            self.ledger.hedge(attempt.job)
        elif now >= attempt.started + 2 * attempt.patience:
            self._lost(pool, worker, WorkerLost(f"no answer in {now - attempt.started:.0f} s"))
        else:
            call.deadline = attempt.started + 2 * attempt.patience
            self.ledger.hedge(attempt.job)

    # --- work -----------------------------------------------------------------------------------------------------

    def _issue(self, step: int, version: int, make: MakeUnits) -> None:
        assert step == self._next_step, f"steps are issued in order: {step} where {self._next_step} is next"
        self._next_step = step + 1
        self._mark_start()
        units = make(step, version)
        for unit in units:
            self.ledger.add(unit)
        self._emit("issue", step=step, version=version, units=len(units))

    def _mark_start(self) -> None:
        """Reset the stall watchdog when no unit is in progress: the last pump may be hours ago."""
        if all(entry.is_done for entry in self.ledger.entries.values()):
            self._progress = self.transport.now()

    def _begin(self, pool: WorkerPool, worker: Worker, job: Job) -> None:
        attempt = self.ledger.start(job, worker.holder, self.transport.now(), pool.patience(job))
        worker.attempts.append(attempt)
        version = job.entry.unit.version
        if pool.spec.has_weights and worker.version != version:
            weights = self._weights[version]
            arguments = (weights.version, weights.handle)
            worker.version = -1
            self._call(worker, "load", "load", arguments, attempt.patience, attempt=attempt, version=version)
        else:
            self._work(pool, worker, attempt)

    def _work(self, pool: WorkerPool, worker: Worker, attempt: Attempt) -> None:
        unit, entry = attempt.job.entry.unit, attempt.job.entry
        argument = unit.work if attempt.job.stage == "roll" else [entry.samples[place] for place in attempt.job.part]
        left = attempt.started + attempt.patience - self.transport.now()
        self._call(worker, "work", pool.spec.method, (argument,), left, attempt=attempt, version=unit.version)

    def _succeeded(self, pool: WorkerPool, call: _Call, value: Any) -> None:
        worker, attempt = call.worker, call.attempt
        if call.purpose == "hello":
            try:
                pool.spec.check(value)
            except Exception as error:  # any error of the check rejects this worker
                self._failed(pool, call, error)
                return
            worker.state, worker.hello, worker.why, worker.error = WorkerState.READY, value, "", None
            known = value if isinstance(value, dict) else {}
            self._emit("ready", worker=worker.holder, host=known.get("host", ""), pid=known.get("pid", 0))
            return
        assert attempt is not None
        if call.purpose == "load":
            if not attempt.job.is_wanted:  # computed elsewhere meanwhile; its weights may be dropped
                worker.attempts.remove(attempt)
                self._recovered(worker)
                self.ledger.end(attempt)
                return
            weights = self._weights.get(call.version)
            if weights is None or value != weights.digest:
                self._lost(pool, worker, WorkerLost(f"its weights do not match version {call.version}: {value}"))
                return
            worker.version = call.version
            self._work(pool, worker, attempt)
            return
        worker.attempts.remove(attempt)
        self._recovered(worker)
        if attempt.job.stage == "roll":
            is_first = self.ledger.rolled(attempt, value)
            if is_first:
                self._on_rolled(attempt.job.entry.unit, value)
        else:
            is_first = self.ledger.scored(attempt, value)
        worker.num_failures = 0
        if is_first:
            pool.took(self.transport.now() - attempt.started)

    def _failed(self, pool: WorkerPool, call: _Call, cause: BaseException) -> None:
        worker, attempt = call.worker, call.attempt
        if attempt is None or isinstance(cause, pool.spec.infra_errors):
            self._lost(pool, worker, cause)
            return
        worker.attempts.remove(attempt)
        self._recovered(worker)
        self.ledger.fail(attempt, Failure.DATA, cause)

    def _recovered(self, worker: Worker) -> None:
        now = self.transport.now()
        if worker.state is WorkerState.SUSPECT and all(now < a.started + a.patience for a in worker.attempts):
            worker.state = WorkerState.READY

    def _account(self) -> None:
        """Add the worker-seconds since the last call to the counters of busy and of present workers."""
        now = self.transport.now()
        passed, self._accounted = now - self._accounted, now
        counters = self.ledger.counters
        for stage, pool in self.pools.items():
            busy = sum(bool(worker.attempts) for worker in pool.workers)
            present = busy + sum(w.state is WorkerState.READY and not w.attempts for w in pool.workers)
            counters.busy_seconds[stage] = counters.busy_seconds.get(stage, 0.0) + passed * busy
            counters.present_seconds[stage] = counters.present_seconds.get(stage, 0.0) + passed * present
