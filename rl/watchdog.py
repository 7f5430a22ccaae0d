"""Ends this process, to be resumed, when nothing in it has moved for too long.

Workers that hang are the coordinator's business. What hangs here (a kernel, a collective, a file system, a lock of a
library) cannot be interrupted from inside; what was committed is kept, and the exit status asks for a resumption.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from coupled.rl.cluster.types import HEALTH, ClusterError
from coupled.rl.recipe import Recipe

FILE = "stalled.txt"
TICKS = 20
"""Looks in the time that is allowed. Silence is counted in looks: a process that was stopped itself has not hung."""
STATE_SECONDS = 5.0
"""How long the question may take what the workers do: who answers it may be what hangs."""


def stall_seconds(recipe: Recipe) -> float:
    """So much silence ends the process; coordinator and ranks, which can say more of it, notice it before that."""
    waits = [HEALTH[recipe.cluster.health].stall_seconds]
    if recipe.cluster.trainer_ranks > 1:
        waits.append(recipe.cluster.trainer_timeout_seconds)
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
        said = (
            f"error: nothing has moved in {name!r} for {self._silence:.0f} s. {self._asked()}The stacks of all threads "
            f"are in {self._folder / FILE}. What was committed is kept: continue with resume=auto"
        )
        print(said, file=sys.stderr, flush=True)
        try:
            with (self._folder / FILE).open("w") as file:
                print(said, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:  # a file system that is gone may be what hangs; the status says enough
            pass
        self._end(ClusterError.exit_code)

    def _asked(self) -> str:
        found: list[str] = []
        asks = threading.Thread(target=lambda: found.append(self._state()), daemon=True)
        asks.start()
        asks.join(STATE_SECONDS)
        return f"{found[0]}. " if found and found[0] else ""
