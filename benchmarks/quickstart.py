"""The quickstart over several seeds: gain, curves, seconds per part, tokens per second, peak memory.

    python benchmarks/quickstart.py --seeds 0 1 2 3 4 --runs /tmp/quickstart-runs

Each seed is one `coupled train recipes/quickstart.yaml seed=N` in a process of its own. Writes
docs/results/quickstart.json and .md and, with matplotlib (pip install -e '.[bench]'), .svg.
A seed whose run folder is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import ROOT, environment

from coupled.rl.evaluation.held_out import Evaluation, paired_gain
from coupled.rl.run_folder.folder import read_rows

PARTS = ("rollout", "sandbox", "scoring", "update", "sync")


def run_seed(seed: int, recipe: str, runs: Path, overrides: list[str]) -> float:
    """Train one seed as a user would; returns the wall-clock seconds of the whole command."""
    name = f"seed{seed}"
    command = [sys.executable, "-m", "coupled.rl.cli", "train", recipe, f"seed={seed}", f"name={name}"]
    started = time.perf_counter()
    subprocess.run([*command, f"output_dir={runs}", "resume=auto", *overrides], check=True)
    return time.perf_counter() - started


def summary(seed: int, folder: Path, seconds: float) -> dict[str, Any]:
    """What one run gave, from its folder."""
    rows = read_rows(folder / "metrics.jsonl")
    evaluations = [Evaluation.from_row(row) for row in read_rows(folder / "evaluation.jsonl")]
    before, after = evaluations[0], evaluations[-1]
    result: dict[str, Any] = {
        "seed": seed,
        "total_seconds": seconds,
        "median_step_seconds": {
            part: statistics.median(row[f"time/{part}_seconds"] for row in rows) for part in (*PARTS, "step")
        },
        "median_tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
        "peak_memory_mb": max(row["memory/peak_mb"] for row in rows),
        "curve": {name: [row[name] for row in rows] for name in ("step", "reward", "pass_rate", "kl")},
        "num_problems": len(before.sampled.rates),
        "num_samples": before.sampled.num_samples,
        "held_out": [],
    }
    for evaluation in evaluations:
        point: dict[str, Any] = {"step": evaluation.step}
        for kind in ("sampled", "greedy"):
            rates = getattr(evaluation, kind)
            interval = rates.pass_at_1
            point[kind] = [interval.mean, interval.low, interval.high]
        result["held_out"].append(point)
    for kind in ("sampled", "greedy"):
        gain = paired_gain(getattr(before, kind), getattr(after, kind))
        result[f"gain_{kind}"] = [gain.mean, gain.low, gain.high]
    return result


def draw(results: list[dict[str, Any]], to: Path) -> None:
    """Training pass rate and held-out pass@1 of every seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for colour, result in enumerate(results):
        style = {"color": f"C{colour}", "label": f"seed {result['seed']}"}
        left.plot(result["curve"]["step"], [100 * p for p in result["curve"]["pass_rate"]], **style)
        steps = [point["step"] for point in result["held_out"]]
        right.plot(steps, [100 * p["sampled"][0] for p in result["held_out"]], marker="o", **style)
        right.plot(steps, [100 * p["greedy"][0] for p in result["held_out"]], marker="s", ls="--", color=f"C{colour}")
    left.set(xlabel="step", ylabel="training rollouts that pass, %", title="training")
    right.set(xlabel="step", ylabel="pass@1, %", title="held out: sampled (—) and greedy (--)")
    left.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(to)


def page(report: dict[str, Any], picture: str) -> str:
    """docs/results/quickstart.md: everything measured, with how to measure it again."""
    environment, seeds = report["environment"], report["seeds"]
    lines = [
        "# The quickstart, seed " + ", ".join(str(seed["seed"]) for seed in seeds),
        "",
        "Made by `benchmarks/quickstart.py`; the numbers of every step are in [quickstart.json](quickstart.json).",
        "",
        f"* command: `{environment['command']}`",
        f"* commit: {environment['commit']}",
        f"* hardware: {environment['cores']} cores of an {environment['processor']}, no GPU; "
        f"Python {environment['python']}, torch {environment['torch']}",
        "",
        "Held-out pass@1 in per cent with 95 % intervals, by bootstrap over the "
        f"{seeds[0]['num_problems']} problems; sampled: {seeds[0]['num_samples']} completions",
        "per problem at the rollout temperature. Gains are by problem, on the same random",
        "numbers. No held-out composition of operations occurs in any training stage.",
        "",
        "| seed | sampled before | after | gain | greedy before | after | gain |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        cells = []
        for kind in ("sampled", "greedy"):
            first, last = seed["held_out"][0][kind], seed["held_out"][-1][kind]
            gain = seed[f"gain_{kind}"]
            cells += [_cell(first), _cell(last), f"**{100 * gain[0]:+.1f}** {_range(gain)}"]
        lines.append(f"| {seed['seed']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"![training and held-out curves]({picture})",
        "",
        "Held-out pass@1 along the way (sampled / greedy):",
        "",
        "| seed | " + " | ".join(f"step {point['step']}" for point in seeds[0]["held_out"]) + " |",
        "|---|" + "---|" * len(seeds[0]["held_out"]),
    ]
    for seed in seeds:
        points = [f"{100 * p['sampled'][0]:.1f} / {100 * p['greedy'][0]:.1f}" for p in seed["held_out"]]
        lines.append(f"| {seed['seed']} | " + " | ".join(points) + " |")
    lines += [
        "",
        "## Cost",
        "",
        "Wall-clock times of a shared virtual machine do not carry over to another; the split does. Tokens are",
        "those of completions, end token included.",
        "",
        "| seed | whole command, s | step, s | rollout | sandbox | scoring | update | tokens/s | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        part = seed["median_step_seconds"]
        share = [f"{100 * part[name] / part['step']:.0f} %" for name in ("rollout", "sandbox", "scoring", "update")]
        lines.append(
            f"| {seed['seed']} | {seed['total_seconds']:.0f} | {part['step']:.1f} | "
            + " | ".join(share)
            + f" | {seed['median_tokens_per_second']:.0f} | {seed['peak_memory_mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _cell(interval: list[float]) -> str:
    return f"{100 * interval[0]:.1f} {_range(interval)}"


def _range(interval: list[float]) -> str:
    return f"[{100 * interval[1]:.1f}, {100 * interval[2]:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "quickstart.yaml"))
    parser.add_argument("--runs", type=Path, required=True, help="where the run folders go")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "quickstart.json")
    parser.add_argument("overrides", nargs="*", help="key=value settings of the recipe")
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        seconds = run_seed(seed, arguments.recipe, arguments.runs, arguments.overrides)
        results.append(summary(seed, arguments.runs / f"seed{seed}-001", seconds))
        last = results[-1]
        print(
            f"seed {seed}: sampled {100 * last['gain_sampled'][0]:+.1f}, greedy {100 * last['gain_greedy'][0]:+.1f} "
            f"points, {seconds:.0f} s"
        )
    report = {"environment": environment(), "seeds": results}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(page(report, arguments.out.with_suffix(".svg").name))
    print(f"wrote {arguments.out}")
    try:
        draw(results, arguments.out.with_suffix(".svg"))
    except ImportError:
        print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
