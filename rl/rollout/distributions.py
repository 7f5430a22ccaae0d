"""Distributions over the vocabulary: filters, the token that a uniform number selects, and entropy.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coupled.rl.shapes import Float, Int

FEW = 128
"""Number of likeliest tokens among which a nucleus is searched first."""
FORBIDDEN = -1e30
"""Finite, so that a probability of zero times it is zero."""


def likeliest(logits: Float[Tensor, "N V"], top_k: int) -> Float[Tensor, "N V"]:
    """Keep the `top_k` likeliest tokens (more where the last ones are equal); the others get -inf. 0 keeps all."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], float("-inf"))


def nucleus(logits: Float[Tensor, "N V"], top_p: float) -> Float[Tensor, "N V"]:
    """Keep the likeliest tokens whose mass reaches `top_p` (at least one); the others get -inf.

    A token stays if the mass of all likelier ones is at most `top_p`; equally likely tokens stay or go together.
    Nothing is sorted: see `least_kept`.
    """
    if top_p >= 1:
        return logits
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < least_kept(probability, top_p)[:, None], float("-inf"))


def least_kept(probability: Float[Tensor, "N V"], top_p: float) -> Float[Tensor, " N"]:
    """The smallest probability in the nucleus: the least p with mass{p' > p} ≤ top_p.

    It is usually among the few likeliest tokens. Otherwise bisection encloses it, and a search by steps finds it.
    """
    few = min(FEW, probability.shape[-1])
    best = probability.topk(few, dim=-1).values
    is_kept = best.cumsum(-1) - best <= top_p
    number = is_kept.sum(-1).clamp(min=1)
    least = best.gather(-1, number[:, None] - 1)[:, 0]
    is_open = number == few
    if few < probability.shape[-1] and bool(is_open.any()):
        least[is_open] = _enclose(probability[is_open], least[is_open], top_p)
    return least


def _enclose(probability: Float[Tensor, "N V"], kept: Float[Tensor, " N"], top_p: float) -> Float[Tensor, " N"]:
    """`least_kept`, from a probability that is known to be kept."""
    low, high = torch.zeros_like(kept), kept
    for _ in range(24):
        middle = (low + high) / 2
        is_kept = _mass_above(probability, middle) <= top_p
        low, high = torch.where(is_kept, low, middle), torch.where(is_kept, middle, high)
    # From here on the probabilities themselves are visited, of which few or none lie between.
    high = _next_below(probability, torch.nextafter(high, torch.full_like(high, 2.0)))
    while True:
        lower = _next_below(probability, high)
        is_kept = (lower >= 0) & (_mass_above(probability, lower) <= top_p)
        if not bool(is_kept.any()):
            return high
        high = torch.where(is_kept, lower, high)


def _mass_above(probability: Float[Tensor, "N V"], least: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return (probability * (probability > least[:, None])).sum(-1)


def _next_below(probability: Float[Tensor, "N V"], limit: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The greatest probability below the limit; -1 where there is none."""
    return probability.masked_fill(probability >= limit[:, None], -1.0).amax(-1)


def draw_tokens(logp: Float[Tensor, "N V"], draws: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the uniform draw. fp64 sums."""
    cumulative = logp.double().exp().cumsum(-1)
    # Scaled by the total, so that rounding can never select a token beyond the last possible one.
    target = draws.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logp.shape[-1] - 1)


def entropy_of(logp: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """-Σ p log p, in nats; 0 log 0 = 0."""
    return -(logp.exp() * logp.clamp(min=FORBIDDEN)).sum(-1)
