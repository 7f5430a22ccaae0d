"""Held-out results of one run or two, with 95 % intervals and paired gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coupled.rl.evaluation.held_out import Evaluation, Interval, PassRates, paired_gain
from coupled.rl.report.curves import make_panel
from coupled.rl.report.data import RunRecord, spread
from coupled.rl.report.plots import Series

NUM_ROWS = 60
"""Maximum number of a run's evaluations in the table, evenly spaced."""

UNPAIRED = "not paired"


def held_out_results(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any] | None:
    measured = [evaluation for run in runs for evaluation in run.evaluations]
    if not measured:
        return None
    kinds = [kind for kind in ("sampled", "greedy") if any(getattr(e, kind) for e in measured)]
    rows: list[dict[str, Any]] = []
    remark = ""
    for run, name in zip(runs, names, strict=True):
        label = f"{name}, " if len(runs) > 1 else ""
        shown = spread(range(len(run.evaluations)), NUM_ROWS)
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
            rows.append({"label": f"{label}gain", "cells": cells, "is_gain": True})
    if len(runs) > 1 and all(run.evaluations for run in runs):
        ends = [run.evaluations[-1] for run in runs]
        cells = [_gain(*(getattr(end, kind) for end in ends)) for kind in kinds]
        rows.append({"label": f"gain of {names[1]} over {names[0]}", "cells": cells, "is_gain": True})
        if any(cell == UNPAIRED for row in rows for cell in row["cells"]):
            remark = "Not paired: measured on different problems, so the difference may come from the problems."
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
        f"{rates.num_samples} completions per problem at temperature {rates.temperature:g}. A gain is paired: "
        "both sides have the same problems, so that their difficulty cancels.",
        "columns": [f"{kind} pass@1, %" for kind in kinds],
        "rows": rows,
        "remark": remark,
        "panel": make_panel("Held-out pass@1", "per cent, with 95 % intervals", series, from_zero=True),
    }


def gain_tiles(first: Evaluation, last: Evaluation, whose: str) -> list[dict[str, str]]:
    tiles = []
    for kind in ("sampled", "greedy"):
        before, after = getattr(first, kind), getattr(last, kind)
        if before is None or after is None:
            continue
        gain = _paired(before, after)
        change = f"{100 * before.pass_at_1.mean:.1f} → {100 * after.pass_at_1.mean:.1f} %"
        detail = f"gain {_signed(gain)}" if gain else UNPAIRED
        tiles.append({"label": f"{whose}, {kind}", "value": change, "detail": detail})
    return tiles


def between_tiles(one: Evaluation, other: Evaluation, names: Sequence[str]) -> list[dict[str, str]]:
    tiles = []
    for kind in ("sampled", "greedy"):
        before, after = getattr(one, kind), getattr(other, kind)
        if before is not None and after is not None and (gain := _paired(before, after)) is not None:
            value = f"{100 * gain.mean:+.1f}"
            detail = f"[{100 * gain.low:.1f}, {100 * gain.high:.1f}] points, at the last steps"
            tiles.append({"label": f"{names[1]} over {names[0]}, {kind}", "value": value, "detail": detail})
    return tiles


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
