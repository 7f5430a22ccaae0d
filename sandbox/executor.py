"""Runs jobs on a pool of workers.

What tier `process` covers: a process per program, forked from a clean interpreter; an unprivileged user;
limits on processor time, wall time, memory, files, output and processes; and, where the system grants
namespaces, no network, no sight of other processes, and a file system of system libraries only. `isolation()`
says what took effect.

What it does **not** cover: no system call is forbidden, so a flaw of the kernel is within reach; where there
are no namespaces the host's readable files and its network are too, and a program running as the host's own
user can signal the host's processes. Time and cache side channels are open.
"""

from __future__ import annotations

import os
import queue
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from coupled.sandbox.outcome import Reading, encode_job, read_calls, read_stdio
from coupled.sandbox.relay import run_tests
from coupled.sandbox.types import CallResult, Execution, Isolation, Job, Outcome, SandboxUnavailable, Usage
from coupled.sandbox.worker import TIER, Worker, WorkerDied

_NUM_RETRIES = 2
_open: weakref.WeakSet[ProcessExecutor] = weakref.WeakSet()


class Executor(Protocol):
    """Runs untrusted programs. Fails closed: an executor that exists isolates as `isolation` says."""

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        """Return one execution per job, in the order of the jobs, whatever the programs do."""
        ...

    def isolation(self) -> Isolation:
        """Return what holds a program on this machine."""
        ...

    def close(self) -> None:
        """End all workers and what they run."""
        ...


class ProcessExecutor:
    """Tier `process`: `num_workers` zygotes, each running one program at a time. A context manager.

    May be used by several threads. A forked copy of it in another process refuses to run. Raises
    SandboxUnavailable when a worker cannot lock programs down here.
    """

    def __init__(self, *, num_workers: int = 1) -> None:
        if num_workers < 1:
            raise ValueError(f"an executor needs at least one worker; received num_workers={num_workers}")
        if not sys.platform.startswith("linux"):
            raise SandboxUnavailable(
                f"untrusted programs run on Linux only; this is {sys.platform}: use a Linux machine"
            )
        self._owner = os.getpid()
        self._workers: list[Worker] = []
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._is_closed = False
        try:
            for index in range(num_workers):
                self._workers.append(Worker(index))
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            self._idle.put(worker)
        _open.add(self)

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        """Return one execution per job, in order. RuntimeError when closed, or in a fork of the owner."""
        if self._is_closed:
            raise RuntimeError("an executor runs nothing after close(): open another")
        if os.getpid() != self._owner:
            raise RuntimeError(f"an executor belongs to the process that opened it ({self._owner}): open one here")
        if len(jobs) <= 1 or len(self._workers) == 1:
            return [self._run_one(job) for job in jobs]
        with ThreadPoolExecutor(min(len(jobs), len(self._workers)), "sandbox") as pool:
            return list(pool.map(self._run_one, jobs))

    def isolation(self) -> Isolation:
        """Return what took effect for the workers; all of them start alike."""
        return self._workers[0].isolation

    def close(self) -> None:
        """End every worker; waits for a few milliseconds each. Harmless when repeated."""
        self._is_closed = True
        if os.getpid() == self._owner:
            for worker in self._workers:
                worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_workers"):
            self.close()

    def _run_one(self, job: Job) -> Execution:
        worker = self._idle.get()
        try:
            return run_job(worker, job)
        finally:
            self._idle.put(worker)


def run_job(worker: Worker, job: Job) -> Execution:
    """Run one job on one worker: once for its calls, or once per input until one does not end well."""
    if job.tests is not None or not job.stdin_cases:
        body = b"" if job.tests else encode_job(job)
        reading, usage = _attempt(worker, job, body, None, read_calls)
        return Execution(
            uid=job.uid,
            outcome=reading.outcome,
            results=reading.results,
            usage=usage,
            tier=TIER,
            detail=reading.detail,
        )
    body = encode_job(job)
    results: list[CallResult] = []
    cpu_seconds = wall_seconds = 0.0
    for text in job.stdin_cases:
        reading, usage = _attempt(worker, job, body, text.encode("utf-8", errors="surrogateescape"), read_stdio)
        cpu_seconds += usage.cpu_seconds
        wall_seconds += usage.wall_seconds
        if reading.outcome is not Outcome.OK:
            break
        results += reading.results
    return Execution(
        uid=job.uid,
        outcome=reading.outcome,
        results=tuple(results),
        usage=Usage(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds),
        tier=TIER,
        detail=reading.detail,
    )


def _attempt(
    worker: Worker, job: Job, body: bytes, stdin: bytes | None, read: Callable[..., Reading]
) -> tuple[Reading, Usage]:
    """Run until the outcome is the program's own, at most twice more; only infrastructure is tried again."""
    for _ in range(1 + _NUM_RETRIES):
        try:
            if job.tests is not None:
                reading, usage = run_tests(worker, job)
            else:
                finished = worker.run(body, job.limits, stdin)
                reading = read(finished, job)
                usage = Usage(cpu_seconds=finished.cpu_seconds, wall_seconds=finished.wall_seconds)
        except WorkerDied as error:
            reading, usage = Reading(outcome=Outcome.SANDBOX_ERROR, detail=str(error)), Usage()
        if not reading.outcome.is_infrastructure:
            break
        if reading.outcome is Outcome.SANDBOX_ERROR:
            worker.restart()
    return reading, usage


def open_executor(tier: str = TIER, *, num_workers: int = 1) -> ProcessExecutor:
    """Return an executor of the tier; ValueError for an unknown one, SandboxUnavailable if it cannot hold."""
    if tier not in TIERS:
        raise ValueError(f"tier is one of {', '.join(map(repr, TIERS))}; received {tier!r}")
    return TIERS[tier](num_workers=num_workers)


TIERS: dict[str, Callable[..., ProcessExecutor]] = {TIER: ProcessExecutor}
"""Every tier this version can open, by name."""


def _forget_in_fork() -> None:
    for executor in list(_open):
        for worker in executor._workers:
            worker.forget()


os.register_at_fork(after_in_child=_forget_in_fork)
