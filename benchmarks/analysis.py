"""The embedded model before and after the quickstart, analysed: docs/results/analysis.{json,md,svg}.

    python benchmarks/analysis.py --runs /tmp/quickstart-runs [--problems 150] [--samples 8] [num_threads=1 ...]

Trains `recipes/quickstart.yaml` into --runs unless a finished run is there (or takes the run of --run), and calls
`coupled analyze` on the model it starts from and on its last checkpoint. `key=value` are settings of the recipe.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.report import RESULTS, ROOT, environment, hardware, short_help, write_report
from harness.seeds import QUICKSTART, Training
from harness.tables import percent, table

START = ROOT / "recipes" / "tiny" / "checkpoint"


def trained_run(runs: Path, settings: list[str]) -> Path:
    """The folder of a finished quickstart, trained if there is none."""
    training = Training(recipe=QUICKSTART, name="quickstart", runs=runs, settings=settings)
    if not training.is_evaluated:
        training.train()
    return training.folder


def analyse(run: Path, out: Path, problems: int, samples: int, settings: list[str]) -> dict[str, Any]:
    """`coupled analyze` as a user would call it; returns analysis.json."""
    command = [sys.executable, "-m", "coupled.rl.cli", "analyze", str(START), *settings, "--compare", str(run)]
    command += ["--recipe", str(QUICKSTART)]
    command += ["--problems", str(problems), "--samples", str(samples), "--out", str(out)]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((out / "analysis.json").read_text())
    trained = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found["run"] = {"name": run.name, "num_steps": trained["step"]}
    return found


def page(result: dict[str, Any]) -> str:
    """docs/results/analysis.md"""
    environment, sweep = result["environment"], result["sweep"]
    most = f"pass@{sweep['num_samples']}"
    lines = [
        "# The embedded model before and after the quickstart",
        "",
        "Made by `benchmarks/analysis.py`, which calls `coupled analyze`; every number, with the maps, is in",
        "[analysis.json](analysis.json). Definitions: [method.md](../method.md).",
        "",
        f"* command: `{environment['command']}`",
        f"* commit: {environment['commit']}; after: {result['run']['num_steps']} steps of the quickstart, one run "
        f"(`{result['run']['name']}`)",
        f"* hardware: {hardware(environment, cores='shared cores')}",
        f"* {result['num_problems']} held-out problems, {sweep['num_samples']} completions each (1 at temperature 0), "
        f"canvas {result['canvas']}, {result['denoising_steps']} steps, order `{result['order']}`",
        "",
        "Per cent with 95 % intervals by bootstrap over problems. All points decode the same problems with the same",
        "random numbers, so differences are by problem.",
        "",
        "## What was predicted, and what shows here",
        "",
        *table(
            ("difference", "predicted", "found, points", "shows"),
            [
                (claim["text"], claim["expected"], percent(**claim["difference"], has_sign=True), claim["shows"])
                for claim in result["claims"]
            ],
        ),
        "",
        "`yes`: the interval excludes 0 on the predicted side. The best temperature is chosen by looking at the same",
        "numbers, so its interval is somewhat too narrow.",
        "",
        "![curves](analysis.svg)",
        "",
        "## Every point",
        "",
        *table(
            ("checkpoint", "T", "steps", "pass@1", most, "local AR-ness@1", "global AR-ness@1", "tokens/s"),
            [point_cells(at["name"], row, most) for at in result["checkpoints"] for row in at["points"]],
        ),
        "",
        "Tokens per second are of rollout alone, on a machine that was busy with other work: compare them within a",
        "checkpoint at most.",
        "",
        "## Where the model is sure, and in which order it writes",
        "",
        "![maps](analysis-maps.svg)",
        "",
        "Left: mean probability of the likeliest token at the positions that are still masked before each step; its",
        "lowest row is the entropy sink. Right: of the completions that reach a position, the share that commit it at",
        "each step.",
    ]
    return "\n".join(lines) + "\n"


def point_cells(name: str, row: dict[str, Any], most: str) -> list[Any]:
    """One temperature of a checkpoint; empty where it was not measured."""
    rates = [percent(**row[key]) if key in row else "" for key in ("pass@1", most, "local@1", "global@1")]
    return [name, f"{row['temperature']:g}", row["denoising_steps"], *rates, f"{row['tokens_per_second']:.0f}"]


def main() -> None:
    parser = short_help(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--runs", type=Path, help="where a quickstart is trained, unless a finished one is there")
    which.add_argument("--run", type=Path, help="a run folder of the quickstart")
    parser.add_argument("--problems", type=int, default=150)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("settings", nargs="*", help="key=value settings of the recipe")
    given = parser.parse_args()
    run = trained_run(given.runs, given.settings) if given.run is None else given.run
    result = analyse(run, given.out, given.problems, given.samples, given.settings)
    result["environment"] = environment()
    write_report(result, given.out / "analysis.json", page, indent=None)
    print(f"wrote {given.out / 'analysis.md'}")


if __name__ == "__main__":
    main()
