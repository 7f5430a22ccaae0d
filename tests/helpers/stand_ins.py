"""A worker that executes the given commands, for tests of transports."""

from __future__ import annotations

import os
import signal
import threading
import time


class StandIn:
    """Its hello is its process id."""

    def hello(self) -> int:
        return os.getpid()

    def work(self, order: tuple[object, ...]) -> object:
        """`("sleep", seconds, result)`, `("die",)`, `("raise", text)`, `("size", bytes)` or `("unpicklable",)`."""
        what, *rest = order
        if what == "sleep":
            time.sleep(float(str(rest[0])))
            return rest[1]
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise ZeroDivisionError(rest[0])
        if what == "size":
            assert isinstance(rest[0], bytes)
            return len(rest[0])
        return threading.Lock()
