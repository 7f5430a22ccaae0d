"""Estimators of a completion's log-probability under a model that has no left-to-right likelihood.

An estimator is a module with two functions:

    draw(batch, config, key) -> MaskDraw          positions to hide, positions to score, divisors of the scores
    cost(config, canvas, steps) -> ScoringCost    masked inputs of a draw, for the estimates of `--dry-run`

`draw` is a pure function of its key, and it never sees the model. Scoring is the same for all of them
(`rl/estimators/score.py`), so estimators × model families is a product, without a file for each pair.

With `ℓ_k(M)` the log-probability of token k when the positions M are masked and the others visible, every estimate here
is linear: `s_k = 1/total · Σ_views 1[k ∈ scored] · ℓ_k(hidden) / divisor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coupled.rl.estimators import ar_order, coupled, espo, full_mask, gdpo, random_mask, trajectory
from coupled.rl.estimators.cost import ScoringCost
from coupled.rl.keys import Key
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskDraw, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatorModule:
    """The functions of one estimator."""

    draw: Callable[[TrainBatch, Estimator, tuple[Key, ...]], MaskDraw]
    cost: Callable[[Estimator, int, int], ScoringCost]
    """Arguments: the settings, the canvas in positions, and the steps in which a rollout commits it."""


ESTIMATORS: dict[str, EstimatorModule] = {
    "coupled": EstimatorModule(draw=coupled.draw, cost=coupled.cost),
    "decoupled": EstimatorModule(draw=coupled.draw, cost=coupled.cost),
    "full_mask": EstimatorModule(draw=full_mask.draw, cost=full_mask.cost),
    "random_mask": EstimatorModule(draw=random_mask.draw, cost=random_mask.cost),
    "espo": EstimatorModule(draw=espo.draw, cost=espo.cost),
    "gdpo": EstimatorModule(draw=gdpo.draw, cost=gdpo.cost),
    "trajectory": EstimatorModule(draw=trajectory.draw, cost=trajectory.cost),
    "ar_order": EstimatorModule(draw=ar_order.draw, cost=ar_order.cost),
}
"""Recipe name → estimator."""


def scoring_cost(estimator: Estimator, canvas: int, steps: int) -> ScoringCost:
    """Masked inputs of an estimate; `steps`: steps in which a rollout commits the `canvas` positions."""
    return ESTIMATORS[estimator.name].cost(estimator, canvas, steps)
