"""Using a checkpoint outside its run: evaluate it, or denoise one completion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from coupled.rl.data.tasks import encode_prompts, load_tasks, render_prompt
from coupled.rl.errors import CheckpointError, DataError, RecipeError
from coupled.rl.evaluation.causal import require_end_token
from coupled.rl.evaluation.held_out import Evaluation, evaluate, sampler_of
from coupled.rl.judging.grader import open_grader
from coupled.rl.model.loading import load_policy
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.schema import Recipe, apply_overrides, load_recipe
from coupled.rl.rollout.denoise import Request, Sampler
from coupled.rl.rollout.engine import InlineEngine, roll_out
from coupled.rl.run_folder.folder import committed_checkpoints, read_run_recipe
from coupled.rl.trainer.checkpoint import how_to_open, open_policy, use_threads
from coupled.rl.types import Rollout


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder as it is; of a run folder, its newest checkpoint.

    Raises:
        CheckpointError: neither.
    """
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    found = committed_checkpoints(path / "checkpoints")
    if found:
        return found[-1]
    raise CheckpointError(f"{path} is neither a checkpoint folder nor a run folder with a checkpoint")


def recipe_for(checkpoint: Path, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe to use a checkpoint with: the one named, or that of the run it lies in.

    Raises:
        RecipeError: neither is there.
    """
    if recipe is not None:
        return load_recipe(recipe, overrides)
    run = checkpoint.resolve().parent.parent
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{checkpoint} does not lie in a run folder; say how to sample from it with --recipe FILE")
    return apply_overrides(read_run_recipe(run), overrides)


def evaluate_checkpoint(path: Path, recipe: str | None, overrides: tuple[str, ...] = ()) -> Evaluation:
    """Pass@1 of a checkpoint on the held-out problems of the recipe.

    Raises:
        CoupledError: no checkpoint, no recipe, or a recipe without `data.eval_path`.
    """
    checkpoint = find_checkpoint(path)
    chosen = recipe_for(checkpoint, recipe, overrides)
    if chosen.data.eval_path is None:
        raise DataError("the recipe names no held-out problems; add data.eval_path=FILE")
    use_threads(chosen)
    model = chosen.model.model_copy(update={"path": str(checkpoint), "init": "checkpoint", "adapter": None})
    policy = open_policy(model, chosen.seed)
    tasks = load_tasks(chosen.data, chosen.data.eval_path, allow_weak=chosen.reward.allow_weak)
    prompts = encode_prompts(tasks, policy.tokenizer, chosen.data.max_prompt_tokens)
    engine = InlineEngine(policy, chosen.rollout.batch_size)
    prompts = prompts[: chosen.evaluation.num_problems]
    grader = open_grader(chosen, [prompt.task for prompt in prompts])
    try:
        return evaluate(engine, grader, prompts, chosen, step=0)
    finally:
        grader.close()


def sample_checkpoint(
    path: Path,
    prompt: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    *,
    temperature: float,
    seed: int,
    watch: Callable[[Policy, int, np.ndarray], None] | None = None,
) -> tuple[Policy, Rollout]:
    """Denoise one completion of a prompt with the recipe's sampler at the given temperature.

    `watch` is shown the policy, the step and the canvas [C] after each step, as it happens.
    """
    checkpoint = find_checkpoint(path)
    chosen = recipe_for(checkpoint, recipe, overrides)
    policy = load_policy(checkpoint, **how_to_open(chosen.model))
    require_end_token(policy.tokenizer, checkpoint)
    sampler: Sampler = replace(sampler_of(chosen), temperature=temperature)
    text = render_prompt(prompt, policy.tokenizer)
    ids = tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise DataError("the prompt has no tokens; ask something")

    def show(step: int, canvases: np.ndarray) -> None:
        if watch is not None:
            watch(policy, step, canvases[0])

    (rollout,) = roll_out(policy, [Request(uid="sample", prompt_ids=ids)], sampler, seed=seed, watch=show)
    return policy, rollout


def canvas_text(policy: Policy, canvas: np.ndarray) -> str:
    """A canvas [C] as text up to its first end token, with `▢` for what is still masked."""
    ends = np.flatnonzero(np.isin(canvas, policy.end_ids))
    shown = canvas[: ends[0]] if len(ends) else canvas
    return "".join(
        "▢" if token == policy.mask_id else policy.tokenizer.decode([int(token)], skip_special_tokens=True)
        for token in shown
    )
