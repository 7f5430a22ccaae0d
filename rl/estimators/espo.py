"""The sequence-level ELBO [ESPO]: one score for a completion, from a mask of x positions and its complement.

    E = ½ · [ (L+1)/x · Σ_{k∈M} ℓ_k(M) + (L+1)/(L-x) · Σ_{k∈V∖M} ℓ_k(V∖M) ],   x ~ U{0 … L}, |M| = x

averaged over λ = `num_pairs` draws. A half with an empty mask counts 0, and L+1 instead of L in the weight compensates
for it: each half is an unbiased estimate of the ELBO, and with L = |V| finite its variance is finite too.

All tokens of a completion have one ratio, of length-normalised scores: exp((E - E_old)/L).
"""

from __future__ import annotations

import torch
from torch import Tensor

from coupled.rl.estimators.cost import ScoringCost
from coupled.rl.estimators.subsets import exact_count, stack
from coupled.rl.keys import Key, generator
from coupled.rl.recipe.objective import Estimator
from coupled.rl.shapes import Bool
from coupled.rl.types import MaskDraw, TrainBatch, View


def draw(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> MaskDraw:
    """λ masks with their complements; `mask_ratio`, `weights` and `draw` are not read."""
    forwards = tuple(halves(_draw_mask(batch, (*key, pair)), batch.valid) for pair in range(config.num_pairs))
    return MaskDraw(forwards=forwards, total=2 * config.num_pairs, is_sequence=True)


def cost(config: Estimator, canvas: int, steps: int) -> ScoringCost:
    """Two views per draw, a mask and its complement: they score each position once between them."""
    return ScoringCost(own_views=2 * config.num_pairs, shared_views=0, scored=config.num_pairs * canvas)


def halves(mask: Bool[Tensor, "B C"], valid: Bool[Tensor, "B C"]) -> tuple[View, View]:
    """M and V∖M, divided by x/(L+1) and (L-x)/(L+1): the probability that a token is in a non-empty mask."""
    return _half(mask & valid, valid), _half(valid & ~mask, valid)


def _half(mask: Bool[Tensor, "B C"], valid: Bool[Tensor, "B C"]) -> View:
    size, length = mask.sum(-1).double(), valid.sum(-1)
    # An empty half scores nothing; 1 avoids 0/0.
    return View.of_mask(mask, torch.where(size > 0, size / (length + 1), 1.0))


def _draw_mask(batch: TrainBatch, key: tuple[Key, ...]) -> Bool[Tensor, "B C"]:
    masks = []
    for uid, valid in zip(batch.uids, batch.valid.cpu().numpy(), strict=True):
        stream = generator(*key, uid)
        size = int(stream.integers(0, int(valid.sum()) + 1))
        masks.append(exact_count(stream.random(batch.canvas_length), size, valid))
    return stack(masks, batch.valid)
