"""Rollout of block-diffusion models: block after block, each denoised with all earlier ones in a key-value cache.

Blocks of B positions are counted from the first token of the prompt. Whole blocks of the prompt are read once; the rest
of the prompt stands, unmasked, in the first block that is generated. A block is denoised in a few steps, each of which
reads the block and the cache; then one more pass over the finished block puts its keys and values into the cache. This
is exact: no later block can change an earlier one [BD3-LM; SDAR; Stable-DiffCoder].

Shapes: R rows, L positions of a block, W positions from a row's first generated block on, K keys in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from coupled.rl.errors import RolloutError
from coupled.rl.model.attention import left_padded, may_attend
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import Record, is_settled, keyed_draws
from coupled.rl.rollout.readout import Choice, choose_positions, choose_tokens, read_out
from coupled.rl.rollout.sampler import Request, steps_per_block
from coupled.rl.shapes import Bool, Float, Int
from coupled.rl.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """The rows of a batch, each from the start of its first generated block on.

    Example: prompts of 5 and 2 tokens, blocks of 4, a canvas of 3 give lines [p5 · · ·] and [p1 p2 · · ·], which start
    at positions 4 and 0.
    """

    start: Int[Tensor, " R"]
    """Position of the line's first token: the length of the whole prompt blocks."""
    tail: Int[Tensor, " R"]
    """Prompt tokens at the head of the line, fewer than a block."""
    ids: Int[Tensor, "R W"]
    """Tail of the prompt, canvas, and padding to whole blocks."""
    canvas: int

    @property
    def place(self) -> Int[Tensor, "R W"]:
        """Canvas position of each column; outside of the canvas elsewhere."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None, :] - self.tail[:, None]

    @property
    def is_canvas(self) -> Bool[Tensor, "R W"]:
        return (self.place >= 0) & (self.place < self.canvas)

    @property
    def is_real(self) -> Bool[Tensor, "R W"]:
        return self.place < self.canvas


def counts_of_block(masked: Int[Tensor, " R"], num_steps: int, step: int) -> Int[Tensor, " R"]:
    """Positions to commit at a step: masked positions are shared evenly over the steps, with one more in the first.

    Example: 3 masked in 2 steps → 2, then 1.
    """
    return masked // num_steps + (step < masked % num_steps)


@torch.no_grad()
def denoise_blocks(
    policy: Policy,
    requests: list[Request],
    sampler: Sampler,
    *,
    seed: int,
    weight_version: int = 0,
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> list[Rollout]:
    """Denoise one completion per request, all in one batch.

    A row's numbers are keyed by (seed, uid, step of the block, position), so they do not depend on the batch. A row
    leaves as soon as every position before its first end token is settled, so that `end_fill` has nothing to fill.
    `on_step` receives the number of every step and the canvases [B, C] after it.

    Raises:
        RolloutError: the sampler has a setting for full attention only.
    """
    if sampler.block_length or sampler.cache != "none":
        raise RolloutError(
            f"rollout.block_length and rollout.cache are for models that read their whole canvas; {policy.family.name} "
            f"has blocks of {policy.family.block_length} and an exact cache of its own: leave them out"
        )
    block_length = policy.family.block_length
    assert block_length is not None, "the engine sends models without blocks elsewhere"
    if policy.family.shift and not all(r.prompt_ids for r in requests):
        raise RolloutError("with a logit shift the first token is predicted from the prompt, and a prompt is empty")
    line = _line_of(policy, requests, sampler.canvas, block_length)
    cache, before = _read_prompts(policy, requests, line.start, block_length)
    num_steps = steps_per_block(sampler, block_length)
    draws = keyed_draws(requests, sampler, seed, num_steps=block_length).to(policy.device)
    rows = _Rows(line, policy)
    live = torch.arange(len(requests), device=policy.device)
    for block in range(line.ids.shape[1] // block_length):
        columns = slice(block * block_length, (block + 1) * block_length)
        masked_at_first = rows.is_masked(live, columns).sum(-1)
        for step in range(block_length):
            is_masked = rows.is_masked(live, columns)
            if not is_masked.any():
                break
            hidden = _states_of_block(policy, line, cache, live, columns, is_masked, before)
            row_of, column_of = is_masked.nonzero(as_tuple=True)
            place = line.place[live][:, columns][row_of, column_of]
            token_draws, order_draws = (draws[kind, live[row_of], step, place] for kind in (0, 1))
            count = counts_of_block(masked_at_first, num_steps, step) if step < num_steps else is_masked.sum(-1)
            reading = read_out(policy.head, hidden, sampler, token_draws, order_draws, row_of=row_of, count=count)
            scores = torch.full(is_masked.shape, float("-inf"), device=policy.device)
            scores[row_of, column_of] = reading.confidence.float()
            entropy = torch.full(is_masked.shape, float("inf"), device=policy.device)
            entropy[row_of, column_of] = reading.entropy.float()
            best = torch.zeros(is_masked.shape, device=policy.device)
            best[row_of, column_of] = reading.best_probability.float()
            chosen = choose_positions(scores, entropy, best, count, sampler)
            picked = chosen[row_of, column_of]
            tokens = None if reading.tokens is None else reading.tokens[picked]
            states, logits = reading.source(picked)
            choice = choose_tokens(policy.head, hidden[states], sampler, token_draws[picked], tokens, logits)
            rows.commit(
                rows=live[row_of[picked]], places=place[picked], choice=choice, step=block * block_length + step
            )
            rows.forwards[live[is_masked.any(-1)]] += 1
            if on_step is not None:
                on_step(block * block_length + step, rows.canvas_ids.cpu().numpy())
        stays = torch.ones_like(live, dtype=torch.bool)
        if sampler.has_early_exit:
            stays = ~is_settled(rows.canvas_ids[live], policy.mask_id, policy.end_ids)
        live = live[stays]
        if len(live) == 0:
            break
        if cache.get_seq_length() == 0:
            cache = DynamicCache()  # an empty cache still has the number of rows that it was used with
        cache.batch_select_indices(stays.nonzero()[:, 0])
        before = _commit_block(policy, line, cache, live, columns)
        rows.forwards[live] += 1
    return [rows.rollout(row, request, weight_version, sampler) for row, request in enumerate(requests)]


class _Rows:
    """The rows of a batch, and the state of their canvases."""

    def __init__(self, line: Line, policy: Policy) -> None:
        self._line = line
        self._mask_id = policy.mask_id
        self._record = Record(policy, len(line.start), line.canvas)
        self.canvas_ids = torch.full((len(line.start), line.canvas), policy.mask_id, device=line.ids.device)

    @property
    def forwards(self) -> Int[Tensor, " R"]:
        """Forward passes of each row so far."""
        return self._record.forwards

    def is_masked(self, rows: Int[Tensor, " R"], columns: slice) -> Bool[Tensor, "R L"]:
        """Canvas positions of a block that are not committed yet."""
        place, is_canvas = self._line.place[rows][:, columns], self._line.is_canvas[rows][:, columns]
        ids = self.canvas_ids[rows].gather(1, place.clamp(0, self._line.canvas - 1))
        return (ids == self._mask_id) & is_canvas

    def commit(self, *, rows: Int[Tensor, " M"], places: Int[Tensor, " M"], choice: Choice, step: int) -> None:
        """Record the commits of one step, row by row."""
        self.canvas_ids[rows, places] = choice.tokens
        self._line.ids[rows, places + self._line.tail[rows]] = choice.tokens
        self._record.commit(rows, places, choice, step)

    def rollout(self, row: int, request: Request, weight_version: int, sampler: Sampler) -> Rollout:
        """The rollout of a finished row."""
        return self._record.rollout(row, request, self.canvas_ids[row], weight_version, sampler)


def _line_of(policy: Policy, requests: list[Request], canvas: int, block_length: int) -> Line:
    lengths = torch.tensor([len(r.prompt_ids) for r in requests])
    tail = lengths % block_length
    width = -(-(int(tail.max()) + canvas) // block_length) * block_length
    ids = torch.full((len(requests), width), policy.pad_id)
    for row, request in enumerate(requests):
        size = int(tail[row])
        ids[row, :size] = torch.tensor(request.prompt_ids[len(request.prompt_ids) - size :], dtype=torch.int64)
        ids[row, size : size + canvas] = policy.mask_id
    device = policy.device
    return Line(start=(lengths - tail).to(device), tail=tail.to(device), ids=ids.to(device), canvas=canvas)


def _read_prompts(
    policy: Policy, requests: list[Request], start: Int[Tensor, " R"], block_length: int
) -> tuple[Cache, Float[Tensor, "R D"] | None]:
    """Keys and values of the whole prompt blocks, padded on the left, and the hidden state of their last position.

    Each distinct prompt is read once. None: no prompt has a whole block.
    """
    heads = [r.prompt_ids[:size] for r, size in zip(requests, start.tolist(), strict=True)]
    distinct = {head: number for number, head in enumerate(dict.fromkeys(heads))}
    cache = DynamicCache()
    longest = max(len(head) for head in distinct)
    if longest == 0:
        return cache, None
    ids = torch.full((len(distinct), longest), policy.pad_id)
    for row, head in enumerate(distinct):
        ids[row, longest - len(head) :] = torch.tensor(head, dtype=torch.int64)
    layout = left_padded(torch.tensor([longest - len(head) for head in distinct], device=policy.device), longest)
    allowed = may_attend(layout, layout, block_length=block_length)
    hidden = policy.hidden_after(ids.to(policy.device), layout.position, allowed, cache)
    which = torch.tensor([distinct[head] for head in heads], device=policy.device)
    cache.batch_select_indices(which)
    return cache, hidden[which, -1]


def _forward(
    policy: Policy, line: Line, cache: Cache, rows: Int[Tensor, " R"], columns: slice
) -> Float[Tensor, "R L D"]:
    """The block over the cache, to which its keys and values are added. All rows are in the same block of their lines,
    so the cache holds the padding that was there at first."""
    size = columns.stop - columns.start
    in_cache = cache.get_seq_length()
    padding = in_cache - columns.start - line.start[rows]
    is_cached = torch.arange(in_cache, device=rows.device)[None, :] >= padding[:, None]
    allowed = torch.cat((is_cached, line.is_real[rows][:, columns]), dim=1)[:, None, :]
    positions = line.start[rows][:, None] + torch.arange(columns.start, columns.stop, device=rows.device)[None, :]
    return policy.hidden_after(line.ids[rows][:, columns], positions, allowed.expand(-1, size, -1), cache)


def _states_of_block(
    policy: Policy,
    line: Line,
    cache: Cache,
    rows: Int[Tensor, " R"],
    columns: slice,
    wanted: Bool[Tensor, "R L"],
    before: Float[Tensor, "R D"] | None,
) -> Float[Tensor, "N D"]:
    """The states that predict the wanted positions of a block; the cache is left as it was.

    `before` is the hidden state of the position before the block: with shift 1 its first token is predicted from that.
    """
    hidden = _forward(policy, line, cache, rows, columns)
    cache.crop(columns.start - columns.stop)
    if policy.family.shift:
        # A row without a whole block behind it begins with its prompt, and nothing is predicted there.
        first = torch.zeros_like(hidden[:, 0]) if before is None else before
        hidden = torch.cat((first[:, None], hidden[:, :-1]), dim=1)
    return hidden[wanted]


def _commit_block(
    policy: Policy, line: Line, cache: Cache, rows: Int[Tensor, " R"], columns: slice
) -> Float[Tensor, "R D"]:
    """One more pass, over the block as it is now: its keys and values depend on what it holds. Returns the hidden state
    of its last position."""
    return _forward(policy, line, cache, rows, columns)[:, -1]
