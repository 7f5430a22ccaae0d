"""Estimators of a completion's log-probability under a model that has no left-to-right likelihood.

An estimator is one function, `draw(batch, config, key) -> MaskDraw`: which positions to hide, which of them to score
and what to divide each score by. It is a pure function of its key, and it never sees the model. Scoring is the same for
all of them (`rl/estimators/score.py`), so estimators × model families is a product, without a file for each pair.

With `ℓ_k(M)` the log-probability of token k when the positions M are masked and the others visible, every estimate here
is linear: `s_k = 1/total · Σ_views 1[k ∈ scored] · ℓ_k(hidden) / divisor`.
"""

from __future__ import annotations

from collections.abc import Callable

from coupled.rl.estimators import ar_order, coupled, espo, full_mask, gdpo, random_mask, trajectory
from coupled.rl.keys import Key
from coupled.rl.recipe.schema import Estimator
from coupled.rl.types import MaskDraw, TrainBatch

Draw = Callable[[TrainBatch, Estimator, tuple[Key, ...]], MaskDraw]

ESTIMATORS: dict[str, Draw] = {
    "coupled": coupled.draw,
    "decoupled": coupled.draw,
    "full_mask": full_mask.draw,
    "random_mask": random_mask.draw,
    "espo": espo.draw,
    "gdpo": gdpo.draw,
    "trajectory": trajectory.draw,
    "ar_order": ar_order.draw,
}
"""By the name in the recipe."""
