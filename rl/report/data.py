"""Contents of a run folder for a report: recipe, environment, metrics, held-out results, and doubts about them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from coupled.rl.errors import DataError, nearest
from coupled.rl.evaluation.held_out import Evaluation
from coupled.rl.run_folder.folder import ENVIRONMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Contents of a run folder. `notes` state what a reader must know before trusting its numbers."""

    path: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: tuple[Mapping[str, Any], ...]
    """One row per start or resumption; empty for runs of earlier versions."""
    metrics: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def num_steps(self) -> int:
        """Number of finished steps."""
        return int(self.metrics[-1]["step"])


def read_run(path: Path) -> RunRecord:
    """Read a run folder; damaged lines are left out and noted.

    Raises:
        CoupledError: no such folder, not a run, or not one finished step.
    """
    if not path.is_dir():
        parent = path.parent
        runs = [p.name for p in parent.iterdir() if (p / "recipe.yaml").is_file()] if parent.is_dir() else []
        raise DataError(f"no run folder at {path}" + (f"; {nearest(path.name, runs)}" if runs else ""))
    if not (path / "recipe.yaml").is_file():
        hint = "; it is a checkpoint: name the run folder that holds it" if (path / "config.json").is_file() else ""
        raise DataError(f"{path} holds no recipe.yaml, so it is not a run folder{hint}")
    notes: list[str] = []
    metrics = [row for row in _rows(path, "metrics.jsonl", notes) if isinstance(row.get("step"), int)]
    if not metrics:
        raise DataError(
            f"{path} has no finished step, so there is nothing to report: continue the run with resume={path}"
        )
    text = (path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError:
        recipe = None
    if not isinstance(recipe, dict):
        raise DataError(
            f"{path / 'recipe.yaml'} is not a mapping of settings: it was changed after the run; restore it"
        )
    evaluations = _evaluations(_rows(path, "evaluation.jsonl", notes), notes)
    environment = tuple(_rows(path, ENVIRONMENT, notes))
    notes = [*_doubts(recipe, metrics, evaluations, environment), *notes]
    return RunRecord(
        path=path.resolve(),
        recipe=recipe,
        recipe_text=text,
        environment=environment,
        metrics=tuple(metrics),
        evaluations=evaluations,
        notes=tuple(notes),
    )


def spread(values: Sequence[int], limit: int) -> list[int]:
    """At most `limit` values, evenly spaced, with both ends. Example: `spread([1, 2, 3, 4, 5], 3)` is [1, 3, 5]."""
    if len(values) <= limit:
        return list(values)
    return [values[round(i * (len(values) - 1) / (limit - 1))] for i in range(limit)]


def _rows(run: Path, file: str, notes: list[str]) -> list[dict[str, Any]]:
    path = run / file
    if not path.is_file():
        return []
    rows, damaged = [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in lines[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    damaged += bool(lines[-1])  # without its newline, a number may also have been cut
    if damaged:
        notes.append(
            f"{damaged} damaged line{'s' * (damaged > 1)} of {file} left out: truncated by a crash, or edited."
        )
    return rows


def _evaluations(rows: Sequence[dict[str, Any]], notes: list[str]) -> tuple[Evaluation, ...]:
    found: dict[int, Evaluation] = {}
    for row in rows:
        try:
            evaluation = Evaluation.from_row(row)
        except (KeyError, TypeError, AssertionError):
            notes.append("A row of evaluation.jsonl is not in this version's format and is left out.")
            continue
        found.setdefault(evaluation.step, evaluation)
    return tuple(found[step] for step in sorted(found))


def _doubts(
    recipe: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    environment: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Notes on the reliability of a run's numbers."""
    notes = []
    done, planned = metrics[-1]["step"], recipe.get("num_steps")
    if isinstance(planned, int) and done < planned:
        notes.append(f"Not finished: {done} of {planned} steps.")
    if recipe.get("stage") == "rl" and len({e.step for e in evaluations}) < 2:
        notes.append("No held-out results before and after: the reward shown is measured on training prompts.")
    if len(steps := [e["step"] for e in environment[1:] if isinstance(e.get("step"), int)]) > 0:
        notes.append(f"Resumed after step {', '.join(str(step) for step in steps)}.")
    if len(commits := {str(e.get("commit")) for e in environment}) > 1:
        notes.append(f"Run with {len(commits)} different commits.")
    if any(e.get("has_uncommitted") for e in environment):
        notes.append("The source differed from its commit.")
    if unscored := sum(_number(row, "unscored") for row in metrics):
        notes.append(f"{unscored:.0f} completions had no verdict and were left out of training.")
    weak = [row for row in metrics if _number(row, "weak_verdicts") > 0]
    if weak:
        of = f"{len(weak)} step{'s' * (len(weak) > 1)}"
        notes.append(f"In {of} the verdicts on some programs could have been forged by them (T2).")
    return notes


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name, 0.0)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
