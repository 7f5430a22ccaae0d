"""Markdown tables, and figures with their range."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def line(cells: Sequence[Any]) -> str:
    """One row. Example: `line(["a", 1])` is "| a | 1 |"."""
    return "| " + " | ".join(map(str, cells)) + " |"


def spread(values: Sequence[float] | None, digits: int = 2) -> str:
    """Median and range. Example: "0.42 (0.38–0.43)"; a dash without values."""
    if not values:
        return "–"
    return ranged(statistics.median(values), min(values), max(values), f".{digits}f")


def ranged(middle: float, low: float, high: float, form: str = ".2f") -> str:
    """Example: "0.42 (0.38–0.43)"."""
    return f"{middle:{form}} ({low:{form}}–{high:{form}})"


def figure(values: Sequence[float]) -> dict[str, float]:
    """Mean, smallest and largest over the seeds."""
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)}


def span(found: Mapping[str, float], form: str = ".2f") -> str:
    """A `figure`. Example: "1.24 (1.20–1.29)"."""
    return ranged(found["mean"], found["low"], found["high"], form)


def percent(mean: float, low: float, high: float, *, has_sign: bool = False) -> str:
    """An interval of shares in per cent. Example: "+12.5 [3.0, 21.4]"."""
    return f"{100 * mean:{'+' if has_sign else ''}.1f} {percent_range(low, high)}"


def percent_range(low: float, high: float) -> str:
    """Example: "[3.0, 21.4]"."""
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def held(is_held: bool) -> str:
    """The word for a bar that a measurement was held against."""
    return "held" if is_held else "MISSED"
