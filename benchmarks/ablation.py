"""Estimators against each other on the embedded model: equal rollouts, equal updates, several seeds.

    python benchmarks/ablation.py --runs /tmp/ablation --seeds 0 1 2 3 4 --jobs 2
    python benchmarks/ablation.py --runs /tmp/ablation --seeds 0 1 2 3 4 --jobs 0    # the page, from what is there

Each run is one `coupled train recipes/quickstart.yaml` in a process of its own, with one thread and with `COMMON` and
its arm's settings. A run that is finished is not run again, and one that was killed continues. Writes
docs/results/ablation.json and .md and, with matplotlib (pip install -e '.[bench]'), .svg.

All arms of a seed start from the same weights and see the same prompts in the same order, and the held-out problems and
the random numbers of their completions are the same for all, so differences are taken seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.arms import Arm as AnyArm
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
from harness.tables import table

COMMON = (
    "num_steps=20",
    "num_threads=1",
    "model.compute_dtype=bfloat16",
    "sandbox.num_workers=1",
    "evaluation.num_samples=2",
)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of Student's t for a mean of n values (n - 1 degrees of freedom)."""


@dataclass(frozen=True, kw_only=True)
class Arm(AnyArm):
    """One setting of the recipe. `num_views` is how many masked inputs score one completion."""

    part: str
    num_views: int
    settings: tuple[str, ...]


ESTIMATORS, WEIGHTS, QUESTION = "Estimators", "Weights and mask ratio of the coupled estimator", "What makes the gain"
BASE = "coupled"
NO_PAIRS = "estimator.num_pairs=1"
"""The recipe's two pairs taken back, for estimators that have none."""
ONE_MASK = ("estimator.name=full_mask", NO_PAIRS)
ARMS = (
    Arm(name=BASE, part=ESTIMATORS, num_views=5, settings=()),
    Arm(name="decoupled", part=ESTIMATORS, num_views=5, settings=("estimator.name=decoupled",)),
    Arm(name="full_mask", part=ESTIMATORS, num_views=1, settings=ONE_MASK),
    Arm(name="espo", part=ESTIMATORS, num_views=4, settings=("estimator.name=espo",)),
    Arm(name="gdpo", part=ESTIMATORS, num_views=4, settings=("estimator.name=gdpo", "estimator.num_nodes=4", NO_PAIRS)),
    Arm(
        name="trajectory",
        part=ESTIMATORS,
        num_views=5,
        settings=("estimator.name=trajectory", "estimator.shrink=4", NO_PAIRS),
    ),
    Arm(name="normalized", part=WEIGHTS, num_views=5, settings=("estimator.weights=normalized",)),
    Arm(name="antithetic", part=WEIGHTS, num_views=4, settings=("estimator.weights=antithetic",)),
    Arm(name="unit", part=WEIGHTS, num_views=4, settings=("estimator.weights=unit",)),
    Arm(name="t in .05–.95", part=WEIGHTS, num_views=5, settings=("estimator.mask_ratio=[0.05,0.95]",)),
    Arm(name="full_mask, 32 steps", part=QUESTION, num_views=1, settings=(*ONE_MASK, "num_steps=32")),
    Arm(name="coupled, 64", part=QUESTION, num_views=5, settings=("rollout.num_prompts=8",)),
    Arm(name="unit, 64", part=QUESTION, num_views=4, settings=("estimator.weights=unit", "rollout.num_prompts=8")),
    Arm(name="coupled, half rate", part=QUESTION, num_views=5, settings=("optimizer.learning_rate=4e-5",)),
    Arm(
        name="unit, half rate",
        part=QUESTION,
        num_views=4,
        settings=("estimator.weights=unit", "optimizer.learning_rate=4e-5"),
    ),
    Arm(name="coupled, negatives in full", part=QUESTION, num_views=5, settings=("loss.negative_weight=1",)),
    Arm(
        name="unit, negatives in full",
        part=QUESTION,
        num_views=4,
        settings=("estimator.weights=unit", "loss.negative_weight=1"),
    ),
    Arm(name="coupled, one pair", part=QUESTION, num_views=3, settings=("estimator.num_pairs=1",)),
    Arm(
        name="unit, four pairs",
        part=QUESTION,
        num_views=8,
        settings=("estimator.weights=unit", "estimator.num_pairs=4"),
    ),
)


def run_name(arm: Arm, seed: int) -> str:
    """A name that a recipe accepts. Example: "t in .05–.95", 3 → t-in-.05-.95_seed3."""
    return f"{arm.name.replace(', ', '-').replace('–', '-').replace(' ', '-')}_seed{seed}"


def training(arm: Arm, seed: int, runs: Path) -> Training:
    """The training of one arm on one seed."""
    return Training(
        recipe=QUICKSTART, name=run_name(arm, seed), runs=runs, settings=(*COMMON, *arm.settings, f"seed={seed}")
    )


def result_of(arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    """The numbers of one run, from its folder."""
    run = Finished.read(folder)
    result: dict[str, Any] = {
        "arm": arm.name,
        "seed": seed,
        "curve": run.curves(("step", "pass_rate", "kl", "grad_norm")),
        "seconds": run.median_seconds(("rollout", "scoring", "update", "step")),
    }
    for kind in KINDS:
        ends = (run.evaluations[0], run.evaluations[-1])
        result[kind] = [100 * getattr(point, kind).pass_at_1.mean for point in ends]
    return result


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    return statistics.fmean(values), T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def differences(results: Sequence[dict[str, Any]], arm: str, base: str, kind: str) -> list[float]:
    """Held-out pass@1 at the end, arm minus base, in points, for each seed that both have."""
    ends = {(r["arm"], r["seed"]): r[kind][1] for r in results}
    seeds = sorted(seed for name, seed in ends if name == arm and (base, seed) in ends)
    return [ends[arm, seed] - ends[base, seed] for seed in seeds]


def part_table(results: Sequence[dict[str, Any]], part: str) -> list[str]:
    """One part's arms, a line each, with the base arm first."""
    of_kinds = [cell for kind in KINDS for cell in (kind, "gain", "against coupled")]
    rows = []
    base_cost = cost(results, BASE)
    for arm in (a for a in ARMS if a.part == part or a.name == BASE):
        mine = [r for r in results if r["arm"] == arm.name]
        if not mine:
            continue
        cells = [arm.name, str(arm.num_views), str(len(mine))]
        for kind in KINDS:
            cells += [
                _mean_cell([r[kind][1] for r in mine], "{:.1f}"),
                _mean_cell([r[kind][1] - r[kind][0] for r in mine], "{:+.1f}"),
                "" if arm.name == BASE else _difference_cell(differences(results, arm.name, BASE, kind)),
            ]
        cells.append(f"{cost(results, arm.name) / base_cost:.2f}")
        rows.append(cells)
    return table(("arm", "inputs", "seeds", *of_kinds, "update time"), rows)


def cost(results: Sequence[dict[str, Any]], arm: str) -> float:
    """Median over the seeds of the seconds that scoring and update take in a step."""
    return statistics.median(r["seconds"]["scoring"] + r["seconds"]["update"] for r in results if r["arm"] == arm)


def _mean_cell(values: Sequence[float], form: str) -> str:
    mean, half = interval(values)
    return form.format(mean) + (f" ± {half:.1f}" if math.isfinite(half) else "")


def _difference_cell(values: Sequence[float]) -> str:
    """Bold where the 95 % interval leaves 0 out."""
    mean, half = interval(values)
    text = _mean_cell(values, "{:+.1f}")
    return f"**{text}**" if abs(mean) > half else text


def page(report: dict[str, Any], picture: str, reading: str) -> str:
    """docs/results/ablation.md."""
    environment, results = report["environment"], report["results"]
    lines = [
        "# Estimators at equal rollouts and updates",
        "",
        "Made by `benchmarks/ablation.py`; the curves of every run are in [ablation.json](ablation.json).",
        "",
        f"* command: `{environment['command']}`",
        f"* commit of the runs: {report['runs_commit']}",
        f"* hardware: {hardware(environment, gpu='one for each run, no GPU')}",
        f"* recipe: `recipes/quickstart.yaml` with `{' '.join(COMMON)}`, and each arm's settings as listed at the end",
        "",
        reading,
        "",
        "## Numbers",
        "",
        "Held-out pass@1 in per cent: 300 problems, two completions each at the rollout temperature (sampled), one at",
        "temperature 0 (greedy). ± is half of a 95 % interval over the seeds (Student's t). *Against coupled* is the",
        "difference at the end, seed by seed; **bold** where its interval leaves out 0. With so many comparisons about",
        "one in twenty would be bold by chance. *Inputs* is the number of masked inputs that score one completion;",
        "*update time* the time of scoring and update, with coupled as 1.",
    ]
    for part in (ESTIMATORS, WEIGHTS, QUESTION):
        if any(r["arm"] == a.name for r in results for a in ARMS if a.part == part):
            lines += ["", f"### {part}", "", *part_table(results, part)]
    lines += ["", f"![training and held-out results]({picture})", "", "## Settings of the arms", ""]
    lines += [
        f"* {arm.name}: `{' '.join(arm.settings) or '(none)'}`"
        for arm in ARMS
        if any(r["arm"] == arm.name for r in results)
    ]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[dict[str, Any]], to: Path) -> None:
    """Training pass rates, mean over the seeds, and every seed's held-out result."""
    parts = [part for part in (ESTIMATORS, WEIGHTS, QUESTION) if any(_of(results, a) for a in ARMS if a.part == part)]
    figure, axes = pyplot().subplots(len(parts), 2, figsize=(11, 3.8 * len(parts)), squeeze=False)
    for (left, right), part in zip(axes, parts, strict=True):
        arms = [a for a in ARMS if (a.part == part or a.name == BASE) and _of(results, a)]
        for place, arm in enumerate(arms):
            runs = _of(results, arm)
            colour = f"C{place}" if place < 10 else "black"
            curves = [_smooth(r["curve"]["pass_rate"]) for r in runs]
            mean = [100 * statistics.fmean(points) for points in zip(*curves, strict=True)]
            left.plot(range(1, len(mean) + 1), mean, color=colour, label=arm.name)
            for kind, shift, marker in (("sampled", -0.12, "o"), ("greedy", 0.12, "s")):
                ends = [r[kind][1] for r in runs]
                right.plot([place + shift] * len(ends), ends, marker, color=colour, ms=4, alpha=0.5)
                right.plot([place + shift - 0.1, place + shift + 0.1], [statistics.fmean(ends)] * 2, color=colour)
        left.set(xlabel="step", ylabel="training rollouts that pass, mean of 5 steps, %")
        left.set_title(part, fontsize=10)
        left.legend(frameon=False, fontsize=7)
        right.set(ylabel="pass@1, %")
        right.set_title("held out at the end: ○ sampled, □ greedy", fontsize=10)
        right.set_xticks(range(len(arms)), [a.name for a in arms], rotation=25, ha="right", fontsize=7)
    save_figure(figure, to)


def _of(results: Sequence[dict[str, Any]], arm: Arm) -> list[dict[str, Any]]:
    return [r for r in results if r["arm"] == arm.name]


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Mean of each value and those before it, at most `width`."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def main() -> None:
    parser = short_help(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="where the run folders go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", help="names of arms; all of them if none are given")
    parser.add_argument("--reading", type=Path, help="Markdown that goes above the tables")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time; 0 only makes the page")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in ARMS if not arguments.arms or arm.name in arguments.arms]
    commit_file = arguments.runs / "commit"
    if arguments.jobs:
        commit_file.write_text(environment()["commit"])
        # Seed by seed: what is there when it is interrupted can be compared.
        todo = [training(arm, seed, arguments.runs) for seed in arguments.seeds for arm in arms]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(Training.train_quietly, [each for each in todo if not each.is_evaluated]))
    there = [(arm, seed, training(arm, seed, arguments.runs)) for arm in ARMS for seed in arguments.seeds]
    results = [result_of(arm, seed, run.folder) for arm, seed, run in there if run.is_evaluated]
    report = {"environment": environment(), "runs_commit": commit_file.read_text().strip(), "results": results}
    reading = arguments.reading.read_text().strip() if arguments.reading else ""
    picture = arguments.out.with_suffix(".svg")
    write_report(report, arguments.out, lambda report: page(report, picture.name, reading), indent=None)
    print(f"wrote {arguments.out} from {len(results)} runs")
    draw_if_possible(draw, results, picture)


if __name__ == "__main__":
    main()
