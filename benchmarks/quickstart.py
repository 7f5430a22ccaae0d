"""The quickstart over several seeds: gain, curves, seconds per part, tokens per second, peak memory.

    python benchmarks/quickstart.py --seeds 0 1 2 3 4 --runs /tmp/quickstart-runs

Each seed is one `coupled train recipes/quickstart.yaml seed=N` in a process of its own. Writes
docs/results/quickstart.json and .md and, with matplotlib (pip install -e '.[bench]'), .svg.
A seed whose run folder is finished is not run again.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from harness.report import (
    RESULTS,
    draw_if_possible,
    environment,
    hardware,
    pyplot,
    save_figure,
    short_help,
    write_report,
)
from harness.seeds import KINDS, QUICKSTART, Finished, Training
from harness.tables import percent, percent_range, table

from coupled.rl.evaluation.held_out import paired_gain

PARTS = ("rollout", "sandbox", "scoring", "update", "sync")


def summary(seed: int, folder: Path, seconds: float) -> dict[str, Any]:
    """The numbers of one run, from its folder."""
    run = Finished.read(folder)
    before, after = run.evaluations[0], run.evaluations[-1]
    result: dict[str, Any] = {
        "seed": seed,
        "total_seconds": seconds,
        "median_step_seconds": run.median_seconds((*PARTS, "step")),
        "median_tokens_per_second": statistics.median(row["tokens_per_second"] for row in run.rows),
        "peak_memory_mb": max(row["memory/peak_mb"] for row in run.rows),
        "curve": run.curves(("step", "reward", "pass_rate", "kl")),
        "num_problems": len(before.sampled.rates),
        "num_samples": before.sampled.num_samples,
        "held_out": [],
    }
    for evaluation in run.evaluations:
        point: dict[str, Any] = {"step": evaluation.step}
        for kind in KINDS:
            interval = getattr(evaluation, kind).pass_at_1
            point[kind] = [interval.mean, interval.low, interval.high]
        result["held_out"].append(point)
    for kind in KINDS:
        gain = paired_gain(getattr(before, kind), getattr(after, kind))
        result[f"gain_{kind}"] = [gain.mean, gain.low, gain.high]
    return result


def draw(results: list[dict[str, Any]], to: Path) -> None:
    """Training pass rate and held-out pass@1 of every seed."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.6))
    for colour, result in enumerate(results):
        style = {"color": f"C{colour}", "label": f"seed {result['seed']}"}
        left.plot(result["curve"]["step"], [100 * p for p in result["curve"]["pass_rate"]], **style)
        steps = [point["step"] for point in result["held_out"]]
        right.plot(steps, [100 * p["sampled"][0] for p in result["held_out"]], marker="o", **style)
        right.plot(steps, [100 * p["greedy"][0] for p in result["held_out"]], marker="s", ls="--", color=f"C{colour}")
    left.set(xlabel="step", ylabel="training rollouts that pass, %", title="training")
    right.set(xlabel="step", ylabel="pass@1, %", title="held out: sampled (—) and greedy (--)")
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, to)


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
        f"* hardware: {hardware(environment)}",
        "",
        "Held-out pass@1 in per cent with 95 % intervals, by bootstrap over the "
        f"{seeds[0]['num_problems']} problems; sampled: {seeds[0]['num_samples']} completions",
        "per problem at the rollout temperature. Gains are by problem, on the same random",
        "numbers. No held-out composition of operations occurs in any training stage.",
        "",
        *table(
            ("seed", "sampled before", "after", "gain", "greedy before", "after", "gain"),
            [gain_cells(seed) for seed in seeds],
        ),
        "",
        f"![training and held-out curves]({picture})",
        "",
        "Held-out pass@1 along the way (sampled / greedy):",
        "",
        *table(
            ("seed", *(f"step {point['step']}" for point in seeds[0]["held_out"])),
            [
                (seed["seed"], *(f"{100 * p['sampled'][0]:.1f} / {100 * p['greedy'][0]:.1f}" for p in seed["held_out"]))
                for seed in seeds
            ],
        ),
        "",
        "## Cost",
        "",
        "Wall-clock times of a shared virtual machine do not carry over to another; the split does. Only tokens",
        "of completions count, end token included.",
        "",
        *table(
            (
                "seed",
                "whole command, s",
                "step, s",
                "rollout",
                "sandbox",
                "scoring",
                "update",
                "tokens/s",
                "peak memory, MB",
            ),
            [cost_cells(seed) for seed in seeds],
        ),
    ]
    return "\n".join(lines) + "\n"


def gain_cells(seed: dict[str, Any]) -> list[Any]:
    """Held-out pass@1 of a seed before and after, and its gain."""
    cells = [seed["seed"]]
    for kind in KINDS:
        first, last, (gain, low, high) = seed["held_out"][0][kind], seed["held_out"][-1][kind], seed[f"gain_{kind}"]
        cells += [percent(*first), percent(*last), f"**{100 * gain:+.1f}** {percent_range(low, high)}"]
    return cells


def cost_cells(seed: dict[str, Any]) -> list[Any]:
    """Seconds of a seed, shares of a step, tokens a second and memory."""
    part = seed["median_step_seconds"]
    shares = [f"{100 * part[name] / part['step']:.0f} %" for name in ("rollout", "sandbox", "scoring", "update")]
    rate, memory = seed["median_tokens_per_second"], seed["peak_memory_mb"]
    return [
        seed["seed"],
        f"{seed['total_seconds']:.0f}",
        f"{part['step']:.1f}",
        *shares,
        f"{rate:.0f}",
        f"{memory:.0f}",
    ]


def main() -> None:
    parser = short_help(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--recipe", default=str(QUICKSTART))
    parser.add_argument("--runs", type=Path, required=True, help="where the run folders go")
    parser.add_argument("--out", type=Path, default=RESULTS / "quickstart.json")
    parser.add_argument("overrides", nargs="*", help="key=value settings of the recipe")
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        training = Training(
            recipe=arguments.recipe,
            name=f"seed{seed}",
            runs=arguments.runs,
            settings=(f"seed={seed}", *arguments.overrides),
        )
        started = time.perf_counter()
        training.train()
        seconds = time.perf_counter() - started
        results.append(summary(seed, training.folder, seconds))
        last = results[-1]
        print(
            f"seed {seed}: sampled {100 * last['gain_sampled'][0]:+.1f}, greedy {100 * last['gain_greedy'][0]:+.1f} "
            f"points, {seconds:.0f} s"
        )
    report = {"environment": environment(), "seeds": results}
    picture = arguments.out.with_suffix(".svg")
    write_report(report, arguments.out, lambda report: page(report, picture.name))
    print(f"wrote {arguments.out}")
    draw_if_possible(draw, results, picture)


if __name__ == "__main__":
    main()
