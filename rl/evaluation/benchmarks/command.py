"""`coupled eval CHECKPOINT --benchmark ...` and `coupled eval --compare A B`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from coupled.rl.errors import DataError, RecipeError, nearest
from coupled.rl.evaluation.benchmarks import BENCHMARKS, Prompting, data_file, find_benchmarks
from coupled.rl.evaluation.benchmarks.run import Arm, EvaluationPlan, evaluate_benchmark, fingerprint, read_evaluation
from coupled.rl.evaluation.benchmarks.score import as_interval, compare_rows
from coupled.rl.evaluation.causal import CausalEngine, CausalModel, is_causal_checkpoint
from coupled.rl.evaluation.statistics import Comparison
from coupled.rl.judging.open import open_sandbox
from coupled.rl.model.loading import require_end_token
from coupled.rl.model.open import open_policy, pick_device, use_threads
from coupled.rl.recipe.read import apply_overrides, sampling_recipe
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import policy_engine
from coupled.rl.run_folder.find import find_checkpoint, recipe_for
from coupled.sandbox import CachedExecutor

Printer = Callable[[str], None]
PROMPTINGS = ("auto", "chat", "completion")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """Options of `coupled eval`; None selects the default stated on the field."""

    benchmarks: str
    data: Path
    out: Path | None = None
    """None: below the checkpoint's run folder, else below ./evaluations."""
    num_samples: int = 1
    temperature: float | None = None
    """None: greedy with one sample, the recipe's with more."""
    num_steps: int | None = None
    """None: the recipe's."""
    seed: int = 0
    limit: int | None = None
    prompting: str = "auto"
    """auto: chat where the tokenizer has a chat template."""
    is_autoregressive: bool | None = None
    """None: detected from the checkpoint."""
    recipe: str | None = None
    overrides: tuple[str, ...] = ()


def evaluate_on(path: Path, options: EvalOptions, show: Printer) -> dict[str, Path]:
    """Evaluate a checkpoint on every requested benchmark; returns benchmark → folder.

    Raises:
        CoupledError: unknown benchmark, missing data, no checkpoint, or settings that contradict each other.
    """
    benchmarks = find_benchmarks(options.benchmarks)
    for benchmark in benchmarks:
        data_file(benchmark, options.data)  # before anything is loaded
    checkpoint = find_checkpoint(path)
    recipe = _recipe(checkpoint, options)
    use_threads(recipe)
    arm = open_arm(checkpoint, recipe, is_autoregressive=options.is_autoregressive)
    settings = _plan(recipe, arm, options)
    parent = options.out or _default_out(checkpoint, settings)
    show(f"{arm.kind} checkpoint {checkpoint}, {settings.prompting} prompts, into {parent}")
    with closing(CachedExecutor(open_sandbox(recipe))) as executor:
        folders = {}
        for benchmark in benchmarks:
            folders[benchmark.name] = parent / benchmark.name
            evaluate_benchmark(arm, benchmark, options.data, settings, executor, folders[benchmark.name], show=show)
    return folders


def open_arm(checkpoint: Path, recipe: Recipe, *, is_autoregressive: bool | None = None) -> Arm:
    """Open a checkpoint for an evaluation: decoding by denoising, or from left to right.

    Raises:
        CheckpointError: it cannot be opened, or its tokenizer names no end token.
    """
    if is_autoregressive is None:
        is_autoregressive = recipe.model.family is None and is_causal_checkpoint(checkpoint)
    batch_size = recipe.rollout.batch_size
    if is_autoregressive:
        dtype, device = getattr(torch, recipe.model.compute_dtype), pick_device(recipe.model.device)
        causal = CausalModel(checkpoint, dtype=dtype, device=device)
        engine: Any = CausalEngine(causal, batch_size)
        tokenizer, config = causal.tokenizer, causal.model.config
    else:
        model = recipe.model.model_copy(update={"path": str(checkpoint), "init": "checkpoint", "adapter": None})
        policy = open_policy(model, recipe.seed)
        require_end_token(policy.tokenizer, checkpoint)
        engine, tokenizer, config = policy_engine(policy, batch_size), policy.tokenizer, policy.config
    return Arm(
        engine=engine,
        tokenizer=tokenizer,
        kind="autoregressive" if is_autoregressive else "diffusion",
        checkpoint=str(checkpoint.resolve()),
        fingerprint=fingerprint(checkpoint),
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def compare(first: Path, second: Path, options: EvalOptions, show: Printer) -> dict[str, Comparison]:
    """A paired test on every benchmark on which both are evaluated; checkpoints are evaluated first.

    Raises:
        CoupledError: no benchmark in common, or different problems.
    """
    sides = [_evaluations(path, replace(options, out=None), show) for path in (first, second)]
    common = [name for name in sides[0] if name in sides[1]]
    if not common:
        raise DataError(
            f"{first} and {second} have no benchmark in common: {', '.join(sides[0])} and {', '.join(sides[1])}"
        )
    found: dict[str, Comparison] = {}
    for name in common:
        (one, first_rows, tasks), (two, second_rows, _) = (read_evaluation(side[name]) for side in sides)
        for setting in ("num_samples", "temperature", "denoising_steps"):
            if one[setting] != two[setting]:
                show(f"note: {name} was run with {setting} {one[setting]} and {two[setting]}")
        base = BENCHMARKS[name].base if name in BENCHMARKS else ""
        found |= compare_rows(first_rows, second_rows, tasks, name=name, base=base)
    return found


def score_table(folders: dict[str, Path]) -> Table:
    """Table of scores in per cent with 95 % intervals."""
    table = Table(box=SIMPLE_HEAD, title="% [95 % interval]", title_justify="left", pad_edge=False)
    for column in ("benchmark", "measure", "score", "problems", "not judged"):
        table.add_column(column, no_wrap=True)
    for folder in folders.values():
        score, _, _ = read_evaluation(folder)
        for name, measures in score["scores"].items():
            for measure, row in measures.items():
                problems = f"{score['num_problems']} of {score['of_problems']}"
                if score["num_weak_verdicts"]:
                    problems += ", weak verdicts"
                table.add_row(name, measure, str(as_interval(row)), problems, str(score["num_unjudged"]))
    return table


def comparison_table(found: dict[str, Comparison]) -> Table:
    """Table of paired differences in points of pass@1."""
    table = Table(box=SIMPLE_HEAD, title="second - first, pass@1", title_justify="left", pad_edge=False)
    for column in ("benchmark", "gain [95 % interval]", "better", "worse", "p", "test"):
        table.add_column(column, no_wrap=True)
    for name, row in found.items():
        table.add_row(name, str(row.gain), str(row.wins), str(row.losses), f"{row.p_value:.3g}", row.test)
    return table


def _evaluations(path: Path, options: EvalOptions, show: Printer) -> dict[str, Path]:
    if (path / "score.json").is_file():
        return {read_evaluation(path)[0]["benchmark"]: path}
    inner = sorted(folder for folder in path.glob("*") if (folder / "score.json").is_file())
    if inner:
        return {read_evaluation(folder)[0]["benchmark"]: folder for folder in inner}
    if not options.benchmarks:
        raise DataError(
            f"{path} holds no evaluation (score.json): give --benchmark to evaluate it as a checkpoint first"
        )
    return evaluate_on(path, options, show)


def _recipe(checkpoint: Path, options: EvalOptions) -> Recipe:
    try:
        return recipe_for(checkpoint, options.recipe, options.overrides)
    except RecipeError:
        if options.recipe is not None or (checkpoint.resolve().parent.parent / "recipe.yaml").is_file():
            raise
    # A checkpoint without a run: recipe defaults, which are the canvas and steps of the published sampler.
    values = {"stage": "rl", "model": {"path": str(checkpoint)}, "data": {"path": "none"}}
    return sampling_recipe(values, options.overrides, source="the defaults")


def _plan(recipe: Recipe, arm: Arm, options: EvalOptions) -> EvaluationPlan:
    if options.prompting not in PROMPTINGS:
        raise DataError(
            f"--prompting must be one of {', '.join(PROMPTINGS)}; got {options.prompting!r}; "
            f"{nearest(options.prompting, PROMPTINGS)}"
        )
    if options.num_steps is not None:
        recipe = apply_overrides(recipe, (f"rollout.denoising_steps={options.num_steps}",))
    greedy = options.num_samples == 1
    temperature = (
        (0.0 if greedy else recipe.rollout.temperature) if options.temperature is None else options.temperature
    )
    if temperature == 0 and not greedy:
        raise DataError(
            f"--samples {options.num_samples} at temperature 0 would give the same completion every time; use "
            "--samples 1, or a temperature above 0"
        )
    prompting: Prompting = "chat" if options.prompting == "chat" else "completion"
    if options.prompting == "auto":
        prompting = "chat" if arm.tokenizer.chat_template else "completion"
    if prompting == "chat" and not arm.tokenizer.chat_template:
        raise DataError("--prompting chat needs a tokenizer with a chat template; this one has none: use completion")
    return EvaluationPlan(
        sampler=recipe.rollout.sampler.changed(
            temperature=temperature, top_p=recipe.rollout.top_p if temperature else 1.0
        ),
        num_samples=options.num_samples,
        seed=options.seed,
        prompting=prompting,
        batch_size=recipe.rollout.batch_size,
        limit=options.limit,
    )


def _default_out(checkpoint: Path, settings: EvaluationPlan) -> Path:
    run = checkpoint.resolve().parent.parent
    parent = run if (run / "recipe.yaml").is_file() else Path()
    sampler = settings.sampler
    label = f"T{sampler.temperature:g}-n{settings.num_samples}-steps{sampler.denoising_steps}-seed{settings.seed}"
    if settings.limit is not None:
        label += f"-first{settings.limit}"
    # The folder name `checkpoint` does not identify a model; its parent's name does.
    name = checkpoint.resolve().name
    return parent / "evaluations" / (f"{checkpoint.resolve().parent.name}-{name}" if parent == Path() else name) / label
