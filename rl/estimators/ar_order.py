"""The exact log-likelihood of a sampler that decodes left to right [JustGRPO]: `s_k = log p(y_k | c, y_{<k})`.

Everything from k on is MASK, also beyond the end token. One forward pass per canvas position: for small models, and the
oracle in tests, because Σ_k s_k is the log of a probability that sums to 1 over all completions.
"""

from __future__ import annotations

import torch

from coupled.rl.estimators.cost import ScoringCost
from coupled.rl.keys import Key
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskDraw, TrainBatch, View


def draw(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> MaskDraw:
    """View k hides positions k … C-1 and scores k."""
    size, canvas = batch.valid.shape
    place = torch.arange(canvas, device=batch.valid.device)
    one = torch.ones(size, dtype=torch.float64, device=batch.valid.device)
    forwards = tuple(
        (View(hidden=(place >= k).expand(size, -1), scored=(place == k) & batch.valid, divisor=one),)
        for k in range(canvas)
    )
    return MaskDraw(forwards=forwards, total=1)


def cost(config: Estimator, canvas: int, steps: int) -> ScoringCost:
    """One view per canvas position, each with one scored position; the first hides everything and is not shared."""
    return ScoringCost(own_views=canvas, shared_views=0, scored=canvas)
