"""The progress display: a live line on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_INTERVAL_SECONDS = 5.0


class Progress:
    """Shows steps done, the latest numbers, and the time left. Use as a context manager."""

    def __init__(self, num_steps: int, done: int, *, title: str, console: Console | None = None) -> None:
        self._console = console or Console(soft_wrap=True)
        self._num_steps = num_steps
        self._first = done
        self._started = time.monotonic()
        self._last_line = float("-inf")
        self._bar: Bar | None = None
        self._console.print(f"[bold]{title}[/bold]" + (f" (resumed after step {done})" if done else ""))
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=num_steps, completed=done, numbers="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show the numbers of a finished step. Example: `update(3, {"reward": 1.25})`."""
        text = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_INTERVAL_SECONDS and step != self._num_steps:
            return
        self._last_line = now
        left = (now - self._started) / max(1, step - self._first) * (self._num_steps - step)
        self._console.print(f"step {step}/{self._num_steps}  {text}  left {left:.0f} s", highlight=False)
