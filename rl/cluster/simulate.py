"""Workers on a virtual clock, with scripted or random faults: a year of a cluster in a second of a test.

The seed determines everything. A worker can die (with or without work), stop answering until it is killed, take up
to a hundred times longer, have its answer lost, or answer twice; a place can be without a host for a while; a unit can
be poison and kill any worker that touches it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import Unit, WorkerLost, WorkFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities of faults, per call."""

    kill: float = 0.0
    """The worker ends before it answers."""
    idle_kill: float = 0.0
    """The worker ends after it answered."""
    hang: float = 0.0
    """The worker stops answering, until it is killed."""
    slow: float = 0.0
    """The call takes up to a hundred times as long."""
    lose: float = 0.0
    """The work is done and its answer is lost."""
    duplicate: float = 0.0
    """The answer arrives twice."""
    no_start: float = 0.0
    """The place has no host: a worker that is started there never answers `hello`."""
    poison: frozenset[str] = frozenset()
    """Names of units, or of samples, that kill any worker that touches them."""


@dataclass(slots=True, eq=False)
class _Worker:
    place: Any
    target: Any
    is_dead: bool = False
    is_hung: bool = False
    calls: list[_Call] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Call:
    worker: _Worker
    method: str
    arguments: tuple[Any, ...]
    is_done: bool = False
    value: Any = None
    error: Exception | None = None


class SimTransport:
    """A transport whose clock only moves in `wait`. `seconds(method, arguments, rng)` is a call's duration."""

    def __init__(
        self,
        seed: int,
        faults: Faults,
        seconds: Callable[[str, tuple[Any, ...], random.Random], float] = lambda m, a, rng: rng.uniform(0.5, 1.5),
    ) -> None:
        self._rng = random.Random(seed)
        self.faults = faults
        self._seconds = seconds
        self._clock = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._done: list[_Call] = []
        self.num_alive = 0
        self.executions: list[tuple[_Call, str]] = []
        """Executed calls with their methods: a call that occurs twice was retried without the ledger."""

    def spawn(self, spec: WorkerSpec, place: Any) -> Any:
        self.num_alive += 1
        worker = _Worker(place, spec.make(*spec.arguments))
        worker.is_hung = self._rng.random() < self.faults.no_start
        return worker

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        call = _Call(worker, method, arguments)
        worker.calls.append(call)
        rng, faults = self._rng, self.faults
        seconds = self._seconds(method, arguments, rng)
        if worker.is_dead:
            self._at(0.01, lambda: self._lose(call, "its worker was dead"))
            return call
        if rng.random() < faults.slow:
            seconds *= 100 ** rng.random()
        if rng.random() < faults.hang:
            worker.is_hung = True
        elif rng.random() < faults.kill or faults.poison & names_in(arguments):
            self._at(seconds * rng.random(), lambda: self._die(worker))
        else:
            self._at(seconds, lambda: self._answer(call))
        return call

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        """Move the clock to the next answer, or by `timeout` when there is none before."""
        if done := self._take_done():
            return done
        until = self._clock + max(0.0, timeout)
        while self._events and self._events[0][0] <= until:
            self._clock, _, happen = heapq.heappop(self._events)
            happen()
            if done := self._take_done():
                return done
        self._clock = until
        return []

    def result(self, call: Any) -> Any:
        if call.error is not None:
            raise call.error
        return call.value

    def kill(self, worker: Any) -> None:
        self._die(worker)

    def now(self) -> float:
        return self._clock

    def close(self) -> None:
        """There is nothing to release."""

    def _at(self, seconds: float, happen: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self._clock + seconds, self._num_events, happen))

    def _take_done(self) -> list[_Call]:
        done, self._done = self._done, []
        return done

    def _answer(self, call: _Call) -> None:
        worker, rng, faults = call.worker, self._rng, self.faults
        if worker.is_dead or worker.is_hung or call.is_done:
            return
        self.executions.append((call, call.method))
        try:
            call.value = getattr(worker.target, call.method)(*call.arguments)
        except Exception as error:  # boundary of a worker: any error is returned to the caller
            call.error = WorkFailed(error)
        call.is_done = True
        worker.calls.remove(call)
        if rng.random() < faults.lose:
            call.error = WorkerLost("its answer is lost")
        self._done.append(call)
        if rng.random() < faults.duplicate:
            self._at(rng.uniform(0, 3), lambda: self._done.append(call))
        if rng.random() < faults.idle_kill:
            self._at(rng.uniform(0, 3), lambda: self._die(worker))

    def _lose(self, call: _Call, why: str) -> None:
        if not call.is_done:
            call.is_done = True
            call.error = WorkerLost(why)
            self._done.append(call)

    def _die(self, worker: _Worker) -> None:
        if not worker.is_dead:
            worker.is_dead = True
            self.num_alive -= 1
            for call in worker.calls:
                self._lose(call, "its worker ended")
            worker.calls.clear()


def names_in(arguments: tuple[Any, ...]) -> set[str]:
    """Names of the units and samples in a call's arguments."""
    found: set[str] = set()
    for argument in arguments:
        for item in argument if isinstance(argument, list) else [argument]:
            found.add(str(item.key) if isinstance(item, Unit) else str(item))
    return found
