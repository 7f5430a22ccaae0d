"""Tasks as prompts of tokens, through the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coupled.reward import Task
from coupled.rl.errors import DataError
from coupled.rl.types import Prompt


def encode_prompts(tasks: Sequence[Task], tokenizer: Any, max_tokens: int) -> list[Prompt]:
    """Tokenise tasks through the tokenizer's chat template; empty prompts and those over `max_tokens` are dropped.

    Raises:
        DataError: nothing is left.
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
    """The user's text as the model was taught to read it."""
    if not tokenizer.chat_template:
        return text
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
