"""Ends this process, to be resumed, when nothing in it has moved for too long.

Workers that hang are the coordinator's business. What hangs here (a kernel, a collective, a file system, a lock of a
library) cannot be interrupted from inside; what was committed is kept, and the exit status asks for a resumption.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from coupled.rl.cluster.types import HEALTH, ClusterError
from coupled.rl.recipe.cluster import Cluster

FILE = "stalled.txt"
TICKS = 20
"""Looks in the time that is allowed. Silence is counted in looks: a process that was stopped itself has not hung."""
STATE_SECONDS = 5.0
"""How long it may take to ask what the workers do, and to write it down: who answers may be what hangs."""
PATIENCE_WITH_FILES = 4 * 3600.0
"""More seconds for what reads or writes many gigabytes, or a stream from far away."""


def stall_seconds(cluster: Cluster) -> float:
    """So much silence ends the process; coordinator and ranks, which can say more of it, notice it before that."""
    waits = [HEALTH[cluster.health].stall_seconds]
    if cluster.trainer_ranks > 1:
        waits.append(cluster.trainer_timeout_seconds)
    return 1.5 * max(waits)


class Watchdog:
    """Counts the seconds since something moved, from `start` to `close`.

    Args:
        seconds: so much silence is too much; a `phase` may be allowed more.
        folder: where the stacks of all threads are written to when it is.
        state: says in a line what workers have and who is waited for.
    """

    def __init__(
        self,
        seconds: float,
        folder: Path,
        *,
        state: Callable[[], str] = lambda: "",
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._seconds = seconds
        self._folder = folder
        self._state = state
        self._end = end
        self._phases: list[tuple[str, float]] = [("the run", 0.0)]
        self._silence = 0.0
        self._has_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def close(self) -> None:
        """Watch no more. Harmless when repeated, and when it never began."""
        self._has_closed.set()

    def moved(self) -> None:
        """Something was done: the count begins anew."""
        self._silence = 0.0

    @contextmanager
    def phase(self, name: str, more_seconds: float = 0.0) -> Iterator[None]:
        """What the process is doing, for the message; it may be silent for `more_seconds` more than usually."""
        self._phases.append((name, more_seconds))
        self.moved()
        try:
            yield
        finally:
            self._phases.pop()
            self.moved()

    def _watch(self) -> None:
        interval = self._seconds / TICKS
        while not self._has_closed.wait(interval):
            self._silence += interval
            name, more_seconds = self._phases[-1]
            if self._silence > self._seconds + more_seconds:
                self._give_up(name)
                return

    def _give_up(self, name: str) -> None:
        found: list[str] = []
        _try(lambda: found.append(self._state()))
        state = f"{found[0]}. " if found and found[0] else ""
        said = (
            f"error: nothing has moved in {name!r} for {self._silence:.0f} s. {state}The stacks of all threads are in "
            f"{self._folder / FILE}. What was committed is kept: continue with resume=auto"
        )
        _try(lambda: print(said, file=sys.stderr, flush=True))
        _try(lambda: self._write(said))
        self._end(ClusterError.exit_code)

    def _write(self, said: str) -> None:
        with contextlib.suppress(OSError), (self._folder / FILE).open("w") as file:
            print(said, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)


def _try(do: Callable[[], None]) -> None:
    """Give something a few seconds: it may never return, where a lock or a file system is what hangs."""
    tries = threading.Thread(target=do, daemon=True)
    tries.start()
    tries.join(STATE_SECONDS)
