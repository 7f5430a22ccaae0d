"""The sequence-level ELBO [ESPO]: one score for a completion, from a mask of x positions and its complement.

    E = ½ · [ (L+1)/x · Σ_{k∈M} ℓ_k(M) + (L+1)/(L-x) · Σ_{k∈V∖M} ℓ_k(V∖M) ],   x ~ U{0 … L}, |M| = x

averaged over λ = `num_pairs` draws. A half whose mask is empty counts 0, and L+1 rather than L in the weight makes up
for it: each half is an unbiased estimate of the ELBO, and with L = |V| finite its variance is finite too.

The ratio is that of the length-normalised scores, exp((E - E_old)/L), one for all tokens of a completion.
"""

from __future__ import annotations

from coupled.rl.estimators.subsets import column, exact_count, stack
from coupled.rl.keys import Key, generator
from coupled.rl.recipe import Estimator
from coupled.rl.types import MaskDraw, TrainBatch, View


def draw(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> MaskDraw:
    """λ masks with their complements; `mask_ratio`, `weights` and `draw` play no part."""
    forwards = tuple(_draw_halves(batch, (*key, pair)) for pair in range(config.num_pairs))
    return MaskDraw(forwards=forwards, total=2 * config.num_pairs, is_sequence=True)


def _draw_halves(batch: TrainBatch, key: tuple[Key, ...]) -> tuple[View, View]:
    masks, complements, shares, other_shares = [], [], [], []
    for uid, valid in zip(batch.uids, batch.valid.cpu().numpy(), strict=True):
        stream = generator(*key, uid)
        length = int(valid.sum())
        size = int(stream.integers(0, length + 1))
        mask = exact_count(stream.random(batch.canvas_length), size, valid)
        masks.append(mask)
        complements.append(valid & ~mask)
        # Where a half is empty nothing is divided; 1 keeps 0/0 away.
        shares.append(size / (length + 1) if size else 1.0)
        other_shares.append((length - size) / (length + 1) if size < length else 1.0)
    like = batch.valid
    return (
        View.of_mask(stack(masks, like), column(shares, like)),
        View.of_mask(stack(complements, like), column(other_shares, like)),
    )
