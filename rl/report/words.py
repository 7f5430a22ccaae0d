"""Texts of a report: recipe, model, machine, progress of the run, and origin of its rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coupled.rl.report.curves import short_number
from coupled.rl.report.data import RunRecord, spread
from coupled.rl.report.held_out import between_tiles, gain_tiles
from coupled.rl.report.sample import Sample

NUM_TABLE_ROWS = 60


def lead(runs: Sequence[RunRecord]) -> str:
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


def tiles(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, str]]:
    tiles = []
    for run, name in zip(runs, names, strict=True):
        whose = f"{name}, held-out" if len(runs) > 1 else "Held-out"
        if len(run.evaluations) > 1:
            tiles += gain_tiles(run.evaluations[0], run.evaluations[-1], whose)
    if len(runs) > 1:
        if all(run.evaluations for run in runs):
            tiles += between_tiles(runs[0].evaluations[-1], runs[1].evaluations[-1], names)
        return tiles
    (run,) = runs
    planned = run.recipe.get("num_steps")
    seconds = [
        row["time/step_seconds"] for row in run.metrics if isinstance(row.get("time/step_seconds"), (int, float))
    ]
    of = f" of {planned}" if isinstance(planned, int) and planned != run.num_steps else ""
    spent = f"{_duration(sum(seconds))} in total, {sum(seconds) / len(seconds):.3g} s each" if seconds else ""
    tiles.append({"label": "Steps", "value": f"{run.num_steps}{of}", "detail": spent})
    wanted = (("Training pass rate", "pass_rate"), ("KL to the reference", "kl"))
    for label, metric in wanted if run.recipe.get("stage") == "rl" else (("Loss", "loss"),):
        values = [float(row[metric]) for row in run.metrics if isinstance(row.get(metric), (int, float))]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            ends = f"last step; first step {short_number(finite[0])}"
            tiles.append({"label": label, "value": short_number(finite[-1]), "detail": ends})
    return tiles


def rollout_words(samples: Sequence[Sample]) -> dict[str, Any] | None:
    items = [item for sample in samples for item in sample.rollouts]
    if not items:
        return None
    total, steps = sum(sample.num_total for sample in samples), max(sample.num_steps for sample in samples)
    if len(items) == total:
        about = f"All {total:,} rollouts of the run{'s' * (len(samples) > 1)}."
    else:
        of_each = " of a run" * (len(samples) > 1)
        about = (
            f"{len(items):,} of {total:,} rollouts, a uniform sample of each of {steps} evenly spaced steps{of_each}; "
            "the same in every report of the run. The rest is in the run folder, in rollouts/*.parquet."
        )
    return {
        "about": about,
        "steps": sorted({item["step"] for item in items}),
        "states": [state for state in ("passed", "failed", "unjudged") if any(i["state"] == state for i in items)],
        "finishes": sorted({item["finish"] for item in items}),
    }


def run_words(run: RunRecord, name: str) -> dict[str, Any]:
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


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, str, str]]:
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


def _table_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)
