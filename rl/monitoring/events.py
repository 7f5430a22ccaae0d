"""events.jsonl: what became of every batch and of every worker, in the order in which it happened."""

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
"""Events that say that work was done."""


class EventLog:
    """Keeps events until it knows its folder, and appends them from then on.

    A log is not worth a run: what cannot be written, because the disk is full, is left out.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        self.on_result: Callable[[], None] = lambda: None
        """Called when a worker has come to something."""
        self._lock = threading.Lock()

    def bind(self, folder: Path) -> None:
        """Write to `folder/events.jsonl`."""
        with self._lock, contextlib.suppress(OSError):
            self._file = (folder / FILE).open("a")
            self._file.writelines(self._waiting)
            self._file.flush()
            self._waiting = []

    def tell(self, event: str, **facts: Any) -> None:
        """Add an event. Example: `tell("start", key=key, worker="roll-0#1", version=3)`."""
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
        """Nothing is written any more."""
        with self._lock, contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


def _plain(fact: Any) -> Any:
    return list(fact) if isinstance(fact, (list, tuple)) else str(fact)
