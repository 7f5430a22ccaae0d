"""A pool of workers that run jobs one at a time each: what every executor in this process has in common."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from coupled.sandbox.canary import Restartable, Slot, run_watched
from coupled.sandbox.types import Execution, Job, SandboxUnavailable

GRACE_SECONDS = 10.0
"""How long `close` waits for programs that another thread is running."""
_CLOSED = "an executor runs nothing after close(): open another"
REMOTE = "remote"
"""The tier of a server, see `remote`."""


class Pooled(Restartable, Protocol):
    """A member of a pool."""

    @property
    def tier(self) -> str: ...

    def close(self) -> None:
        """Give up what it holds; harmless when repeated."""
        ...


W = TypeVar("W", bound=Pooled)


class Pool(Generic[W]):
    """Workers for the process that made the pool, until it is closed. A context manager.

    `start` makes a worker; what it raises is raised here, after the workers made before were closed. `run_job` runs
    one job on one of them. May be used by several threads.
    """

    def __init__(self, num_workers: int, start: Callable[[], W], run_job: Callable[[W, Job], Execution]) -> None:
        if num_workers < 1:
            raise ValueError(f"an executor needs at least one worker; received num_workers={num_workers}")
        self._owner = os.getpid()
        self._workers: list[W] = []
        self._idle: queue.SimpleQueue[W] = queue.SimpleQueue()
        self._is_closed = False
        self._under_way: list[deque[Slot]] = []
        self._run_job = run_job
        try:
            for _ in range(num_workers):
                worker = start()
                self._workers.append(worker)
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        """Return one execution per job, in order, whatever the programs do.

        RuntimeError when closed, or in a fork of the owner. SandboxUnavailable for a job that the tier cannot run,
        before anything runs, or when a worker that ended cannot be started again.
        """
        if self._is_closed:
            raise RuntimeError(_CLOSED)
        if os.getpid() != self._owner:
            raise RuntimeError(f"an executor belongs to the process that opened it ({self._owner}): open one here")
        for job in jobs:
            require_runnable(job, self._workers[0].tier)
        slots = [Slot(job) for job in jobs]
        todo = deque(slots)
        self._under_way.append(todo)
        try:
            if len(jobs) <= 1 or len(self._workers) == 1:
                self._serve(todo)
            else:
                size = min(len(jobs), len(self._workers))
                with ThreadPoolExecutor(size, "sandbox") as threads:
                    for served in [threads.submit(self._serve, todo) for _ in range(size)]:
                        served.result()
        finally:
            self._under_way.remove(todo)
        if self._is_closed and any(slot.execution is None for slot in slots):
            raise RuntimeError(_CLOSED)
        return [slot.result for slot in slots]

    def close(self) -> None:
        """Close every worker; harmless when repeated, and in a fork of the owner, where it closes none.

        Programs that another thread is running come to their end first; it gets a RuntimeError for those after them.
        """
        if self._is_closed or os.getpid() != self._owner:
            return
        self._is_closed = True
        for todo in list(self._under_way):
            todo.clear()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            with contextlib.suppress(queue.Empty):
                for _ in self._workers:
                    self._idle.get(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            for worker in self._workers:
                worker.close()
                self._idle.put(worker)  # a thread that waits for one then raises

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self, todo: deque[Slot]) -> None:
        """Have idle workers take jobs until none is left; a worker is given back as soon as it has proven itself."""
        while todo:
            worker = self._idle.get()
            try:
                if self._is_closed:
                    raise RuntimeError(_CLOSED)
                run_watched(worker, todo, self._run_job)
            finally:
                self._idle.put(worker)


def require_runnable(job: Job, tier: str) -> None:
    """Raise SandboxUnavailable when the tier cannot run such a job, whatever its program is."""
    if tier == REMOTE and job.tests is not None:
        raise SandboxUnavailable(
            f"a server runs calls and programs that read stdin; job {job.uid!r} has tests that must exchange "
            "messages with the program while both run\n"
            "remedy: choose another sandbox.tier, or tests that are calls of literal arguments"
        )
    if tier not in (REMOTE, "namespaces") and job.profile != "strict":
        raise SandboxUnavailable(
            f"profile {job.profile!r} is available in tier 'namespaces' only; job {job.uid!r} needs it and the tier is "
            f"{tier!r}\n"
            "remedy: `coupled doctor` reports what keeps this machine from tier 'namespaces'; or leave it out"
        )
