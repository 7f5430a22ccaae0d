"""The log events.jsonl: events of batches and workers, in order."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

FILE = "events.jsonl"
RESULTS = ("rolled", "scored")
"""Events that report finished work."""


class EventLog:
    """Holds events until its folder is known (`bind`), and then appends them to the file.

    Events that cannot be written, because the disk is full, are left out: a failing log does not end a run.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        self.on_result: Callable[[], None] = lambda: None
        """Called at every event of `RESULTS`."""
        self._lock = threading.Lock()

    def bind(self, folder: Path) -> None:
        """Write to `folder/events.jsonl`."""
        with self._lock, contextlib.suppress(OSError):
            self._file = (folder / FILE).open("a")
            self._file.writelines(self._waiting)
            self._file.flush()
            self._waiting = []

    def emit(self, event: str, **facts: Any) -> None:
        """Add an event. Example: `emit("start", key=key, worker="roll-0#1", version=3)`."""
        if event in RESULTS:
            self.on_result()
        plain = {name: fact if isinstance(fact, (int, float, str)) else _plain(fact) for name, fact in facts.items()}
        line = json.dumps({"time": round(time.time(), 3), "event": event, **plain}) + "\n"
        with self._lock, contextlib.suppress(OSError, ValueError):  # a closed file is a ValueError
            if self._file is None:
                self._waiting.append(line)
            else:
                self._file.write(line)
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with self._lock, contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


def _plain(fact: Any) -> Any:
    return list(fact) if isinstance(fact, (list, tuple)) else str(fact)
