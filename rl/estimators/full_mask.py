"""The fully masked estimate [d1]: `s_k = ℓ_k(V)`, every token predicted from the prompt alone.

One forward pass, and no randomness; a mean-field approximation, which no completion with inner structure satisfies.
"""

from __future__ import annotations

from coupled.rl.estimators.cost import ScoringCost
from coupled.rl.keys import Key
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskDraw, TrainBatch, View


def draw(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> MaskDraw:
    """Hide all of V, score all of V."""
    return MaskDraw(forwards=((View.fully_masked(batch.valid),),), total=1)


def cost(config: Estimator, canvas: int, steps: int) -> ScoringCost:
    """The fully masked view, which scores every position."""
    return ScoringCost(own_views=0, shared_views=1, scored=canvas)
