"""Failures of trainer ranks: which rank failed first, and whether it was lost or failed by itself.

A rank that ends breaks the collectives of all others, so that most failures are consequences. A lost rank (its process
or host is gone, or it does not answer) is a `RankLostError`: resuming the run may succeed. A rank that failed by itself
(a `RankError`) would fail again.

Consequences are recognised by the type of the exception. Only gloo raises a plain `RuntimeError` for a lost connection:
its message is examined where the exception was raised inside of torch.distributed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from coupled.rl.errors import CoupledError, RankError, RankLostError
from coupled.rl.trainer.rank_protocol import RankHandle, RankReport, done_key, error_key

POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0
"""Limit on the time until ranks leave on request, and until a failed rank is seen to have ended."""
SETTLE_SECONDS = 1.0
"""Time to search, among ranks that ended, for one that did not end because of another rank."""

CONNECTION_ERRORS = (
    dist.DistNetworkError,
    dist.DistBackendError,
    dist.DistStoreError,
    ConnectionError,
    TimeoutError,
)
CONNECTION_WORDS = ("connection", "gloo", "nccl", "broken pipe", "timed out")
TORCH = f"{Path(torch.__file__).parent}{os.sep}"

Result = TypeVar("Result")


def is_of_connections(error: BaseException) -> bool:
    """True if a collective or the store failed because another rank is absent or late; False for any other failure."""
    if isinstance(error, CONNECTION_ERRORS):
        return True
    if type(error) is not RuntimeError or not was_raised_in_distributed(error):
        return False
    text = str(error).lower()
    return any(word in text for word in CONNECTION_WORDS)


def was_raised_in_distributed(error: BaseException) -> bool:
    """True if torch.distributed is among the innermost frames of the traceback, before any frame outside of torch."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not file.startswith(TORCH):
            return False
        if file.startswith(f"{TORCH}distributed{os.sep}"):
            return True
    return False


def report_of(error: BaseException) -> RankReport:
    """The report of a rank about the exception that ends it."""
    return RankReport(text=f"{type(error).__name__}: {error}", is_of_connections=is_of_connections(error))


class RankFailures:
    """Turns a failed collective, or a rank that has ended, into an error that names the rank at fault.

    Args:
        handles: the other ranks; the list may still grow.
        store: where ranks report their exceptions and finished calls.
        timeout_seconds: the deadline of collectives, for messages.
    """

    def __init__(self, handles: list[RankHandle], store: dist.Store, timeout_seconds: float) -> None:
        self._handles = handles
        self._store = store
        self.timeout_seconds = timeout_seconds

    def guarded(self, method: str, number: int, run: Callable[[], Result]) -> Result:
        """The result of `run`, this process's part of call number `number`.

        Raises:
            RankLostError: a rank was lost, or the ranks waited for each other for too long.
            RankError: a rank has failed by itself.
            Exception: any error of `run` that is not a consequence of another rank's end.
        """
        try:
            return run()
        except (CoupledError, OSError):
            raise
        except Exception as error:  # collectives raise many types
            is_lost = is_of_connections(error)
            has_expired = is_lost and any(word in str(error).lower() for word in ("timed out", "timeout"))
            # A rank that ends closes its connections first: its end may be seen a moment later.
            deadline = time.monotonic() + (GRACE_SECONDS if is_lost and not has_expired else 0)
            self.refuse_ended(method, error)
            while time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                self.refuse_ended(method, error)
            if has_expired:
                raise self._late(method, number) from error
            if is_lost:
                raise RankLostError(
                    f"the trainer's ranks lost each other in {method!r}, and all of them still run: {error}. If the "
                    "network works, continue with resume=auto"
                ) from error
            raise

    def refuse_ended(self, method: str, cause: BaseException | None = None) -> None:
        """Return if all ranks run.

        Raises:
            RankLostError: a rank was lost.
            RankError: a rank has failed by itself.
        """
        if all(handle.ended() is None for handle in self._handles):
            return
        # A rank that loses a connection ends as well: look for the one that was first.
        deadline = time.monotonic() + SETTLE_SECONDS
        while (found := self._first_failed()) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        first = found or next(handle for handle in self._handles if handle.ended() is not None)
        end, report = first.ended(), self._report(first)
        assert end is not None
        reason = "" if report is None else f": {report.text}"
        found_in = f"Its output is in {first.log}."
        text = f"rank {first.rank} of the trainer ended with {end.how} in {method!r}{reason}. {found_in}"
        if end.is_lost or (report is not None and report.is_of_connections):
            raise RankLostError(f"{text} Continue with resume=auto") from cause
        raise RankError(f"{text} Fix the cause, then continue with resume=auto") from cause

    def _late(self, method: str, number: int) -> RankLostError:
        late = [handle for handle in self._handles if not self._store.check([done_key(number, handle.rank)])]
        return RankLostError(
            f"the trainer's ranks waited {self.timeout_seconds:g} s for each other in {method!r}; not done: "
            f"{', '.join(f'rank {handle.rank} ({handle.log})' for handle in late)}. If one of them is only slow, raise "
            "cluster.trainer_timeout_seconds; then continue with resume=auto"
        )

    def _first_failed(self) -> RankHandle | None:
        """A rank that ended without a report, or with one that is not the loss of another rank."""
        for handle in self._handles:
            if handle.ended() is not None and (
                (report := self._report(handle)) is None or not report.is_of_connections
            ):
                return handle
        return None

    def _report(self, handle: RankHandle) -> RankReport | None:
        """The exception of an ended rank, if it is known. Its own report knows where the exception was raised."""
        key, end = error_key(handle.rank), handle.ended()
        if self._store.check([key]):
            return RankReport.decoded(self._store.get(key))
        return None if end is None else end.report


# --- collectives that would wait for a rank that is gone ------------------------------------------------------------


def abort_when_one_ends(
    handles: Sequence[RankHandle], has_closed: threading.Event, abort: Callable[[RankHandle], None]
) -> None:
    """Wait until a rank has ended, or the group has closed, and let collectives fail in the first case.

    The end of a process breaks gloo's connections, but NCCL's kernels go on waiting for it, and gloo goes on waiting
    for a host that falls silent.
    """
    while not has_closed.wait(POLL_SECONDS):
        for handle in handles:
            if handle.ended() is not None:
                abort(handle)
                return


def abort_collectives(here: str, has_closed: threading.Event, lost: RankHandle) -> None:
    """Let the collectives of this process, on host `here`, fail now that a rank has ended."""
    if dist.is_initialized() and dist.group.WORLD is not None:
        dist.group.WORLD.abort()  # NCCL's
    end = lost.ended()
    is_silent = lost.host != here and end is not None and end.is_lost and not has_closed.wait(GRACE_SECONDS)
    if is_silent:
        cut_connections(lost.host)


def cut_connections(address: str) -> None:
    """Shut this process's TCP connections to a host that is gone, so that reads from it fail at once.

    gloo has no other interface for this. Ray's connections to that host are shut as well; they are dead.
    """
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if not stat.S_ISSOCK(entry.stat().st_mode):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and connection.getpeername()[0].removeprefix("::ffff:") == address:
                    connection.shutdown(socket.SHUT_RDWR)
