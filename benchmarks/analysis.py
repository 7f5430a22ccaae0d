"""The embedded model before and after the quickstart, analysed: docs/results/analysis.{json,md,svg}.

    python benchmarks/analysis.py --runs /tmp/quickstart-runs [--problems 150] [--samples 8] [num_threads=1 ...]

Trains `recipes/quickstart.yaml` into --runs unless a finished run is there (or takes the run of --run), and calls
`coupled analyze` on the model it starts from and on its last checkpoint. `key=value` are settings of the recipe.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, environment

RECIPE = ROOT / "recipes" / "quickstart.yaml"
START = ROOT / "recipes" / "tiny" / "checkpoint"


def trained_run(runs: Path, settings: list[str]) -> Path:
    """The folder of a finished quickstart, trained if there is none."""
    folder = runs / "quickstart-001"
    rows = (folder / "evaluation.jsonl").read_text().splitlines() if (folder / "evaluation.jsonl").is_file() else []
    if len(rows) < 2:
        command = [sys.executable, "-m", "coupled.rl.cli", "train", str(RECIPE), f"output_dir={runs}", "resume=auto"]
        subprocess.run([*command, *settings], check=True)
    return folder


def analyse(run: Path, out: Path, problems: int, samples: int, settings: list[str]) -> dict[str, Any]:
    """`coupled analyze` as a user would call it; returns analysis.json."""
    command = [sys.executable, "-m", "coupled.rl.cli", "analyze", str(START), *settings, "--compare", str(run)]
    command += ["--recipe", str(RECIPE)]
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
        f"* hardware: {environment['cores']} shared cores of an {environment['processor']}, no GPU; "
        f"Python {environment['python']}, torch {environment['torch']}",
        f"* {result['num_problems']} held-out problems, {sweep['num_samples']} completions each (1 at temperature 0), "
        f"canvas {result['canvas']}, {result['denoising_steps']} steps, order `{result['order']}`",
        "",
        "Per cent with 95 % intervals by bootstrap over problems. All points decode the same problems with the same",
        "random numbers, so differences are by problem.",
        "",
        "## What was predicted, and what shows here",
        "",
        "| difference | predicted | found, points | shows |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {claim['text']} | {claim['expected']} | {_cell(claim['difference'], sign=True)} | {claim['shows']} |"
        for claim in result["claims"]
    ]
    lines += [
        "",
        "`yes`: the interval excludes 0 on the predicted side. The best temperature is chosen by looking at the same",
        "numbers, so its interval is somewhat too narrow.",
        "",
        "![curves](analysis.svg)",
        "",
        "## Every point",
        "",
        f"| checkpoint | T | steps | pass@1 | {most} | local AR-ness@1 | global AR-ness@1 | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for checkpoint in result["checkpoints"]:
        for row in checkpoint["points"]:
            cells = [_cell(row[name]) if name in row else "" for name in ("pass@1", most, "local@1", "global@1")]
            lines.append(
                f"| {checkpoint['name']} | {row['temperature']:g} | {row['denoising_steps']} | "
                + " | ".join(cells)
                + f" | {row['tokens_per_second']:.0f} |"
            )
    lines += [
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


def _cell(interval: dict[str, float], *, sign: bool = False) -> str:
    mean = f"{100 * interval['mean']:+.1f}" if sign else f"{100 * interval['mean']:.1f}"
    return f"{mean} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--runs", type=Path, help="where a quickstart is trained, unless a finished one is there")
    which.add_argument("--run", type=Path, help="a run folder of the quickstart")
    parser.add_argument("--problems", type=int, default=150)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("settings", nargs="*", help="key=value settings of the recipe")
    given = parser.parse_args()
    run = trained_run(given.runs, given.settings) if given.run is None else given.run
    result = analyse(run, given.out, given.problems, given.samples, given.settings)
    result["environment"] = environment()
    (given.out / "analysis.json").write_text(json.dumps(result) + "\n")
    (given.out / "analysis.md").write_text(page(result))
    print(f"wrote {given.out / 'analysis.md'}")


if __name__ == "__main__":
    main()
