"""Remembers the executions of programs, so that the same program with the same tests is run once.

The key is everything that a program can depend on: its source and setup, the calls or inputs, the limits, the
tier and the interpreter's version. Kept are only outcomes that the program brings about by itself (`KEPT`): a
time-out, a kill, a dead worker or a failure of the sandbox may turn out otherwise the next time.

A program may still be unlike itself: it can read the clock, `os.urandom` or the address of an object (`random`
and the hash of text are seeded by the sandbox). Then the first answer stays. That is meant: of two completions
with the same text, neither may earn more than the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from coupled.sandbox.jail import codec
from coupled.sandbox.types import Execution, Executor, Isolation, Job, Outcome

KEPT = frozenset({Outcome.OK, Outcome.LOAD_ERROR, Outcome.CRASH, Outcome.OUTPUT_LIMIT, Outcome.PROTOCOL})
"""Outcomes that a program brings about by itself, whenever and wherever it runs."""
MAX_VALUES = 1_000_000
"""Values (numbers, short texts, containers) kept in all results together, about 100 bytes each; a larger one counts as
several."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, set, frozenset)
_LEAST_WEIGHT = 16
"""Weight of an entry without results, in values."""
_VALUE_BYTES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatistics:
    """Jobs and hits of a cache. Example: `CacheStatistics(num_jobs=160, num_hits=40)`."""

    num_jobs: int = 0
    num_hits: int = 0
    """Jobs that were not run: known from before, or the same as another of their batch."""


class CachedExecutor:
    """Any executor, with a cache in front of it. Closing it closes the executor.

    The memory is bounded by `MAX_VALUES`: the results used longest ago are dropped first. May be used by several
    threads.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._salt = f"{executor.isolation().tier} {sys.version}"
        self._num_free = MAX_VALUES
        self._known: OrderedDict[bytes, tuple[Execution, int]] = OrderedDict()
        self._running: dict[bytes, Future[Execution]] = {}
        self._lock = threading.Lock()
        self._num_jobs = self._num_hits = 0

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        """Return one execution per job, in order; only jobs that are new, each once, reach the executor.

        What another thread is running at this moment is not new either: its outcome is waited for.
        """
        keys = [job_key(job, self._salt) for job in jobs]
        found: dict[bytes, Execution] = {}
        missing: dict[bytes, Job] = {}
        elsewhere: dict[bytes, Future[Execution]] = {}
        with self._lock:
            self._num_jobs += len(jobs)
            for key, job in zip(keys, jobs, strict=True):
                if key in self._known:
                    self._known.move_to_end(key)
                    found[key] = self._known[key][0]
                elif key in self._running and key not in missing:
                    elsewhere[key] = self._running[key]
                elif key not in missing:
                    missing[key] = job
                    self._running[key] = Future()
            self._num_hits += len(jobs) - len(missing)
        if missing:
            found |= self._run_new(missing)
        # Only now: the thread that runs the others may be waiting for these.
        found |= {key: future.result() for key, future in elsewhere.items()}
        return [dataclasses.replace(found[key], uid=job.uid) for key, job in zip(keys, jobs, strict=True)]

    def statistics(self) -> CacheStatistics:
        """Return the counts of jobs and hits so far."""
        with self._lock:
            return CacheStatistics(num_jobs=self._num_jobs, num_hits=self._num_hits)

    def isolation(self) -> Isolation:
        """Return what holds a program that is run."""
        return self._executor.isolation()

    def close(self) -> None:
        """Close the executor and forget everything."""
        self._executor.close()
        with self._lock:
            self._known.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_new(self, missing: Mapping[bytes, Job]) -> dict[bytes, Execution]:
        try:
            found = dict(zip(missing, self._executor.run(list(missing.values())), strict=True))
            with self._lock:
                for key, execution in found.items():
                    self._keep(key, execution)
                    self._running.pop(key).set_result(execution)
        except BaseException as error:
            with self._lock:
                for future in filter(None, (self._running.pop(key, None) for key in missing)):
                    future.set_exception(error)
            raise
        return found

    def _keep(self, key: bytes, execution: Execution) -> None:
        if execution.outcome not in KEPT or key in self._known:
            return
        weight = _LEAST_WEIGHT + _weight_of_texts(execution.stdout, execution.detail)
        for result in execution.results:
            weight += _weight(result.value)
            if result.raised is not None:
                weight += _weight_of_texts(result.raised.type, result.raised.text)
        self._known[key] = (execution, weight)
        self._num_free -= weight
        while self._num_free < 0:
            _, (_, freed) = self._known.popitem(last=False)
            self._num_free += freed


def job_key(job: Job, salt: str = "") -> bytes:
    """Return 32 bytes that are the same for jobs which differ in nothing but their uid."""
    digest = hashlib.sha256(salt.encode())
    for item in dataclasses.fields(job):
        if item.name != "uid":
            _feed(digest.update, getattr(job, item.name))
    return digest.digest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    """Feed a value as tag, length and body: no two values feed the same bytes, and 1, 1.0 and True differ."""
    if dataclasses.is_dataclass(value):
        parts: list[Any] = [getattr(value, item.name) for item in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        parts = [part for pair in value.items() for part in pair]
    elif type(value) in (tuple, list):
        parts = list(value)
    else:
        # The rest as the program's process would receive it; values that cannot travel differ by their repr.
        body = codec.encode(value).encode() + (b"" if type(value) in _PLAIN else repr(value).encode())
        update(b"v%d:" % len(body) + body)
        return
    update(b"%s%d:" % (type(value).__name__.encode(), len(parts)))
    for part in parts:
        _feed(update, part)


def _weight(value: Any) -> int:
    """Count the values in a value; one that is large by itself, such as a text or an int, counts by its size."""
    weight, rest = 0, [value]
    while rest:
        item = rest.pop()
        weight += 1 + sys.getsizeof(item) // _VALUE_BYTES
        if isinstance(item, Mapping):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            rest += item
        elif isinstance(item, range):
            rest += [item.start, item.stop, item.step]
        elif isinstance(item, codec.Opaque):
            rest.append(item.type_name)
    return weight


def _weight_of_texts(*texts: str) -> int:
    return sum(sys.getsizeof(text) // _VALUE_BYTES for text in texts)
