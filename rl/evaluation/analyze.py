"""`coupled analyze`: decoding order of a checkpoint, effect of temperature and of fewer steps, and of training.

Every point of the sweeps decodes the same problems with the same random numbers, so differences between points and
between checkpoints are paired by problem.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from coupled.reward import Judge, Status
from coupled.rl.data.prompts import render_prompt
from coupled.rl.data.tasks import load_tasks
from coupled.rl.errors import CoupledError, DataError
from coupled.rl.evaluation.benchmarks import Problem, data_file, find_benchmarks, load_problems
from coupled.rl.evaluation.benchmarks.adapters import fenced_program
from coupled.rl.evaluation.benchmarks.run import LIMITS, fingerprint
from coupled.rl.evaluation.benchmarks.types import Benchmark, Prompting
from coupled.rl.evaluation.decoding_order import (
    Heatmap,
    commit_map,
    confidence_map,
    global_arness,
    local_arness,
    order_of,
)
from coupled.rl.evaluation.statistics import Interval, bootstrap, pass_at_k
from coupled.rl.judging.open import open_sandbox
from coupled.rl.model.loading import require_end_token
from coupled.rl.model.open import open_policy, use_threads
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import policy_engine
from coupled.rl.rollout.sampler import Request
from coupled.rl.run_folder.find import find_checkpoint, recipe_for
from coupled.rl.run_folder.folder import atomic_write
from coupled.rl.types import Rollout
from coupled.sandbox import CachedExecutor

Printer = Callable[[str], None]
TEMPERATURES = (0.0, 0.25, 0.5, 1.0, 1.5)
KS = (1, 2, 3, 4, 6, 8)
"""Values of k at which AR-ness@k is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Settings of an analysis.

    Example: 100 problems × 8 samples at five temperatures, and at steps, steps/2 and steps/4.
    """

    num_problems: int = 100
    num_samples: int = 8
    temperatures: tuple[float, ...] = TEMPERATURES
    num_mapped: int = 64
    """Rollouts whose states are all recomputed for the confidence map."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way of decoding all problems; sequences have one entry per problem."""

    temperature: float
    denoising_steps: int
    num_samples: int
    passes: tuple[tuple[bool, ...], ...]
    """Verdicts of the completions that could be judged."""
    local: dict[int, tuple[float, ...]]
    """k → mean local AR-ness@k."""
    global_: dict[int, tuple[float, ...]]
    """k → mean global AR-ness@k."""
    tokens_per_second: float
    """Completion tokens per second of rollout, end tokens included."""
    num_forwards: float
    """Forward passes per completion."""

    def rates(self, k: int = 1) -> list[float]:
        """Unbiased pass@k of each problem."""
        return [pass_at_k(len(each), sum(each), min(k, len(each))) for each in self.passes]

    def as_row(self) -> dict[str, Any]:
        """The point as plain values, with intervals over problems."""
        ks = sorted({k for k in (1, 2, 4, 8, 16) if k <= self.num_samples} | {self.num_samples})
        return {
            "temperature": self.temperature,
            "denoising_steps": self.denoising_steps,
            "num_samples": self.num_samples,
            **{f"pass@{k}": asdict(bootstrap(self.rates(k))) for k in ks},
            **{f"local@{k}": asdict(bootstrap(values)) for k, values in self.local.items()},
            **{f"global@{k}": asdict(bootstrap(values)) for k, values in self.global_.items()},
            "tokens_per_second": round(self.tokens_per_second, 1),
            "num_forwards": round(self.num_forwards, 2),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A difference whose sign the literature predicts, with the measured one."""

    text: str
    expected: str
    """`below 0` or `above 0`."""
    difference: Interval

    @property
    def shows(self) -> str:
        """`yes` or `the opposite` where the 95 % interval excludes 0, else `cannot tell`."""
        low, high = self.difference.low, self.difference.high
        if low <= 0 <= high:
            return "cannot tell"
        return "yes" if (low > 0) == (self.expected == "above 0") else "the opposite"


def analyze(
    paths: Sequence[Path],
    sweep: Sweep,
    recipe_name: str | None,
    overrides: tuple[str, ...],
    *,
    benchmark: str = "",
    data: Path = Path("data"),
    show: Printer = lambda text: None,
) -> dict[str, Any]:
    """Analyse one checkpoint, or two on the same problems: before and after training.

    Raises:
        CoupledError: no checkpoint, no recipe for the sampler, or no problems.
    """
    checkpoints = [find_checkpoint(path) for path in paths]
    # Both are decoded with the same recipe: the given one, else the recipe of the last (trained) checkpoint.
    recipe = recipe_for(checkpoints[-1], recipe_name, overrides)
    use_threads(recipe)
    problems, source = _problems(recipe, sweep, benchmark, data)
    results, points = [], []
    with closing(CachedExecutor(open_sandbox(recipe))) as executor:
        judge = Judge(executor, LIMITS)
        for checkpoint in checkpoints:
            show(f"analysing {checkpoint} on {len(problems)} problems of {source.name}")
            found, row = _analyze_one(checkpoint, recipe, problems, source, sweep, judge, show)
            points.append(found)
            results.append(row)
    full, greatest = recipe.rollout.denoising_steps, sweep.num_samples
    claims = [claim for found in points for claim in temperature_claims(found, full, greatest)]
    claims = [
        replace(claim, text=f"{name}: {claim.text}")
        for name, claim in zip(
            [r["name"] for r in results for _ in range(len(claims) // len(results))], claims, strict=True
        )
    ]
    if len(points) == 2:
        claims += training_claims(points[0], points[1], full, recipe.rollout.temperature)
    return {
        "problems": source.name,
        "num_problems": len(problems),
        "canvas": recipe.rollout.canvas,
        "denoising_steps": full,
        "temperature": recipe.rollout.temperature,
        "order": recipe.rollout.order,
        "sweep": asdict(sweep),
        "checkpoints": results,
        "claims": [{**asdict(claim), "shows": claim.shows} for claim in claims],
    }


def temperature_claims(points: Sequence[Point], full_steps: int, k: int) -> list[Claim]:
    """Temperature lowers AR-ness and raises pass@k: the highest against the lowest that is sampled."""
    sampled = sorted(
        (p for p in points if p.denoising_steps == full_steps and p.temperature > 0), key=lambda p: p.temperature
    )
    if len(sampled) < 2:
        return []
    low, high = sampled[0], sampled[-1]
    best = max(sampled[1:], key=lambda p: float(np.mean(p.rates(k))))
    change = f"temperature {low.temperature:g} → {high.temperature:g}"
    return [
        Claim(text=f"{change}, local AR-ness@1", expected="below 0", difference=_paired(low.local[1], high.local[1])),
        Claim(
            text=f"{change}, global AR-ness@1", expected="below 0", difference=_paired(low.global_[1], high.global_[1])
        ),
        Claim(
            # The best of several is chosen after the fact, so its interval is slightly too narrow; the page notes it.
            text=f"temperature {low.temperature:g} → {best.temperature:g} (the best), pass@{k}",
            expected="above 0",
            difference=_paired(low.rates(k), best.rates(k)),
        ),
    ]


def training_claims(
    before: Sequence[Point], after: Sequence[Point], full_steps: int, temperature: float
) -> list[Claim]:
    """Training lowers AR-ness, and halving the steps costs less after it."""
    claims = []
    for wanted in (0.0, temperature):
        old, new = (_at(points, wanted, full_steps) for points in (before, after))
        label = "greedy" if wanted == 0 else f"temperature {wanted:g}"
        if old is None or new is None:
            continue
        for name, one, two in (("local", old.local, new.local), ("global", old.global_, new.global_)):
            claims.append(
                Claim(
                    text=f"before → after, {label}, {name} AR-ness@1",
                    expected="below 0",
                    difference=_paired(one[1], two[1]),
                )
            )
        for divisor in (2, 4):
            old_fast, new_fast = (_at(points, wanted, full_steps // divisor) for points in (before, after))
            if old_fast is None or new_fast is None:
                continue
            change = np.subtract(new_fast.rates(), new.rates()) - np.subtract(old_fast.rates(), old.rates())
            claims.append(
                Claim(
                    text=f"pass@1 lost by steps/{divisor}, {label}: loss before - loss after",
                    expected="above 0",
                    difference=bootstrap(change.tolist()),
                )
            )
    return claims


def write_analysis(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write analysis.json and, with matplotlib, analysis.svg and analysis-maps.svg; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "analysis.json"]
    atomic_write(written[0], json.dumps(result, indent=1) + "\n")
    try:
        from coupled.rl.evaluation.plots import draw_curves, draw_maps
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        return written
    for draw, name in ((draw_curves, "analysis.svg"), (draw_maps, "analysis-maps.svg")):
        draw(result, folder / name)
        written.append(folder / name)
    return written


def default_out(path: Path) -> Path:
    """`analysis/` in the run folder of a checkpoint, where `coupled report` finds it; else in the working folder."""
    run = find_checkpoint(path).resolve().parent.parent
    return (run if (run / "recipe.yaml").is_file() else Path()) / "analysis"


def point_table(result: dict[str, Any]) -> Table:
    """Table of all points of the sweeps, in per cent with 95 % intervals."""
    most = f"pass@{result['sweep']['num_samples']}"
    title = f"% [95 % interval], {result['num_problems']} problems of {result['problems']}"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in ("checkpoint", "T", "steps", "pass@1", most, "local@1", "global@1", "tokens/s"):
        table.add_column(column, no_wrap=True)
    for checkpoint in result["checkpoints"]:
        for row in checkpoint["points"]:
            cells = [_cell(row.get(name)) for name in ("pass@1", most, "local@1", "global@1")]
            steps, speed = str(row["denoising_steps"]), f"{row['tokens_per_second']:.0f}"
            table.add_row(checkpoint["name"], f"{row['temperature']:g}", steps, *cells, speed)
    return table


def claim_table(result: dict[str, Any]) -> Table:
    """Table of predicted and measured differences, in points."""
    table = Table(box=SIMPLE_HEAD, title="paired differences, points", title_justify="left", pad_edge=False)
    for column in ("difference", "predicted", "found [95 % interval]", "shows"):
        table.add_column(column, overflow="fold")
    for claim in result["claims"]:
        table.add_row(claim["text"], claim["expected"], _cell(claim["difference"]), claim["shows"])
    return table


def _analyze_one(
    checkpoint: Path,
    recipe: Recipe,
    problems: Sequence[Problem],
    source: Benchmark,
    sweep: Sweep,
    judge: Judge,
    show: Printer,
) -> tuple[list[Point], dict[str, Any]]:
    model = recipe.model.model_copy(update={"path": str(checkpoint), "init": "checkpoint", "adapter": None})
    policy = open_policy(model, recipe.seed)
    require_end_token(policy.tokenizer, checkpoint)
    sampler, points = recipe.rollout.sampler, []
    main: list[Rollout] = []
    for temperature, steps in sweep_settings(sweep, sampler):
        here = sampler.changed(
            temperature=temperature, denoising_steps=steps, top_p=sampler.top_p if temperature else 1.0
        )
        point, rollouts = _measure(policy, recipe, problems, source, here, sweep, judge)
        points.append(point)
        if temperature == sampler.temperature and steps == sampler.denoising_steps:
            main = rollouts
        row = point.as_row()
        show(f"  T {temperature:g}, {steps} steps: pass@1 {_cell(row['pass@1'])}, global@1 {_cell(row['global@1'])}")
    steps = sampler.denoising_steps
    spread = [main[i] for i in np.linspace(0, len(main) - 1, min(sweep.num_mapped, len(main))).astype(int)]
    confidence = confidence_map(policy, spread, steps, recipe.rollout.batch_size)
    return points, {
        "name": _name(checkpoint),
        "path": str(checkpoint),
        "fingerprint": fingerprint(checkpoint),
        "points": [point.as_row() for point in points],
        "entropy_sink": _rounded(confidence)[0],
        "confidence": _rounded(confidence),
        "confidence_counts": confidence.counts.tolist(),
        "commit": _rounded(commit_map(main, steps)),
    }


def sweep_settings(sweep: Sweep, sampler: Sampler) -> list[tuple[float, int]]:
    """(temperature, steps) of every point, each once: all temperatures at all steps, and greedy and the sampler's own
    temperature at steps/2 and steps/4."""
    full = sampler.denoising_steps
    settings = [(temperature, full) for temperature in (*sweep.temperatures, sampler.temperature)]
    settings += [
        (temperature, full // divisor)
        for temperature in (0.0, sampler.temperature)
        for divisor in (1, 2, 4)
        if full // divisor >= 1
    ]
    return sorted(set(settings), key=lambda each: (-each[1], each[0]))


def _measure(
    policy: Policy,
    recipe: Recipe,
    problems: Sequence[Problem],
    source: Benchmark,
    sampler: Sampler,
    sweep: Sweep,
    judge: Judge,
) -> tuple[Point, list[Rollout]]:
    num_samples = sweep.num_samples if sampler.temperature else 1
    prompting: Prompting = "chat" if policy.tokenizer.chat_template else "completion"
    texts = [problem.prompt(prompting) for problem in problems]
    texts = [render_prompt(text, policy.tokenizer) if prompting == "chat" else text for text in texts]
    encoded = policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    requests = [
        Request(uid=f"analysis/{problem.task.uid}/{sample}", prompt_ids=tuple(ids))
        for problem, ids in zip(problems, encoded, strict=True)
        for sample in range(num_samples)
    ]
    started = time.perf_counter()
    rollouts = policy_engine(policy, recipe.rollout.batch_size).generate(requests, sampler, seed=sweep.seed)
    seconds = time.perf_counter() - started
    owners = [problem for problem in problems for _ in range(num_samples)]
    programs = [source.program(p, r.text, prompting) for p, r in zip(owners, rollouts, strict=True)]
    judgements = judge.judge_programs([problem.task for problem in owners], programs)
    passes, local, global_ = [], {k: [] for k in KS}, {k: [] for k in KS}  # type: ignore[var-annotated]
    for index in range(len(problems)):
        own = slice(index * num_samples, (index + 1) * num_samples)
        judged = [j for j in judgements[own] if j.status is not Status.INFRA]
        if not judged:
            raise CoupledError(
                f"the sandbox could not run any program of {problems[index].task.uid}: the machine is overloaded. "
                "Lower sandbox.num_workers"
            )
        passes.append(tuple(bool(j.per_test) and all(j.per_test) for j in judged))
        orders = [order_of(rollout) for rollout in rollouts[own]]
        for k in KS:
            local[k].append(float(np.mean([local_arness(order, k) for order in orders])))
            global_[k].append(float(np.mean([global_arness(order, k) for order in orders])))
    point = Point(
        temperature=sampler.temperature,
        denoising_steps=sampler.denoising_steps,
        num_samples=num_samples,
        passes=tuple(passes),
        local={k: tuple(values) for k, values in local.items()},
        global_={k: tuple(values) for k, values in global_.items()},
        tokens_per_second=sum(r.completion_length for r in rollouts) / seconds,
        num_forwards=float(np.mean([r.num_forwards for r in rollouts])),
    )
    return point, rollouts


def _problems(recipe: Recipe, sweep: Sweep, benchmark: str, data: Path) -> tuple[list[Problem], Benchmark]:
    if benchmark:
        (source, *others) = find_benchmarks(benchmark)
        if others:
            raise DataError(f"an analysis covers one benchmark; got {benchmark!r}")
        return load_problems(source, data_file(source, data))[: sweep.num_problems], source
    if recipe.data.eval_path is None:
        raise DataError("the recipe names no held-out problems; give --benchmark, or data.eval_path=FILE")
    tasks = load_tasks(recipe.data, recipe.data.eval_path)[: sweep.num_problems]
    held_out = Benchmark(
        name="the recipe's held-out problems",
        files=(recipe.data.eval_path,),
        download="",
        num_problems=0,
        problem=lambda row: problems[0],
        program=fenced_program,
    )
    problems = [Problem(task=task, question=task.prompt, opening=task.prompt) for task in tasks]
    return problems, held_out


def _at(points: Sequence[Point], temperature: float, steps: int) -> Point | None:
    return next((p for p in points if p.temperature == temperature and p.denoising_steps == steps), None)


def _paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    return bootstrap(np.subtract(second, first).tolist())


def _name(checkpoint: Path) -> str:
    resolved = checkpoint.resolve()
    return f"{resolved.parents[1].name}/{resolved.name}" if resolved.name.startswith("step_") else resolved.name


def _rounded(found: Heatmap) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in found.values]


def _cell(interval: dict[str, Any] | None) -> str:
    return "" if interval is None else str(Interval(mean=interval["mean"], low=interval["low"], high=interval["high"]))
