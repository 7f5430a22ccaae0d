"""`coupled report`: one HTML file that says what a run did, how good it became, and what its rollouts look like.

Everything is inside the file: style, script, plots and data. Its content policy forbids the network, and every text
that a model or a user wrote is escaped, by jinja2 in the page and by `_as_script_data` in its data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupled.rl.environment import installed_version
from coupled.rl.errors import DataError
from coupled.rl.evaluate import Evaluation, Interval, PassRates, paired_gain
from coupled.rl.report_data import RunRecord, Sample, denoising_orders, read_run, sample_rollouts, spread
from coupled.rl.report_plots import Drawing, Series, draw, require_matplotlib, thin
from coupled.rl.rundir import atomic_write

PAGE = Path(__file__).with_name("page")
NUM_ROLLOUTS = 300
NUM_TABLE_ROWS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One plot of the metrics that `names` match; a name that ends in * matches what begins so."""

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
                title="Pass rate", about="share of completions that pass all tests", names=("pass_rate",), from_zero=True
            ),
            Curve(
                title="Groups that teach nothing",
                about="share of groups whose advantages are all zero",
                names=("zero_advantage_groups",),
                from_zero=True,
            ),
            Curve(
                title="Spread of the reward", about="standard deviation within a group", names=("reward_std",), from_zero=True
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
            Curve(title="Loss", about="of the policy; its level means little", names=("loss",)),
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
            Curve(
                title="Length", about="tokens of a completion, end token included", names=("completion_length",)
            ),
            Curve(title="Finished", about="share of completions with an end token", names=("end_rate",)),
            Curve(title="Forward passes", about="per completion", names=("num_forwards",)),
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
            ),
            Curve(title="Throughput", about="completion tokens per second", names=("tokens_per_second",), from_zero=True),
            Curve(title="Memory", about="peak so far, MB", names=("memory/*",), from_zero=True),
            Curve(
                title="Programs known already",
                about="share that was not run again, because the same program had been",
                names=("cache/hit_rate",),
                from_zero=True,
            ),
        ),
    ),
)
TOTALS = ("time/step_seconds",)
"""Sums of other metrics: not areas of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A drawing with its words, as the page shows it."""

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
        """What the page needs to point at values."""
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


def write_report(
    run: Path, other: Path | None = None, out: Path | None = None, *, num_rollouts: int = NUM_ROLLOUTS
) -> Path:
    """Write the report of a run, or of two in the same plots, and return its path: by default `run/report.html`.

    Raises:
        CoupledError: a run cannot be read, matplotlib or jinja2 is not installed, or `out` cannot be written.
    """
    require_matplotlib()
    if num_rollouts < 1:
        raise DataError(f"a report shows one rollout or more; received {num_rollouts}")
    runs = [read_run(path) for path in (run, other) if path is not None]
    to = run / "report.html" if out is None else out
    if to.is_dir():
        raise DataError(f"--out names the file to write; {to} is a folder: add a file name, such as {to / 'report.html'}")
    page = render(runs, num_rollouts)
    try:
        atomic_write(to, page)
    except OSError as error:
        raise DataError(f"the report cannot be written to {to} ({error}); name another file with --out") from error
    return to


def render(runs: Sequence[RunRecord], num_rollouts: int = NUM_ROLLOUTS) -> str:
    """The page of one or two runs, in ASCII, so that no reader can mistake its encoding."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    names = run_names(runs)
    held_out = _held_out(runs, names)
    groups = _groups(runs, names)
    shares = [num_rollouts // len(runs) + (i < num_rollouts % len(runs)) for i in range(len(runs))]
    samples = [sample_rollouts(run, share) for run, share in zip(runs, shares, strict=True)]
    panels = [panel for group in groups for panel in group["panels"]]
    if held_out and held_out["panel"]:
        panels.append(held_out["panel"])
    data = {
        "plots": {panel.id: panel.data() for panel in panels},
        "samples": [
            {"name": name, "tasks": sample.tasks, "vocabulary": sample.vocabulary}
            for name, sample in zip(names, samples, strict=True)
        ],
        "rollouts": [{"run": i, **item} for i, sample in enumerate(samples) for item in sample.rollouts],
    }
    script = "\n" + (PAGE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    templates = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = templates.get_template("report.html.j2").render(
        title=" and ".join(names),
        lead=_lead(runs),
        tiles=_tiles(runs, names),
        held_out=held_out,
        groups=groups,
        smoothing=_smoothing(runs),
        rollouts=_rollout_words(samples),
        runs=[_run_words(run, name) for run, name in zip(runs, names, strict=True)],
        differences=_differences(runs),
        version=installed_version("coupled"),
        made_from=" and ".join(str(run.path) for run in runs),
        script_hash=f"sha256-{digest}",
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        data=Markup(_as_script_data(data)),
    )
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """What the page calls the runs: their folders, or longer paths where these are equal."""
    if len({run.name for run in runs}) == len(runs):
        return [run.name for run in runs]
    return [str(run.path) for run in runs] if runs[0].path != runs[-1].path else [f"{run.name} ({i + 1})" for i, run in enumerate(runs)]


# --- curves -------------------------------------------------------------------------------------------------------


def _groups(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Any]]:
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
    groups.append({"title": "Other metrics", "anchor": "other", "panels": [panel for found in others for panel in found]})
    groups.append({"title": "Denoising", "anchor": "denoising", "panels": _order_panels(runs, names)})
    return [group for group in groups if group["panels"]]


def _panels(runs: Sequence[RunRecord], names: Sequence[str], curve: Curve, metrics: Sequence[str]) -> list[Panel]:
    """One plot of all metrics; of two runs, one plot for each, with a line for each run."""
    if len(runs) > 1:
        made = []
        for metric in metrics:
            lines = [_series(run, metric, name, i) for i, (run, name) in enumerate(zip(runs, names, strict=True))]
            title = curve.title if len(metrics) == 1 else f"{curve.title}: {_short(metric)}"
            made.append(_panel(title, curve.about, [s for s in lines if s], from_zero=curve.from_zero))
        return [panel for panel in made if panel]
    shown = [m for m in metrics if not (curve.is_stacked and m in TOTALS)]
    lines = [_series(runs[0], metric, _short(metric), i) for i, metric in enumerate(shown)]
    found = [line for line in lines if line]
    if not found:
        return []
    # Areas on top of each other need the same steps; a metric that came with a later version has fewer.
    is_stacked = curve.is_stacked and len({line.x for line in found}) == 1
    panel = _panel(curve.title, curve.about, found, is_stacked=is_stacked, from_zero=curve.from_zero)
    return [panel] if panel else []


def _series(run: RunRecord, metric: str, name: str, place: int) -> Series | None:
    rows = [row for row in run.metrics if isinstance(row.get(metric), (int, float))]
    x, y = thin([float(row["step"]) for row in rows], [float(row[metric]) for row in rows])
    if not any(map(math.isfinite, y)):
        return None
    return Series(name=name, x=x, y=y, colour=place, is_dashed=False)


def _panel(
    title: str,
    about: str,
    series: Sequence[Series],
    *,
    axis: str = "step",
    is_stacked: bool = False,
    from_zero: bool = False,
) -> Panel | None:
    if not series:
        return None
    drawing = draw(series, x_label=axis, is_stacked=is_stacked, from_zero=from_zero)
    lines = [
        {
            "name": "" if len(series) == 1 and line.name.lower() in title.lower() else line.name,
            "colour": line.colour,
            "is_dashed": line.is_dashed,
            "last": _short_number(_last(line.y)),
        }
        for line in series
    ]
    spoken = "; ".join(
        f"{line.name} from {_short_number(_first(line.y))} to {_short_number(_last(line.y))}" for line in series
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
    """When each position is committed, and how sure the policy then was: before and after, or run against run."""
    orders = [(i, name, order) for i, (run, name) in enumerate(zip(runs, names, strict=True)) for order in denoising_orders(run)]
    if len(runs) > 1:
        newest = {i: item for i, *_ in orders for item in orders if item[0] == i}
        orders = list(newest.values())
    made = []
    for title, about, field in (
        ("Order of denoising", "share of the denoising steps that had passed when a position was committed; rising: left to right", "commit_share"),
        ("Entropy by position", "nats, of the distribution that the token was committed from", "entropy"),
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
        made.append(_panel(title, f"{about} (mean of {counts} rollouts)", series, axis="position", from_zero=True))
    return [panel for panel in made if panel]


def _is_match(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _short(metric: str) -> str:
    """Example: `time/rollout_seconds` is `rollout`."""
    return metric.rpartition("/")[2].removesuffix("_seconds").removeprefix("clip_fraction_").replace("_", " ")


def _smoothing(runs: Sequence[RunRecord]) -> str:
    longest = max(len(run.metrics) for run in runs)
    _, points = thin(range(longest), [0.0] * longest)
    if len(points) == longest:
        return ""
    return f"A point is the mean of {math.ceil(longest / len(points))} neighbouring steps in the longest run."


# --- held-out problems --------------------------------------------------------------------------------------------


def _held_out(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any] | None:
    measured = [evaluation for run in runs for evaluation in run.evaluations]
    if not measured:
        return None
    kinds = [kind for kind in ("sampled", "greedy") if any(getattr(e, kind) for e in measured)]
    rows: list[dict[str, Any]] = []
    remark = ""
    for run, name in zip(runs, names, strict=True):
        label = f"{name}, " if len(runs) > 1 else ""
        shown = spread(range(len(run.evaluations)), NUM_TABLE_ROWS)
        rows += [
            {
                "label": f"{label}step {run.evaluations[i].step}",
                "cells": [_cell(getattr(run.evaluations[i], kind)) for kind in kinds],
                "is_gain": False,
            }
            for i in shown
        ]
        if len(run.evaluations) > 1:
            first, last = run.evaluations[0], run.evaluations[-1]
            cells = [_gain(getattr(first, kind), getattr(last, kind)) for kind in kinds]
            rows.append({"label": f"{label}gain of step {last.step} over {first.step}", "cells": cells, "is_gain": True})
    if len(runs) > 1 and all(run.evaluations for run in runs):
        ends = [run.evaluations[-1] for run in runs]
        cells = [_gain(*(getattr(end, kind) for end in ends)) for kind in kinds]
        rows.append({"label": f"gain of {names[1]} over {names[0]}", "cells": cells, "is_gain": True})
        if any(cell == UNPAIRED for row in rows for cell in row["cells"]):
            remark = "Not paired: the two were measured on different problems, so that their difference may be the problems'."
    rates = measured[0].sampled
    series = [
        Series(
            name=f"{name}, {kind}" if len(runs) > 1 else kind,
            x=tuple(float(e.step) for e in run.evaluations if getattr(e, kind)),
            **_interval_lines([getattr(e, kind).pass_at_1 for e in run.evaluations if getattr(e, kind)]),
            colour=k,
            is_dashed=i > 0,
        )
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
        for k, kind in enumerate(kinds)
        if any(getattr(e, kind) for e in run.evaluations)
    ]
    return {
        "about": f"Pass@1 in per cent with 95 % intervals, by bootstrap over {len(rates.rates)} problems. Sampled: "
        f"{rates.num_samples} completions per problem at temperature {rates.temperature:g}. A gain is paired: the "
        "same problems on both sides, so that their difficulty cancels.",
        "columns": [f"{kind} pass@1, %" for kind in kinds],
        "rows": rows,
        "remark": remark,
        "panel": _panel("Held-out pass@1", "per cent, with 95 % intervals", series, from_zero=True),
    }


UNPAIRED = "not paired"


def _cell(rates: PassRates | None) -> str:
    return "–" if rates is None else str(rates.pass_at_1)


def _gain(before: PassRates | None, after: PassRates | None) -> str:
    if before is None or after is None:
        return "–"
    gain = _paired(before, after)
    return UNPAIRED if gain is None else _signed(gain)


def _paired(before: PassRates, after: PassRates) -> Interval | None:
    return paired_gain(before, after) if before.uids == after.uids else None


def _signed(gain: Interval) -> str:
    return ("+" if gain.mean >= 0 else "") + str(gain)


def _interval_lines(intervals: Sequence[Interval]) -> dict[str, Any]:
    return {
        "y": tuple(100 * interval.mean for interval in intervals),
        "low": tuple(100 * interval.low for interval in intervals),
        "high": tuple(100 * interval.high for interval in intervals),
    }


# --- words --------------------------------------------------------------------------------------------------------


def _lead(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        recipe, newest = run.recipe, run.environment[-1] if run.environment else {}
        model, stage = _get(recipe, "model.path"), _get(recipe, "stage")
        commit = newest.get("commit")
        words = [f"{stage} on {model}", f"seed {_get(recipe, 'seed')}", f"{run.num_steps} steps"]
        words += [f"commit {str(commit)[:9]}"] if commit else []
        words += [_machine(newest)] if newest else []
        parts.append(", ".join(words))
    return "; ".join(dict.fromkeys(parts)) + "."


def _tiles(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, str]]:
    tiles = []
    for run, name in zip(runs, names, strict=True):
        whose = f"{name}: " if len(runs) > 1 else ""
        if len(run.evaluations) > 1:
            tiles += _gain_tiles(run.evaluations[0], run.evaluations[-1], whose)
    if len(runs) > 1:
        if all(run.evaluations for run in runs):
            tiles += _between_tiles(runs[0].evaluations[-1], runs[1].evaluations[-1], names)
        return tiles
    (run,) = runs
    planned = run.recipe.get("num_steps")
    seconds = [row["time/step_seconds"] for row in run.metrics if isinstance(row.get("time/step_seconds"), (int, float))]
    of = f" of {planned}" if isinstance(planned, int) and planned != run.num_steps else ""
    spent = f"{_duration(sum(seconds))} in all, {sum(seconds) / len(seconds):.3g} s each" if seconds else ""
    tiles.append({"label": "Steps", "value": f"{run.num_steps}{of}", "detail": spent})
    for label, metric in (("Training pass rate", "pass_rate"), ("KL to the reference", "kl"), ("Loss", "loss")):
        values = [float(row[metric]) for row in run.metrics if isinstance(row.get(metric), (int, float))]
        finite = [value for value in values if math.isfinite(value)]
        if finite and not (label == "Loss" and run.recipe.get("stage") == "rl"):
            detail = f"first step {_short_number(finite[0])}, best {_short_number(max(finite))}" if metric == "pass_rate" else f"first step {_short_number(finite[0])}"
            tiles.append({"label": f"{label}, last step", "value": _short_number(finite[-1]), "detail": detail})
    return tiles


def _gain_tiles(first: Evaluation, last: Evaluation, whose: str) -> list[dict[str, str]]:
    tiles = []
    for kind in ("sampled", "greedy"):
        before, after = getattr(first, kind), getattr(last, kind)
        if before is None or after is None:
            continue
        gain = _paired(before, after)
        change = f"{100 * before.pass_at_1.mean:.1f} → {100 * after.pass_at_1.mean:.1f} %"
        detail = f"gain {_signed(gain)}" if gain else UNPAIRED
        tiles.append({"label": f"{whose}held-out, {kind}", "value": change, "detail": detail})
    return tiles


def _between_tiles(one: Evaluation, other: Evaluation, names: Sequence[str]) -> list[dict[str, str]]:
    tiles = []
    for kind in ("sampled", "greedy"):
        before, after = getattr(one, kind), getattr(other, kind)
        if before is not None and after is not None and (gain := _paired(before, after)) is not None:
            value = f"{100 * gain.mean:+.1f}"
            detail = f"[{100 * gain.low:.1f}, {100 * gain.high:.1f}] points, at the last steps"
            tiles.append({"label": f"{names[1]} over {names[0]}, {kind}", "value": value, "detail": detail})
    return tiles


def _rollout_words(samples: Sequence[Sample]) -> dict[str, Any] | None:
    items = [item for sample in samples for item in sample.rollouts]
    if not items:
        return None
    total, steps = sum(s.num_total for s in samples), sum(s.num_steps for s in samples)
    about = (
        f"All {total:,} rollouts of the run{'s' * (len(samples) > 1)}."
        if len(items) == total
        else f"{len(items):,} of {total:,} rollouts, a uniform sample of each of {steps} evenly spaced steps; the same "
        "sample whenever the report is made. The rest is in the run folder, in rollouts/*.parquet."
    )
    return {
        "about": about,
        "steps": sorted({item["step"] for item in items}),
        "states": [state for state in ("passed", "failed", "unjudged") if any(i["state"] == state for i in items)],
        "finishes": sorted({item["finish"] for item in items}),
    }


def _run_words(run: RunRecord, name: str) -> dict[str, Any]:
    newest = run.environment[-1] if run.environment else {}
    facts = [
        ("model", f"{_get(run.recipe, 'model.path')}" + (", LoRA" if _get(run.recipe, "model.adapter") else "")),
        ("data", _get(run.recipe, "data.path")),
        ("held-out", _get(run.recipe, "data.eval_path")),
        ("seed", _get(run.recipe, "seed")),
    ]
    if run.recipe.get("stage") == "rl":
        facts += [
            ("batch", f"{_get(run.recipe, 'rollout.num_prompts')} prompts × {_get(run.recipe, 'rollout.group_size')}"),
            (
                "denoising",
                f"{_get(run.recipe, 'rollout.canvas')} tokens in {_get(run.recipe, 'rollout.denoising_steps')} steps, "
                f"temperature {_get(run.recipe, 'rollout.temperature')}",
            ),
            ("estimator", _get(run.recipe, "estimator.name")),
            ("KL weight", _get(run.recipe, "loss.kl_beta")),
        ]
    facts += [("learning rate", _get(run.recipe, "optimizer.learning_rate"))]
    if newest:
        versions = newest.get("versions") or {}
        facts += [
            ("machine", _machine(newest)),
            ("system", newest.get("system")),
            ("python", newest.get("python")),
            ("versions", ", ".join(f"{library} {version}" for library, version in versions.items())),
        ]
    columns = list(dict.fromkeys(key for row in run.metrics for key in row))
    table = [run.metrics[i] for i in spread(range(len(run.metrics)), NUM_TABLE_ROWS)]
    return {
        "name": name,
        "notes": run.notes,
        "facts": [(label, value) for label, value in facts if value not in (None, "")],
        "starts": [
            {
                "started": str(row.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
                "step": row.get("step", ""),
                "commit": _commit(row),
                "command": row.get("command", ""),
            }
            for row in run.environment
        ],
        "recipe": run.recipe_text,
        "columns": columns,
        "table": [[_table_cell(row.get(column)) for column in columns] for row in table],
        "is_every_step": len(table) == len(run.metrics),
    }


def _commit(row: Mapping[str, Any]) -> str:
    if not row.get("commit"):
        return "not in a git checkout"
    return str(row["commit"])[:12] + (" with changes" if row.get("has_uncommitted") else "")


def _machine(environment: Mapping[str, Any]) -> str:
    gpus = environment.get("gpus") or []
    cores = f"{environment.get('num_cores')} cores of {environment.get('processor')}"
    if not gpus:
        return cores
    kinds = dict.fromkeys(gpus)
    return ", ".join(f"{gpus.count(kind)} × {kind}" for kind in kinds) + f", {cores}"


def _differences(runs: Sequence[RunRecord]) -> list[tuple[str, str, str]]:
    if len(runs) < 2:
        return []
    one, other = (_flat(run.recipe) for run in runs)
    keys = [key for key in dict.fromkeys((*one, *other)) if one.get(key) != other.get(key) and key != "output_dir"]
    return [(key, str(one.get(key, "–")), str(other.get(key, "–"))) for key in keys]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _get(settings: Mapping[str, Any], path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _first(values: Sequence[float]) -> float:
    return next((value for value in values if math.isfinite(value)), math.nan)


def _last(values: Sequence[float]) -> float:
    return _first(values[::-1])


def _short_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _table_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def _plain(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _as_script_data(data: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: no text in it can close the element or begin a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
