"""Ends this process, so that it can be resumed, when it makes no progress for too long.

The coordinator handles workers that hang. A hang of this process (in a kernel, a collective, a file system, a lock of a
library) cannot be interrupted from inside; checkpoints stay intact, and the exit status requests a resumption.
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
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from coupled.rl.cluster.types import HEALTH, ClusterError
from coupled.rl.recipe.cluster import Cluster

FILE = "stalled.txt"
TICKS = 20
"""Checks within the allowed time. Silence is counted in checks: a process that was itself stopped has not hung."""
STATE_SECONDS = 5.0
"""Limit on querying the workers' state and on writing it: the component that answers may be the one that hangs."""
PATIENCE_WITH_FILES = 4 * 3600.0
"""Additional seconds for phases that read or write many gigabytes, or a stream from far away."""


def stall_seconds(cluster: Cluster) -> float:
    """Allowed silence in seconds: longer than the limits of coordinator and ranks, whose errors are more precise."""
    waits = [HEALTH[cluster.health].stall_seconds]
    if cluster.trainer_ranks > 1:
        waits.append(cluster.trainer_timeout_seconds)
    return 1.5 * max(waits)


class Watchdog:
    """Counts the seconds without progress, from `start` to `close`.

    Args:
        seconds: the silence that ends the process; a `phase` may be allowed more.
        folder: the run folder, where the stacks of all threads are written to.
        state: one line about the workers and their unfinished jobs, for the message.
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
        self._hooks: list[RemovableHandle] = []
        self._has_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching, and remove the hooks. Idempotent; harmless before `start`."""
        self._has_closed.set()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def moved(self) -> None:
        """Report progress: the count starts again at 0."""
        self._silence = 0.0

    def beat_on(self, *modules: nn.Module) -> None:
        """Report progress before every forward pass of the modules, until `close`.

        A policy calls `Policy.body` once in every pass, and the module around it in none: hook the body.
        """

        # A function, because copies of a module copy its hooks: a bound method would be copied with its watchdog.
        def beat(module: nn.Module, arguments: Any) -> None:
            self.moved()

        self._hooks += [module.register_forward_pre_hook(beat) for module in modules]

    @contextmanager
    def phase(self, name: str, more_seconds: float = 0.0) -> Iterator[None]:
        """Name what the process does, for the message, and allow it `more_seconds` of silence besides the usual."""
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
        message = (
            f"error: no progress in phase {name!r} for {self._silence:.0f} s. {state}The stacks of all threads are in "
            f"{self._folder / FILE}. Checkpoints are intact: continue with resume=auto"
        )
        _try(lambda: print(message, file=sys.stderr, flush=True))
        _try(lambda: self._write(message))
        self._end(ClusterError.exit_code)

    def _write(self, message: str) -> None:
        with contextlib.suppress(OSError), (self._folder / FILE).open("w") as file:
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)


def _try(do: Callable[[], None]) -> None:
    """Run something for `STATE_SECONDS` at most: it may never return, where a lock or a file system is what hangs."""
    tries = threading.Thread(target=do, daemon=True)
    tries.start()
    tries.join(STATE_SECONDS)
