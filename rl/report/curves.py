"""The curves of a report: metrics of each plot, with descriptions."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coupled.rl.report.data import RunRecord
from coupled.rl.report.plots import Drawing, Series, draw, thin
from coupled.rl.report.sample import denoising_orders


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One plot of the metrics that `names` match; a name that ends in * matches by prefix."""

    title: str
    about: str
    names: tuple[str, ...]
    is_stacked: bool = False
    from_zero: bool = False


GROUPS: tuple[tuple[str, tuple[Curve, ...]], ...] = (
    (
        "Reward",
        (
            Curve(
                title="Reward",
                about="mean of the step's completions: the weighted sum, and each function before its weight",
                names=("reward", "reward/*"),
            ),
            Curve(
                title="Pass rate",
                about="share of completions that pass all tests",
                names=("pass_rate",),
                from_zero=True,
            ),
            Curve(
                title="Groups without a gradient",
                about="share of groups whose advantages are all zero",
                names=("zero_advantage_groups",),
                from_zero=True,
            ),
            Curve(
                title="Spread of the reward",
                about="standard deviation within a group",
                names=("reward_std",),
                from_zero=True,
            ),
            Curve(
                title="Groups left out",
                about="by the recipe's group filter",
                names=("dropped_groups", "dropped_groups/*"),
                from_zero=True,
            ),
        ),
    ),
    (
        "Update",
        (
            Curve(title="KL to the reference", about="nats per token", names=("kl",)),
            Curve(title="Clipped tokens", about="share of tokens, by side", names=("clip_fraction_*",), from_zero=True),
            Curve(title="Ratio", about="mean probability of a token, new over old", names=("ratio",)),
            Curve(title="Loss", about="of the policy; its level carries little information", names=("loss",)),
            Curve(title="Gradient norm", about="before clipping", names=("grad_norm",), from_zero=True),
            Curve(title="Learning rate", about="as scheduled", names=("learning_rate",), from_zero=True),
        ),
    ),
    (
        "Completions",
        (
            Curve(
                title="Diversity",
                about="distinct completions of a group, as a share of its size",
                names=("group_diversity",),
                from_zero=True,
            ),
            Curve(title="Entropy", about="nats per token, when it is committed", names=("entropy",), from_zero=True),
            Curve(title="Length", about="tokens of a completion, end token included", names=("completion_length",)),
            Curve(title="Finished", about="share of completions with an end token", names=("end_rate",)),
            Curve(title="Forward passes", about="per completion", names=("num_forwards",)),
            Curve(
                title="Bounds of the rollout",
                about="KL in nats and probability, per completion, that committing at once may cost",
                names=("kl_bound", "fill_bound"),
                from_zero=True,
            ),
            Curve(
                title="Reward against exact rollouts",
                about="difference on a few prompts, and its standard error",
                names=("mismatch/reward", "mismatch/reward_error"),
            ),
            Curve(
                title="Tokens as in exact rollouts",
                about="share of positions, on the same prompts and random numbers",
                names=("mismatch/token_agreement",),
                from_zero=True,
            ),
            Curve(
                title="Doubtful verdicts",
                about="completions without a verdict; share judged where they could forge it (T2)",
                names=("unscored", "weak_verdicts"),
                from_zero=True,
            ),
        ),
    ),
    (
        "Cost",
        (
            Curve(
                title="Time of a step",
                about="seconds by part; other: idle, or outside the parts",
                names=("time/*",),
                is_stacked=True,
                from_zero=True,
            ),
            Curve(
                title="Throughput", about="completion tokens per second", names=("tokens_per_second",), from_zero=True
            ),
            Curve(title="Memory", about="peak so far, MB", names=("memory/*",), from_zero=True),
            Curve(
                title="Programs in the cache",
                about="share that was not run, because the same program had run before",
                names=("cache/hit_rate",),
                from_zero=True,
            ),
        ),
    ),
)

TOTALS = ("time/step_seconds",)
"""Sums of other metrics, which are not drawn as areas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A drawing with its title, description and legend on the page."""

    id: str
    title: str
    about: str
    spoken: str
    lines: tuple[Mapping[str, Any], ...]
    drawing: Drawing
    series: tuple[Series, ...]
    axis: str
    is_stacked: bool

    @property
    def svg(self) -> Any:
        from markupsafe import Markup

        return Markup(self.drawing.svg)

    def data(self) -> dict[str, Any]:
        """Data with which the page shows the values under the pointer."""
        where = self.drawing
        lines = [{"x": _plain(line.x), "y": _plain(line.y)} for line in self.series]
        return {
            "left": where.left,
            "right": where.right,
            "min": where.x_min,
            "max": where.x_max,
            "axis": self.axis,
            "lines": lines,
        }


def curve_groups(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    known = list(dict.fromkeys(name for run in runs for row in run.metrics for name in row if name != "step"))
    taken: set[str] = set()
    groups = []
    for title, curves in GROUPS:
        panels = []
        for curve in curves:
            chosen = [name for pattern in curve.names for name in known if _is_match(pattern, name)]
            chosen = [name for name in dict.fromkeys(chosen) if name not in taken]
            taken |= set(chosen)
            panels += _panels(runs, names, curve, chosen)
        groups.append({"title": title, "anchor": title.lower(), "panels": panels})
    rest = [name for name in known if name not in taken]
    others = [_panels(runs, names, Curve(title=name, about="", names=(name,)), [name]) for name in rest]
    groups.append(
        {"title": "Other metrics", "anchor": "other", "panels": [panel for found in others for panel in found]}
    )
    groups.append({"title": "Denoising", "anchor": "denoising", "panels": _order_panels(runs, names)})
    return [group for group in groups if group["panels"]]


def _panels(runs: Sequence[RunRecord], names: Sequence[str], curve: Curve, metrics: Sequence[str]) -> list[Panel]:
    """One plot of all metrics; for two runs, one plot per metric with a line per run."""
    if len(runs) > 1:
        made = []
        for metric in metrics:
            found = [_series(run, metric, name, i) for i, (run, name) in enumerate(zip(runs, names, strict=True))]
            # Distinguished not only by colour.
            lines = [replace(line, is_dashed=line.colour > 0) for line in found if line]
            is_whole = len(metrics) == 1 or _short(metric) == curve.title.lower()
            title = curve.title if is_whole else f"{curve.title}: {_short(metric)}"
            made.append(make_panel(title, curve.about, lines, from_zero=curve.from_zero))
        return [panel for panel in made if panel]
    shown = [m for m in metrics if not (curve.is_stacked and m in TOTALS)]
    drawn = [line for i, m in enumerate(shown) if (line := _series(runs[0], m, _short(m), i))]
    # Stacked areas need the same steps; a metric that a later version added has fewer.
    is_stacked = curve.is_stacked and len({line.x for line in drawn}) == 1
    is_named = len(curve.names) > 1 or len(drawn) > 1
    panel = make_panel(
        curve.title, curve.about, drawn, is_stacked=is_stacked, from_zero=curve.from_zero, is_named=is_named
    )
    return [panel] if panel else []


def _series(run: RunRecord, metric: str, name: str, place: int) -> Series | None:
    rows = [row for row in run.metrics if isinstance(row.get(metric), (int, float))]
    x, y = thin([float(row["step"]) for row in rows], [float(row[metric]) for row in rows])
    if not any(map(math.isfinite, y)):
        return None
    return Series(name=name, x=x, y=y, colour=place)


def make_panel(
    title: str,
    about: str,
    series: Sequence[Series],
    *,
    axis: str = "step",
    is_stacked: bool = False,
    from_zero: bool = False,
    is_named: bool = True,
) -> Panel | None:
    if not series:
        return None
    drawing = draw(series, x_label=axis, is_stacked=is_stacked, from_zero=from_zero)
    lines = [
        {
            "name": line.name if is_named else f"last {axis}",
            "colour": line.colour,
            "is_dashed": line.is_dashed,
            "last": short_number(_last(line.y)),
        }
        for line in series
    ]
    spoken = "; ".join(
        f"{line.name} from {short_number(_first(line.y))} to {short_number(_last(line.y))}" for line in series
    )
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return Panel(
        id=f"plot-{slug}-{hashlib.sha256(title.encode('utf-8', 'replace')).hexdigest()[:6]}",
        title=title,
        about=about,
        spoken=f"{title} over {axis}: {spoken}",
        lines=tuple(lines),
        drawing=drawing,
        series=tuple(series),
        axis=axis,
        is_stacked=is_stacked,
    )


def _order_panels(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Panel]:
    """Plots of commit time and entropy by position: before and after, or run against run."""
    orders = [
        (i, name, order)
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
        for order in denoising_orders(run)
    ]
    if len(runs) > 1:
        newest = {i: item for i, *_ in orders for item in orders if item[0] == i}
        orders = list(newest.values())
    made = []
    for title, about, field in (
        (
            "Order of denoising",
            "share of the denoising steps that had passed when a position was committed; rising: left to right",
            "commit_share",
        ),
        ("Entropy by position", "nats, of the distribution from which the token was committed", "entropy"),
    ):
        series = [
            Series(
                name=name if len(runs) > 1 else f"step {order.step}",
                x=tuple(float(k + 1) for k in range(len(order.commit_share))),
                y=getattr(order, field),
                colour=place,
            )
            for place, (_, name, order) in enumerate(orders)
        ]
        counts = " and ".join(str(order.num_rollouts) for *_, order in orders)
        made.append(make_panel(title, f"{about} (mean of {counts} rollouts)", series, axis="position", from_zero=True))
    return [panel for panel in made if panel]


def _is_match(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _short(metric: str) -> str:
    """Example: `time/rollout_seconds` is `rollout`."""
    return metric.rpartition("/")[2].removesuffix("_seconds").removeprefix("clip_fraction_").replace("_", " ")


def smoothing(runs: Sequence[RunRecord]) -> str:
    longest = max(len(run.metrics) for run in runs)
    _, points = thin([0.0] * longest, [0.0] * longest)
    if len(points) == longest:
        return ""
    return f"A point is the mean of {math.ceil(longest / len(points))} neighbouring steps in the longest run."


def _first(values: Sequence[float]) -> float:
    return next((value for value in values if math.isfinite(value)), math.nan)


def _last(values: Sequence[float]) -> float:
    return _first(values[::-1])


def short_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _plain(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
