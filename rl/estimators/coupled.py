"""The coupled estimate [DiffuCoder eq. 4], and the decoupled estimate for comparison.

A pair has ratios t and 1 - t. Coupled: the second mask is the complement of the first in V, so each pair scores each
token exactly once. Decoupled: an independent mask. With λ pairs

    s_k = a · ℓ_k(V) + Σ_j ( 1[k∈M_j] · w(t_j) · ℓ_k(M_j) + 1[k∈M'_j] · w(1 - t_j) · ℓ_k(M'_j) )

    weights      a          w(t)              E[s_k] where context does not matter
    paper        1/(λ+1)    1/((λ+1) · t)     (1+2λ)/(λ+1) · ℓ_k
    normalized   1/(2λ+1)   1/((2λ+1) · t)    ℓ_k
    antithetic   0          1/(2λ · t)        ℓ_k; the ELBO when t ~ U(0, 1) and the masks are Bernoulli
    unit         0          1/λ               ℓ_k
"""

from __future__ import annotations

import torch

from coupled.rl.estimators.cost import ScoringCost
from coupled.rl.estimators.subsets import bernoulli, column, exact_count, nearest_count, stack
from coupled.rl.keys import Key, generator
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskDraw, MaskPair, TrainBatch, View


def draw(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> MaskDraw:
    """λ pairs, t ~ U(lo, hi) per sample and pair, and the fully masked pass if the weights include one."""
    return of_pairs(draw_pairs(batch, config, key), batch, config.weights)


def cost(config: Estimator, canvas: int, steps: int) -> ScoringCost:
    """Two views per pair, which score each position once between them, and the fully masked view of some weights."""
    shared = int(has_full_view(config.weights))
    return ScoringCost(own_views=2 * config.num_pairs, shared_views=shared, scored=(config.num_pairs + shared) * canvas)


def has_full_view(weights: str) -> bool:
    """Whether the weights sum over the fully masked view besides the pairs."""
    return weights in ("paper", "normalized")


def of_pairs(pairs: tuple[MaskPair, ...], batch: TrainBatch, weights: str) -> MaskDraw:
    """The estimate that these pairs make; each pair is one forward pass of 2 B rows."""
    forwards: list[tuple[View, ...]] = [_views(pair, has_ratio=weights != "unit") for pair in pairs]
    total = {
        "paper": len(pairs) + 1,
        "normalized": 2 * len(pairs) + 1,
        "antithetic": 2 * len(pairs),
        "unit": len(pairs),
    }[weights]
    if has_full_view(weights):
        forwards.insert(0, (View.fully_masked(batch.valid),))
    return MaskDraw(forwards=tuple(forwards), total=total)


def draw_pairs(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> tuple[MaskPair, ...]:
    """The λ = `num_pairs` mask pairs of a batch."""
    return tuple(_draw_pair(batch, config, (*key, pair)) for pair in range(config.num_pairs))


def _draw_pair(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> MaskPair:
    """With `exact_count`, t is rounded to whole tokens such that neither mask is empty, and becomes that share."""
    low, high = config.mask_ratio
    canvas = batch.canvas_length
    ratios, firsts, seconds = [], [], []
    for uid, valid in zip(batch.uids, batch.valid.cpu().numpy(), strict=True):
        stream = generator(*key, uid)
        t = low + (high - low) * stream.random()
        numbers, other_numbers = stream.random(canvas), stream.random(canvas)
        # A completion of one token cannot be divided: its pair stays Bernoulli.
        if config.draw == "exact_count" and (length := int(valid.sum())) >= 2:
            size = nearest_count(t, length, most=length - 1)
            t = size / length
            first, second = exact_count(numbers, size, valid), exact_count(other_numbers, length - size, valid)
        else:
            first, second = bernoulli(numbers, t, valid), bernoulli(other_numbers, 1 - t, valid)
        ratios.append(t)
        firsts.append(first)
        seconds.append(valid & ~first if config.name == "coupled" else second)
    return MaskPair(
        ratio=column(ratios, batch.valid, torch.float32),
        first=stack(firsts, batch.valid),
        second=stack(seconds, batch.valid),
    )


def _views(pair: MaskPair, *, has_ratio: bool) -> tuple[View, View]:
    ratio, other = (pair.ratio, 1 - pair.ratio) if has_ratio else (torch.ones_like(pair.ratio),) * 2
    return View.of_mask(pair.first, ratio), View.of_mask(pair.second, other)
