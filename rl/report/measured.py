"""Results of `coupled eval` and `coupled analyze` in a run folder: benchmark scores and decoding order."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coupled.rl.evaluation.statistics import Interval
from coupled.rl.report.data import RunRecord

ANALYSIS = Path("analysis") / "analysis.json"


def benchmark_results(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any] | None:
    """Table of every finished evaluation below the runs' `evaluations/`; None when there is none."""
    rows: list[dict[str, Any]] = []
    damaged: list[str] = []
    for run, name in zip(runs, names, strict=True):
        for path in sorted((run.path / "evaluations").rglob("score.json")):
            try:
                rows += _score_rows(json.loads(path.read_text()), path, f"{name}, " if len(runs) > 1 else "")
            except (ValueError, KeyError, TypeError, AttributeError, OSError):
                damaged.append(str(path.relative_to(run.path)))
    if not rows and not damaged:
        return None
    return {
        "rows": rows,
        "remark": f"Left out, because it cannot be read: {', '.join(damaged)}." if damaged else "",
    }


def analyses(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    """Analyses of the runs: figures as data URLs, and predicted and measured differences."""
    found = []
    for run, name in zip(runs, names, strict=True):
        path = run.path / ANALYSIS
        if not path.is_file():
            continue
        try:
            result = json.loads(path.read_text())
            found.append(
                {
                    "name": name,
                    "about": _about(result),
                    "claims": [
                        [claim["text"], claim["expected"], _interval(claim["difference"]), claim["shows"]]
                        for claim in result["claims"]
                    ],
                    "pictures": _pictures(result),
                    "remark": "",
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration, OSError) as error:
            remark = (
                f"{ANALYSIS} is not in this version's format ({type(error).__name__}: {error}): analyse the run again."
            )
            found.append({"name": name, "about": "", "claims": [], "pictures": [], "remark": remark})
    return found


def _score_rows(score: Mapping[str, Any], path: Path, label: str) -> list[dict[str, Any]]:
    settings = f"T {score['temperature']:g}, {score['denoising_steps']} steps, {score['num_samples']} per problem"
    problems = f"{score['num_problems']} of {score['of_problems']}"
    if score["num_weak_verdicts"]:
        problems += ", weak verdicts"
    if score["num_unjudged"]:
        problems += f", {score['num_unjudged']} not judged"
    return [
        {
            "label": f"{label}{Path(score['checkpoint']).name}",
            "cells": [benchmark, measure, _interval(interval), problems, settings],
        }
        for benchmark, measures in score["scores"].items()
        for measure, interval in measures.items()
    ]


def _about(result: Mapping[str, Any]) -> str:
    sweep = result["sweep"]
    return (
        f"{result['num_problems']} problems of {result['problems']}, {sweep['num_samples']} completions each above "
        f"temperature 0, canvas {result['canvas']}, {result['denoising_steps']} steps, order {result['order']}. Points "
        "are decoded with the same random numbers; intervals are 95 %, by bootstrap over problems."
    )


def _interval(row: Mapping[str, float]) -> str:
    return str(Interval(mean=row["mean"], low=row["low"], high=row["high"]))


def _pictures(result: dict[str, Any]) -> list[dict[str, str]]:
    from coupled.rl.evaluation.plots import draw_curves, draw_maps

    pictures = []
    for draw, words in (
        (draw_curves, "Pass rates and AR-ness against temperature, denoising steps and k, and the entropy sink"),
        (draw_maps, "Confidence of masked positions, and the share of completions committed, over step and position"),
    ):
        file = io.BytesIO()
        draw(result, file)
        address = "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
        pictures.append({"address": address, "words": words})
    return pictures
