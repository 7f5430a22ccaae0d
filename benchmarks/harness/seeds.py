"""Runs of `coupled train`, each in a process of its own, continued where they stopped; and their curves."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupled.rl.evaluation.held_out import Evaluation
from coupled.rl.run_folder.folder import read_rows
from harness.report import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
KINDS = ("sampled", "greedy")
"""The two ways in which held-out problems are completed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One `coupled train`: a recipe with settings, in the run folder `runs/NAME-001`.

    Example: `Training(recipe="recipes/quickstart.yaml", name="seed3", runs=Path("/tmp/runs"), settings=("seed=3",))`.
    """

    recipe: str | Path
    name: str
    runs: Path
    settings: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        return self.runs / f"{self.name}-001"

    @property
    def is_evaluated(self) -> bool:
        """Whether the run was evaluated at its start and at its end."""
        evaluations = self.folder / "evaluation.jsonl"
        return evaluations.is_file() and len(read_rows(evaluations)) >= 2

    def train(self) -> None:
        """Train as a user would, or continue; a run that is finished ends at once.

        Raises:
            CalledProcessError: The run failed.
        """
        subprocess.run(self._command(), check=True)

    def train_quietly(self) -> None:
        """The same, with its output in `runs/NAME.log` and one line that says how it ended; it may fail."""
        with (self.runs / f"{self.name}.log").open("w") as log:
            ended = subprocess.run(self._command(), stdout=log, stderr=subprocess.STDOUT, check=False)
        print(f"{self.name}: {'done' if ended.returncode == 0 else f'failed, see {log.name}'}", flush=True)

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "coupled.rl.cli", "train", str(self.recipe)]
        return [*command, f"name={self.name}", f"output_dir={self.runs}", "resume=auto", *self.settings]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The rows of a run's metrics, and its evaluations."""

    rows: list[dict[str, Any]]
    evaluations: list[Evaluation]

    @classmethod
    def read(cls, folder: Path) -> Finished:
        """The records of a run folder."""
        evaluations = [Evaluation.from_row(row) for row in read_rows(folder / "evaluation.jsonl")]
        return cls(rows=read_rows(folder / "metrics.jsonl"), evaluations=evaluations)

    def curves(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Metrics step by step."""
        return {name: [row[name] for row in self.rows] for name in names}

    def median_seconds(self, parts: Sequence[str]) -> dict[str, float]:
        """Seconds that parts of a step take, median over the steps."""
        return {part: statistics.median(row[f"time/{part}_seconds"] for row in self.rows) for part in parts}
