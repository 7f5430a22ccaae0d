"""The statistics of `row_statistics` in one pass over the logits as the product leaves them, and tokens in two more.

A program reads a row, some columns at a time, in fp32. With m the greatest logit so far, s = Σ exp(z - m) and
t = Σ exp(z - m) (z - m), a greater m' turns them into

    s' = s · exp(m - m')       t' = exp(m - m') · (t + s (m - m'))

and at the end H = log s - t / s, p₁ = 1 / s and p₁ - p₂ = (1 - exp(z₂ - z₁)) / s. A row's numbers do not depend on the
others. A token is the first whose cumulative weight exp(z - z₁), added up in fp64, exceeds the uniform number times the
weight of all.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coupled.rl.keys import uniform
from coupled.rl.model.vocabulary import OutputHead
from coupled.rl.rollout.distributions import FORBIDDEN
from coupled.rl.rollout.row_statistics_torch import Choice, RowStatistics, draw_logits, measure
from coupled.rl.shapes import Float, Int

BLOCK = 4096
"""Columns that a program holds at a time."""
NUM_WARPS = 8
LOWEST = tl.constexpr(-1e30)
"""Finite, so that a weight of zero times it is zero."""
NOWHERE = tl.constexpr(2**31 - 1)


def fused_statistics(head: OutputHead, logits: Float[Tensor, "N V"], temperature: float) -> RowStatistics:
    """The statistics of raw logits, which are not changed."""
    size, device = len(logits), logits.device
    entropy, best, margin = torch.empty((3, size), dtype=torch.float32, device=device)
    token = torch.empty(size, dtype=torch.int64, device=device)
    if size:
        _statistics_kernel[(size,)](
            logits, entropy, best, margin, token, *_settings(head, logits, temperature), num_warps=NUM_WARPS
        )
    return RowStatistics(entropy=entropy, best_probability=best, margin=margin, best_token=token)


def fused_choice(
    head: OutputHead,
    logits: Float[Tensor, "N V"],
    temperature: float,
    draws: Float[Tensor, " N"],
    given: Int[Tensor, " N"] | None = None,
) -> Choice:
    """A token for each row of raw logits; at temperature 0 the likeliest. Given tokens other than -1 are used."""
    size, device = len(logits), logits.device
    if given is None:
        given = torch.full((size,), -1, dtype=torch.int64, device=device)
    entropy, logp = torch.empty((2, size), dtype=torch.float32, device=device)
    token = torch.empty(size, dtype=torch.int64, device=device)
    if size:
        _choice_kernel[(size,)](
            logits,
            draws.double(),
            given,
            entropy,
            logp,
            token,
            *_settings(head, logits, temperature),
            temperature == 0,
            num_warps=NUM_WARPS,
        )
    return Choice(tokens=token, logp=logp, entropy=entropy)


def largest_difference(device: torch.device) -> float:
    """Largest difference between the kernels and torch on a few random rows; infinite if a token differs."""
    num_tokens, num_rows = 3 * BLOCK + 5, 6
    spread = 10 * torch.arange(1, num_rows + 1)[:, None]
    logits = (torch.from_numpy(uniform((num_rows, num_tokens), 0, "row statistics")).float() * spread).to(device)
    draws = torch.from_numpy(uniform((num_rows,), 0, "row draws")).double().to(device)
    head = OutputHead(module=torch.nn.Identity(), mask_id=1, num_tokens=num_tokens)
    plain = logits.clone()
    plain[:, head.mask_id] = FORBIDDEN
    choice, its_choice = fused_choice(head, logits, 1.0, draws), draw_logits(plain, 1.0, draws)
    mine, its = fused_statistics(head, logits, 1.0), measure(plain, has_margin=True, has_token=True)
    assert mine.margin is not None
    assert its.margin is not None
    assert mine.best_token is not None
    assert its.best_token is not None
    if not (torch.equal(choice.tokens, its_choice.tokens) and torch.equal(mine.best_token, its.best_token)):
        return math.inf
    pairs = [
        (mine.entropy, its.entropy),
        (mine.best_probability, its.best_probability),
        (mine.margin, its.margin),
        (choice.logp, its_choice.logp),
        (choice.entropy, its_choice.entropy),
    ]
    return max(float((one - other).abs().max()) for one, other in pairs)


def _settings(head: OutputHead, logits: Tensor, temperature: float) -> tuple[Any, ...]:
    """Where rows begin, which tokens are allowed, the temperature, and the columns held at a time."""
    assert logits.stride(1) == 1
    block = min(BLOCK, triton.next_power_of_2(head.num_tokens))
    return logits.stride(0), head.mask_id, head.num_tokens, float(temperature) or 1.0, block


@triton.jit
def _columns(row, start, mask_id, num_tokens, temperature, BLOCK: tl.constexpr):
    """Tempered logits of some columns, -inf for tokens that may not be drawn."""
    at = start + tl.arange(0, BLOCK)
    is_allowed = (at < num_tokens) & (at != mask_id)
    z = tl.load(row + at, mask=is_allowed, other=float("-inf")).to(tl.float32)
    return tl.div_rn(z, temperature), at


@triton.jit
def _pass(row, mask_id, num_tokens, temperature, BLOCK: tl.constexpr):
    """The greatest logit and its first column, the second greatest, s and t."""
    top = tl.full((), float("-inf"), tl.float32)
    second = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    s = tl.full((), 0.0, tl.float32)
    t = tl.full((), 0.0, tl.float32)
    for start in range(0, num_tokens, BLOCK):
        z, at = _columns(row, start, mask_id, num_tokens, temperature, BLOCK)
        here = tl.max(z, 0)
        first = tl.min(tl.where(z == here, at, NOWHERE), 0)
        rest = tl.max(tl.where(at == first, float("-inf"), z), 0)
        greatest = tl.maximum(top, here)
        second = tl.maximum(tl.minimum(top, here), tl.maximum(second, rest))
        token = tl.where(here > top, first, token)
        if greatest > float("-inf"):
            if top > float("-inf"):
                shrink = tl.exp(top - greatest)
                t = shrink * (t + s * (top - greatest))
                s = s * shrink
            below = z - greatest
            weight = tl.exp(below)
            s += tl.sum(weight, 0)
            t += tl.sum(weight * tl.maximum(below, LOWEST), 0)
        top = greatest
    return top, second, token, s, t


@triton.jit
def _statistics_kernel(
    logits, entropy, best, margin, token, stride, mask_id, num_tokens, temperature, BLOCK: tl.constexpr
):
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * stride
    top, second, first, s, t = _pass(row, mask_id, num_tokens, temperature, BLOCK)
    tl.store(entropy + n, tl.log(s) - t / s)
    tl.store(best + n, 1.0 / s)
    tl.store(margin + n, (1.0 - tl.exp(second - top)) / s)
    tl.store(token + n, first.to(tl.int64))


@triton.jit
def _choice_kernel(
    logits,
    draws,
    given,
    entropy,
    logp,
    token,
    stride,
    mask_id,
    num_tokens,
    temperature,
    BLOCK: tl.constexpr,
    IS_GREEDY: tl.constexpr,
):
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * stride
    top, _second, chosen, s, t = _pass(row, mask_id, num_tokens, temperature, BLOCK)
    if not IS_GREEDY:
        total = tl.full((), 0.0, tl.float64)
        for start in range(0, num_tokens, BLOCK):
            z, at = _columns(row, start, mask_id, num_tokens, temperature, BLOCK)
            total += tl.sum(tl.exp((z - top).to(tl.float64)), 0)
        target = tl.load(draws + n) * total
        before = tl.full((), 0.0, tl.float64)
        found = tl.full((), NOWHERE, tl.int32)
        for start in range(0, num_tokens, BLOCK):
            z, at = _columns(row, start, mask_id, num_tokens, temperature, BLOCK)
            weight = tl.exp((z - top).to(tl.float64))
            reached = before + tl.cumsum(weight, 0)
            # A token without weight is never drawn, whatever the sums round to.
            found = tl.minimum(found, tl.min(tl.where((reached > target) & (weight > 0), at, NOWHERE), 0))
            before += tl.sum(weight, 0)
        chosen = tl.where(found < num_tokens, found, chosen)
    wanted = tl.load(given + n)
    chosen = tl.where(wanted < 0, chosen.to(tl.int64), wanted)
    z = tl.div_rn(tl.load(row + chosen).to(tl.float32), temperature)
    tl.store(entropy + n, tl.log(s) - t / s)
    tl.store(logp + n, z - top - tl.log(s))
    tl.store(token + n, chosen)
