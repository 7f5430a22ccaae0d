"""`coupled sample`: denoise one completion with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from coupled.rl.data.prompts import render_prompt
from coupled.rl.errors import DataError
from coupled.rl.model.loading import load_policy, require_end_token
from coupled.rl.model.open import how_to_open
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.engine import roll_out
from coupled.rl.rollout.sampler import Request
from coupled.rl.run_folder.find import find_checkpoint, recipe_for
from coupled.rl.types import Rollout


def sample_checkpoint(
    path: Path,
    prompt: str,
    recipe: str | None,
    overrides: tuple[str, ...],
    *,
    temperature: float,
    seed: int,
    on_step: Callable[[Policy, int, np.ndarray], None] | None = None,
) -> tuple[Policy, Rollout]:
    """Denoise one completion of a prompt with the recipe's sampler at the given temperature.

    `on_step` receives the policy, the step and the canvas [C] after each step.
    """
    checkpoint = find_checkpoint(path)
    chosen = recipe_for(checkpoint, recipe, overrides)
    policy = load_policy(checkpoint, **how_to_open(chosen.model))
    require_end_token(policy.tokenizer, checkpoint)
    sampler: Sampler = chosen.rollout.sampler.changed(temperature=temperature)
    text = render_prompt(prompt, policy.tokenizer)
    ids = tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise DataError("the prompt has no tokens; give a prompt that is not empty")

    def show(step: int, canvases: np.ndarray) -> None:
        if on_step is not None:
            on_step(policy, step, canvases[0])

    (rollout,) = roll_out(policy, [Request(uid="sample", prompt_ids=ids)], sampler, seed=seed, on_step=show)
    return policy, rollout
