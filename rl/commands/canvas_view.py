"""Live view of the denoising: a canvas that fills in place on a terminal, one text per step in a log."""

from __future__ import annotations

from types import TracebackType

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from coupled.rl.model.policy import Policy


class CanvasView:
    """Shows the canvas after every step. Use as a context manager."""

    def __init__(self, console: Console, *, is_shown: bool = True) -> None:
        self._console = console
        self._is_shown = is_shown
        self._live = Live(console=console, auto_refresh=False) if is_shown and console.is_terminal else None
        self._before: np.ndarray | None = None

    def __enter__(self) -> CanvasView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, policy: Policy, step: int, canvas: np.ndarray) -> None:
        """Show the canvas [C] after a step."""
        if not self._is_shown:
            return
        if self._live is None:
            self._console.print(f"[dim]── step {step} ──[/dim]")
            self._console.print(canvas_text(policy, canvas), markup=False, highlight=False)
            return
        num_masked = int((canvas == policy.mask_id).sum())
        title = f"step {step}, {num_masked} of {len(canvas)} masked"
        self._live.update(Panel(self._styled(policy, canvas), title=title, title_align="left"), refresh=True)
        self._before = canvas.copy()

    def _styled(self, policy: Policy, canvas: np.ndarray) -> Text:
        """The canvas up to the first end token: masked positions dim, tokens of this step bold."""
        text = Text()
        before = np.full_like(canvas, policy.mask_id) if self._before is None else self._before
        for token, old in zip(canvas.tolist(), before.tolist(), strict=True):
            if token in policy.end_ids:
                break
            if token == policy.mask_id:
                text.append("▢", "dim")
            else:
                word = policy.tokenizer.decode([token], skip_special_tokens=True)
                text.append(word, "bold green" if old == policy.mask_id else "")
        return text


def canvas_text(policy: Policy, canvas: np.ndarray) -> str:
    """A canvas [C] as text up to its first end token, with `▢` for positions that are still masked."""
    ends = np.flatnonzero(np.isin(canvas, policy.end_ids))
    shown = canvas[: ends[0]] if len(ends) else canvas
    return "".join(
        "▢" if token == policy.mask_id else policy.tokenizer.decode([int(token)], skip_special_tokens=True)
        for token in shown
    )
