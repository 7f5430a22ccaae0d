"""Runs jobs on a pool of workers, in the best tier that this machine proves to hold.

`open_executor()` tries `namespaces`, then `landlock`: a tier is taken when its workers start and the self-check (see
`self_check`) finds every hostile probe stopped by what should stop it; that costs a second or two, once per process.
When neither holds, SandboxUnavailable names both reasons and what would help. There is no silent step down: tier
`process` opens only when it is requested by name, and warns.

What each tier covers:

`namespaces`  A process per program, forked from a clean interpreter, in mount, pid, ipc and network namespaces of its
              own: it sees system libraries and the interpreter, read-only, an empty /tmp of limited size, a /proc
              with its own processes alone where the host allows, and no network. All its processes end with it.
`landlock`    The same process on the host's file system, of which it can read the same trees and write nothing. It can
              start no thread and no process and send no signal. It can find out whether a path of the host exists,
              and there is no scratch directory.
`process`     Limits and an unprivileged user, plus the network and ipc namespaces that are granted. It does not
              contain a hostile program: no system call is refused, and what its user can read or signal is in reach.

All tiers: limits on processor time, wall time, memory, files, output and processes; no capabilities, no_new_privs,
an unprivileged user when the host is root. `namespaces` and `landlock`: system calls beyond computing are refused.
`isolation()` reports what took effect, and in its notes why a better tier did not.

Not covered by any: flaws of the kernel within the calls that remain, time and cache side channels, and memory of all
programs together.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from coupled.sandbox import zygote_process
from coupled.sandbox.outcome import Reading, encode_job, read_calls, read_stdio
from coupled.sandbox.pool import Pool
from coupled.sandbox.relay import run_tests
from coupled.sandbox.self_check import run_self_check
from coupled.sandbox.types import CallResult, Execution, Isolation, Job, Outcome, SandboxUnavailable, Usage
from coupled.sandbox.worker import Worker
from coupled.sandbox.zygote_process import WorkerDied

_NUM_RETRIES = 2
_NUM_STARTS = 3
_PAUSE_SECONDS = 0.5
"""Before a worker that could not be started is started again: descriptors or memory may have been short."""
_open: weakref.WeakSet[LocalExecutor] = weakref.WeakSet()
_held: set[tuple[object, ...]] = set()
"""Which tiers passed the self-check in this process, each with what could change that."""


class LocalExecutor(Pool[Worker]):
    """`num_workers` zygotes of one tier on this machine, each running one program at a time. A context manager.

    Programs may import the standard library and the packages named in `preload`, which are loaded beforehand; no
    other package is in their sight. May be used by several threads. A forked copy of it in another process refuses
    to run. Raises SandboxUnavailable when a worker cannot lock programs down here, or a package is missing. Does
    not check itself: `open_executor` does.
    """

    def __init__(self, tier: str, *, num_workers: int = 1, preload: Sequence[str] = ()) -> None:
        if not sys.platform.startswith("linux"):
            raise SandboxUnavailable(
                f"untrusted programs run on Linux only; this is {sys.platform}: use a Linux machine"
            )
        self.notes: tuple[str, ...] = ()
        """Lines that `isolation` adds: why a better tier was not taken."""
        super().__init__(num_workers, lambda: Worker(tier, preload), run_job)
        _open.add(self)

    def isolation(self) -> Isolation:
        """Return what took effect for the workers; all of them start alike."""
        found = self._workers[0].isolation
        return replace(found, notes=found.notes + self.notes)

    def __del__(self) -> None:
        if hasattr(self, "_workers"):
            self.close()


def run_job(worker: Worker, job: Job) -> Execution:
    """Run one job on one worker: once for its calls, or once per input until one does not end well."""
    if job.tests is not None or not job.stdin_cases:
        body = b"" if job.tests else encode_job(job)
        reading, usage, stdout = _attempt(worker, job, body, None, read_calls)
        return Execution(
            uid=job.uid,
            outcome=reading.outcome,
            results=reading.results,
            usage=usage,
            tier=worker.tier,
            stdout=stdout,
            detail=reading.detail,
        )
    body = encode_job(job)
    results: list[CallResult] = []
    cpu_seconds = wall_seconds = memory_mb = 0.0
    budget = job.limits.output_kb << 10  # bytes, for all inputs together
    for text in job.stdin_cases:
        # A run's own limit counts whole kilobytes, and a byte of ours: what it allows too much is found below.
        rest = replace(job, limits=replace(job.limits, output_kb=budget // 1024 + 1))
        stdin = text.encode("utf-8", errors="surrogateescape")
        reading, usage, stdout = _attempt(worker, rest, body, stdin, read_stdio)
        budget -= sum(len(str(result.value).encode()) for result in reading.results)
        if budget < 0:
            reading = Reading(outcome=Outcome.OUTPUT_LIMIT, detail=f"more than {job.limits.output_kb} KB in all")
        cpu_seconds += usage.cpu_seconds
        wall_seconds += usage.wall_seconds
        memory_mb = max(memory_mb, usage.memory_mb)
        if reading.outcome is not Outcome.OK:
            break
        results += reading.results
    return Execution(
        uid=job.uid,
        outcome=reading.outcome,
        results=tuple(results),
        usage=Usage(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mb=memory_mb),
        tier=worker.tier,
        stdout=stdout,
        detail=reading.detail,
    )


def _attempt(
    worker: Worker, job: Job, body: bytes, stdin: bytes | None, read: Callable[..., Reading]
) -> tuple[Reading, Usage, str]:
    """Run until the outcome is the program's own, at most twice more; only infrastructure is tried again."""
    for _ in range(1 + _NUM_RETRIES):
        stdout = ""
        try:
            if job.tests is not None:
                reading, usage, stdout = run_tests(worker, job)
            else:
                finished = worker.run(body, job.limits, stdin, job.profile)
                reading = read(finished, job)
                stdout = finished.shown_stdout
                usage = finished.usage
        except (WorkerDied, OSError) as error:  # such as a lack of descriptors on this host
            reading, usage = Reading(outcome=Outcome.SANDBOX_ERROR, detail=str(error)), Usage()
        if not reading.outcome.is_infrastructure:
            break
        if reading.outcome is Outcome.SANDBOX_ERROR:
            _restart(worker)
    return reading, usage, stdout


def _restart(worker: Worker) -> None:
    """Bring a new zygote up; a shortage that passes must not cost the results at hand. Raises what the last try did."""
    for attempt in range(1, _NUM_STARTS + 1):
        try:
            return worker.restart()
        except (SandboxUnavailable, OSError):
            if attempt == _NUM_STARTS:
                raise
            time.sleep(_PAUSE_SECONDS * attempt)


def open_executor(tier: str = "auto", *, num_workers: int = 1, preload: Sequence[str] = ()) -> LocalExecutor:
    """Return an executor of the tier; `auto` is the best that holds here, never `process`.

    `preload` names the packages besides the standard library that programs may import. Raises ValueError for an
    unknown tier, SandboxUnavailable when the tier does not hold on this machine or a package is missing.
    """
    if tier not in TIERS:
        raise ValueError(f"tier is one of {', '.join(map(repr, TIERS))}; received {tier!r}")
    return TIERS[tier](num_workers=num_workers, preload=preload)


def _open_best(*, num_workers: int, preload: Sequence[str]) -> LocalExecutor:
    zygote_process.find_packages(preload)  # a missing package is no reason to try another tier
    refused: list[str] = []
    for open_tier in (_open_namespaces, _open_landlock):
        try:
            executor = open_tier(num_workers=num_workers, preload=preload)
        except SandboxUnavailable as error:
            refused.append(str(error))
        else:
            executor.notes = tuple(refused)
            return executor
    raise SandboxUnavailable(
        "no tier holds untrusted programs on this machine:\n" + "\n".join(refused) + "\n"
        "(sandbox.tier=process would run them with limits alone; it does not contain a hostile program)"
    )


def _open_namespaces(*, num_workers: int, preload: Sequence[str]) -> LocalExecutor:
    return _open_checked("namespaces", num_workers, preload)


def _open_landlock(*, num_workers: int, preload: Sequence[str]) -> LocalExecutor:
    return _open_checked("landlock", num_workers, preload)


def _open_process(*, num_workers: int, preload: Sequence[str]) -> LocalExecutor:
    warnings.warn(NOT_CONTAINED, stacklevel=3)
    return LocalExecutor("process", num_workers=num_workers, preload=preload)


def _open_checked(tier: str, num_workers: int, preload: Sequence[str]) -> LocalExecutor:
    """Open a tier that has passed the self-check in this process, or passes it now."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    key = (tier, boot.read_text() if boot.exists() else "", os.geteuid(), zygote_process.PYTHON)
    if key not in _held:
        # A worker of its own: what one probe leaves behind, the next must not find.
        with LocalExecutor(tier) as executor:
            failed = [check for check in run_self_check(executor) if not check.held]
        if failed:
            found = "; ".join(f"{check.name}: {check.detail}" for check in failed)
            raise SandboxUnavailable(f"tier {tier!r} does not hold on this machine: {found}")
        _held.add(key)
    return LocalExecutor(tier, num_workers=num_workers, preload=preload)


NOT_CONTAINED = (
    "sandbox tier 'process' does not contain a hostile program: it can read what its user can read, use every system "
    "call, and may reach the network. Do not run model-written code in it where that matters"
)

TIERS: dict[str, Callable[..., LocalExecutor]] = {
    "auto": _open_best,
    "namespaces": _open_namespaces,
    "landlock": _open_landlock,
    "process": _open_process,
}
"""Every tier this version can open, by name; called with `num_workers` and `preload`."""


def _forget_in_fork() -> None:
    for executor in list(_open):
        for worker in executor._workers:
            worker.forget()


os.register_at_fork(after_in_child=_forget_in_fork)
