"""Batches of random completions, and the model computed the plain way: one row, no padding, all positions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from coupled.rl.model.policy import Policy
from coupled.rl.recipe.schema import LikelihoodRecipe, Recipe
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import TrainBatch

MakePolicy = Callable[..., Policy]
"""The type of the fixture `tiny_policy`."""
FIRST_LETTER = 4
"""Token ids below this one are pad, end, mask and unknown."""
NUM_TOKENS = 42


def make_batch(
    prompt_lengths: Sequence[int] = (3, 5, 2),
    lengths: Sequence[int] = (6, 4, 2),
    *,
    canvas: int = 6,
    seed: int = 0,
    uids: Sequence[str] | None = None,
    shared_prompt: bool = False,
) -> TrainBatch:
    """Random prompts and completions. Where `lengths[i] < canvas` the completion ends in an end token, and what follows
    it is as a sampler may leave it: letters, MASK, pad or end tokens."""
    stream = np.random.default_rng(seed)
    size, longest = len(lengths), max(prompt_lengths)
    ids = torch.zeros((size, longest + canvas), dtype=torch.int64)
    valid = torch.zeros((size, canvas), dtype=torch.bool)
    prompt = stream.integers(FIRST_LETTER, NUM_TOKENS, longest)
    for row, (prompt_length, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        own = prompt[:prompt_length] if shared_prompt else stream.integers(FIRST_LETTER, NUM_TOKENS, prompt_length)
        completion = stream.integers(FIRST_LETTER, NUM_TOKENS, canvas)
        if length < canvas:
            completion[length - 1] = 1
            completion[length:] = stream.choice([0, 1, 2, 9, 17], canvas - length)
        ids[row, longest - prompt_length :] = torch.from_numpy(np.concatenate((own, completion)))
        valid[row, :length] = True
    return TrainBatch(
        uids=tuple(uids) if uids else tuple(f"row-{i}" for i in range(size)),
        ids=ids,
        pad_lengths=torch.tensor([longest - n for n in prompt_lengths]),
        valid=valid,
        advantages=torch.from_numpy(stream.normal(size=size)).float(),
        is_scored=torch.ones(size, dtype=torch.bool),
    )


def make_requests(num: int, *, seed: int = 0, lengths: Sequence[int] = (3, 7, 2, 5)) -> list[Request]:
    """Requests with random prompts whose lengths cycle through `lengths`."""
    stream = np.random.default_rng(seed)
    return [
        Request(
            uid=f"request-{i}",
            prompt_ids=tuple(stream.integers(FIRST_LETTER, NUM_TOKENS, lengths[i % len(lengths)]).tolist()),
        )
        for i in range(num)
    ]


def plain_logits(policy: Policy, ids: Sequence[int], clean: Sequence[int] | None = None) -> Tensor:
    """Logits [S, V] for the token *at* each position of one unpadded row, MASK and unnamed rows forbidden.

    With block attention each block has a forward pass of its own, after the earlier blocks of `clean`.
    """
    size = policy.family.block_length
    if size is not None and clean is not None:
        starts = range(0, len(ids), size)
        passes = [plain_logits(policy, [*clean[:at], *ids[at : at + size]])[at:] for at in starts]
        return torch.cat(passes)
    row = torch.tensor([list(ids)])
    places = torch.arange(row.shape[1])[None]
    block = places[0] // (size or row.shape[1])
    everywhere = torch.zeros((1, 1, row.shape[1], row.shape[1]))
    everywhere = everywhere.masked_fill(block[:, None] < block[None, :], torch.finfo(torch.float32).min)
    logits = policy.model(input_ids=row, attention_mask=everywhere, position_ids=places, use_cache=False).logits[0]
    if policy.family.shift:
        logits = torch.cat((logits[:1], logits[:-1]))
    logits = logits.clone()
    logits[:, policy.mask_id] = -torch.inf
    logits[:, NUM_TOKENS:] = -torch.inf
    return logits


def row_parts(batch: TrainBatch, row: int) -> tuple[list[int], list[int]]:
    """Prompt without padding, and canvas, as plain lists."""
    ids = batch.ids[row].tolist()
    return ids[int(batch.pad_lengths[row]) : -batch.canvas_length], ids[-batch.canvas_length :]


def global_random_states() -> tuple[object, ...]:
    """The states of every global generator, comparable with ==."""
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), kind, np.asarray(keys).tolist(), rest, random.getstate()


def make_recipe(**sections: object) -> Recipe:
    """A recipe with the canvas of the toy batches; `sections` replace its parts."""
    values = {
        "stage": "rl",
        "model": {"path": "nowhere"},
        "data": {"path": "nowhere.jsonl"},
        "rollout": {"canvas": 6, "denoising_steps": 6},
    }
    return Recipe.model_validate(values | sections)


def make_likelihood_recipe(**sections: object) -> LikelihoodRecipe:
    """A recipe of a stage before RL; `sections` replace its parts."""
    values = {"stage": "sft", "model": {"path": "nowhere"}, "data": {"path": "nowhere.jsonl"}}
    return LikelihoodRecipe.model_validate(values | sections)
