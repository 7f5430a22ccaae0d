"""Random weights of published shapes, and the embedded model with the quickstart's prompts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from coupled.rl.data.prompts import encode_prompts
from coupled.rl.data.tasks import load_tasks
from coupled.rl.model.families import FAMILIES, Family
from coupled.rl.model.open import open_policy
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.read import load_recipe
from coupled.rl.recipe.schema import Recipe
from coupled.rl.types import Prompt

MASK_ID, END_ID, PAD_ID, FIRST_TOKEN = 4, 3, 0, 5
NUM_UNNAMED = 100
"""Rows of the head that no token names, as published checkpoints have."""
WIDTH = 0.04
"""Standard deviation of the weights: wider than at initialisation, so that the tokens differ in probability."""

Shape = dict[str, int]
"""Settings of a Qwen2 configuration."""


def shape(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, key_heads: int) -> Shape:
    """The settings by their names in a Qwen2 configuration."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }


DREAM_7B = shape(152064, 3584, 18944, 28, 28, 4)


class Tokenizer:
    """As much of a tokenizer as a policy uses."""

    mask_token_id, eos_token_id, pad_token_id = MASK_ID, END_ID, PAD_ID

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def __len__(self) -> int:
        return self._num_tokens

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **_: bool) -> str:
        return " ".join(map(str, ids))


def config_of(values: Shape, device: str) -> Qwen2Config:
    """The shape, bidirectional, with the attention that is used on the device."""
    config = Qwen2Config(**values, tie_word_embeddings=False, is_causal=False, use_cache=False)
    config._attn_implementation = "eager" if device == "cpu" else "sdpa"
    return config


def random_policy(
    values: Shape,
    device: str,
    *,
    kind: type[Policy] = Policy,
    family: Family = FAMILIES["dream"],
    weights: torch.dtype = torch.float32,
    head_width: float = WIDTH,
) -> Policy:
    """Random weights on the device, the same for the same shape; computed in float32 on a CPU, in bfloat16 on a GPU."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = Qwen2ForCausalLM(config_of(values, device)).to(weights).eval()
    stream = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, head_width if "lm_head" in name else WIDTH, generator=stream)
    tokenizer: Any = Tokenizer(values["vocab_size"] - NUM_UNNAMED)
    return kind(model, tokenizer, family, compute_dtype(device))


def compute_dtype(device: str) -> torch.dtype:
    """float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def embedded(overrides: tuple[str, ...] = ()) -> tuple[Recipe, Policy, list[Prompt]]:
    """The quickstart's recipe with overrides, the model that it starts from, and its training prompts."""
    recipe = load_recipe("quickstart", overrides)
    policy = open_policy(recipe.model, recipe.seed)
    return recipe, policy, prompts_of(recipe, policy)


def prompts_of(recipe: Recipe, policy: Policy, path: str | None = None) -> list[Prompt]:
    """The encoded prompts of the recipe's tasks, or of the tasks at a path."""
    tasks = load_tasks(recipe.data, path) if path else load_tasks(recipe.data)
    return encode_prompts(tasks, policy.tokenizer, recipe.data.max_prompt_tokens)
