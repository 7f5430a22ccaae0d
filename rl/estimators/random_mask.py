"""Independent random masks: `s_k = 1/n · Σ_j 1[k∈M_j]/t_j · ℓ_k(M_j)`, each mask with a t ~ U(lo, hi) of its own.

n = 2 · `num_pairs`, as many masked inputs as λ pairs have. E[s_k] is token k's share of the ELBO when t ~ U(0, 1).
"""

from __future__ import annotations

from coupled.rl.estimators.cost import ScoringCost
from coupled.rl.estimators.subsets import bernoulli, column, exact_count, nearest_count, stack
from coupled.rl.keys import Key, generator
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskDraw, TrainBatch, View


def draw(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> MaskDraw:
    """n masks. With `draw: exact_count` a mask has t · L positions, rounded, at least one, and t becomes that share."""
    num_masks = 2 * config.num_pairs
    return MaskDraw(
        forwards=tuple((_draw_view(batch, config, (*key, index)),) for index in range(num_masks)), total=num_masks
    )


def cost(config: Estimator, canvas: int, steps: int) -> ScoringCost:
    """2 · `num_pairs` views, which score half of the positions each in the mean: the range of t has its middle at ½."""
    return ScoringCost(own_views=2 * config.num_pairs, shared_views=0, scored=config.num_pairs * canvas)


def _draw_view(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> View:
    low, high = config.mask_ratio
    ratios, masks = [], []
    for uid, valid in zip(batch.uids, batch.valid.cpu().numpy(), strict=True):
        stream = generator(*key, uid)
        t = low + (high - low) * stream.random()
        numbers = stream.random(batch.canvas_length)
        if config.draw == "exact_count" and (length := int(valid.sum())):
            size = nearest_count(t, length, most=length)
            t = size / length
            masks.append(exact_count(numbers, size, valid))
        else:
            masks.append(bernoulli(numbers, t, valid))
        ratios.append(t)
    return View.of_mask(stack(masks, batch.valid), column(ratios, batch.valid))
