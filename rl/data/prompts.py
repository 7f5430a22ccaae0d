"""Tasks as prompts of tokens, through the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coupled.reward import Task
from coupled.rl.data.tasks import load_tasks
from coupled.rl.errors import DataError, RecipeError
from coupled.rl.recipe.schema import Recipe
from coupled.rl.types import Prompt


def encode_prompts(tasks: Sequence[Task], tokenizer: Any, max_tokens: int) -> list[Prompt]:
    """Tokenise tasks through the tokenizer's chat template; empty prompts and prompts over `max_tokens` are dropped.

    Raises:
        DataError: no prompt is left.
    """
    texts = [render_prompt(task.prompt, tokenizer) for task in tasks]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [
        Prompt(task=task, token_ids=tuple(ids))
        for task, ids in zip(tasks, encoded, strict=True)
        if 0 < len(ids) <= max_tokens
    ]
    if not prompts:
        shortest = min(len(ids) for ids in encoded)
        raise DataError(
            f"data.max_prompt_tokens is {max_tokens} but the shortest prompt has {shortest} tokens; raise it"
        )
    return prompts


def render_prompt(text: str, tokenizer: Any) -> str:
    """The text as the user's turn of the chat template; unchanged if there is no template."""
    if not tokenizer.chat_template:
        return text
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def held_out_prompts(recipe: Recipe, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first `evaluation.num_problems` prompts of `data.eval_path`; none where the recipe names no such file.

    Raises:
        DataError: some of them are among the training `prompts`.
    """
    if recipe.data.eval_path is None:
        return []
    tasks = load_tasks(recipe.data, recipe.data.eval_path, allow_weak=recipe.reward.allow_weak)
    held_out = encode_prompts(tasks, tokenizer, recipe.data.max_prompt_tokens)[: recipe.evaluation.num_problems]
    seen = {p.token_ids for p in prompts} & {p.token_ids for p in held_out}
    if seen:
        raise DataError(
            f"{len(seen)} held-out prompts are also training prompts, so the gain would be measured on "
            "training data; take them out of data.eval_path or data.path"
        )
    return held_out


def refuse_too_long(prompts: Sequence[Prompt], canvas: int, max_positions: int | None) -> None:
    """Check that every prompt and its canvas fit into the model's positions; None stands for no limit.

    Raises:
        RecipeError: the longest prompt does not.
    """
    longest = max(len(p.token_ids) for p in prompts)
    if max_positions is not None and longest + canvas > max_positions:
        raise RecipeError(
            f"the longest prompt ({longest} tokens) and rollout.canvas ({canvas}) exceed the model's "
            f"{max_positions} positions; lower rollout.canvas or data.max_prompt_tokens"
        )
