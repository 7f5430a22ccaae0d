"""Plots of a report as inline SVG: a few kilobytes each, sharp in print, in the page's theme colours.

matplotlib draws with stand-in colours, which are then replaced by CSS variables; text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coupled.rl.errors import CoupledError

NUM_SERIES = 6
"""Number of colours in the page's style; further series repeat them."""
NUM_POINTS = 300
"""Maximum number of points of a series; a longer one is drawn as means of neighbouring steps."""
SIZE = (3.8, 1.95)
"""Width and height of a plot in inches; the page scales it to its column."""
_INK, _LINE, _SERIES = "#010201", "#010202", "#01030{}"
_THEME = {_INK: "var(--ink-2)", _LINE: "var(--line)"} | {
    _SERIES.format(i): f"var(--series-{i})" for i in range(NUM_SERIES)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. Example: `Series(name="kl", x=(1, 2), y=(0.0, 0.01))`; NaN is a gap."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    """Lower ends of intervals; empty for a line without."""
    high: tuple[float, ...] = ()
    colour: int = 0
    is_dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """An SVG element and the position of its x axis, from which the page finds the values under the pointer."""

    svg: str
    left: float
    """Left end of the x axis, as a share of the width; `right` likewise."""
    right: float
    x_min: float
    x_max: float


def require_matplotlib() -> None:
    """Raise CoupledError with the install command when the extra `report` is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CoupledError(
            f"a report needs matplotlib and jinja2 ({error}): pip install -c constraints.txt -e '.[report]'"
        ) from error


def draw(
    series: Sequence[Series], *, x_label: str = "step", is_stacked: bool = False, from_zero: bool = False
) -> Drawing:
    """Draw lines over x, or with `is_stacked` stacked areas, whose x must be equal."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "/".join(line.name for line in series),
        "font.size": 8,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.linewidth": 0.8,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE)
        axes: Any = figure.add_axes((0.125, 0.2, 0.855, 0.74))
        if is_stacked:
            heights = [_zeros_for_gaps(line.y) for line in series]
            axes.stackplot(series[0].x, heights, colors=[_colour(line) for line in series], linewidth=0)
        else:
            for line in series:
                _plot(axes, line)
        axes.grid(True, axis="y", color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, pad=4)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(_label)
        axes.yaxis.set_major_formatter(_label)
        axes.set_xlabel(x_label, labelpad=2)
        xs = [x for line in series for x in line.x]
        low, high = min(xs), max(xs)
        margin = (high - low) * 0.02 or 0.5
        axes.set_xlim(low - margin, high + margin)
        if is_stacked or from_zero:
            axes.set_ylim(bottom=0)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        box, limits = axes.get_position(), axes.get_xlim()
    return Drawing(svg=_inline(out.getvalue()), left=box.x0, right=box.x1, x_min=limits[0], x_max=limits[1])


def thin(
    x: Sequence[float], y: Sequence[float], limit: int = NUM_POINTS
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """At most `limit` points: means of equally many neighbours. Example: [1, 2, 3, 4] with limit 2 is [1.5, 3.5]."""
    if len(x) <= limit:
        return tuple(x), tuple(y)
    width = math.ceil(len(x) / limit)
    cuts = [slice(start, start + width) for start in range(0, len(x), width)]
    return tuple(_mean(x[cut]) for cut in cuts), tuple(_mean(y[cut]) for cut in cuts)


def _plot(axes: Any, line: Series) -> None:
    colour = _colour(line)
    dashes: Any = {"linestyle": (0, (4, 2))} if line.is_dashed else {}
    if line.low:
        # Shifted, because intervals of several series at one step would overlap.
        span = (max(line.x) - min(line.x)) or 1.0
        x = [value + 0.008 * span * (line.colour + line.is_dashed) for value in line.x]
        errors = [[y - low for y, low in zip(line.y, line.low, strict=True)]]
        errors += [[high - y for y, high in zip(line.y, line.high, strict=True)]]
        axes.errorbar(x, line.y, yerr=errors, color=colour, linewidth=1.4, marker="o", markersize=4, **dashes)
        return
    # A single point between gaps draws no line.
    is_short = sum(map(math.isfinite, line.y)) < 3
    axes.plot(line.x, line.y, color=colour, linewidth=1.5, marker="o" if is_short else None, markersize=4, **dashes)


def _label(value: float, position: int | None = None) -> str:
    return f"{value:,.6g}"


def _colour(line: Series) -> str:
    return _SERIES.format(line.colour % NUM_SERIES)


def _inline(svg: str) -> str:
    """The SVG element alone, without ids that several plots on a page would share, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for stand_in, variable in _THEME.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(r"\n\s*", "\n", svg)


def _zeros_for_gaps(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else 0.0 for value in values]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
