"""The rollout's own decoding order, replayed [TraceRL; CJ-GRPO; AGRPO].

The sampler committed token k at step τ_k, when exactly the tokens with τ < τ_k stood on the canvas:

    s_k = log p(y_k | c, {y_i : τ_i < τ_k}),   so that Σ_k s_k is the log-probability of the steps that were taken

One forward pass per step. `shrink` = n groups n consecutive steps into one, ⌊τ/n⌋, and hides slightly too
much. `num_sampled_steps` = S scores S of a completion's T (grouped) steps, drawn uniformly without replacement, each
divided by S/T, the probability that it is drawn: the sum over tokens stays unbiased.

At `shrink` 1 and the rollout's temperature s_k is the log-probability under which k was sampled (top-p 1).
"""

from __future__ import annotations

import numpy as np
import torch

from coupled.rl.estimators.cost import ScoringCost
from coupled.rl.estimators.subsets import column, stack
from coupled.rl.keys import Key, generator
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskDraw, TrainBatch, View


def draw(batch: TrainBatch, config: Estimator, key: tuple[Key, ...]) -> MaskDraw:
    """One view per step; the v-th view holds the v-th step of each row, so rows with fewer steps add no cost.

    Raises:
        ValueError: the batch has no commit steps.
    """
    if batch.commit_step is None:
        raise ValueError(
            "the trajectory estimator replays the steps of the rollout, but the batch has commit_step=None; make it "
            "with coupled.rl.objective.batch.collate, or choose another estimator.name"
        )
    steps, valid = batch.commit_step.cpu().numpy(), batch.valid.cpu().numpy()
    # A position that was never committed has a step of -1, which hides it nowhere: the canvas still holds MASK there.
    grouped = steps // config.shrink
    chosen, shares = [], []
    for row, uid in enumerate(batch.uids):
        taken = np.unique(grouped[row][valid[row]])
        num_scored = min(config.num_sampled_steps or len(taken), len(taken))
        shares.append(num_scored / max(1, len(taken)) or 1.0)
        if num_scored < len(taken):
            taken = np.sort(generator(*key, uid).permutation(taken)[:num_scored])
        chosen.append(taken)
    share = column(shares, batch.valid)
    forwards = []
    for place in range(max(1, *(len(taken) for taken in chosen))):
        hidden = np.zeros_like(valid)
        scored = np.zeros_like(valid)
        for row, taken in enumerate(chosen):
            if place < len(taken):
                hidden[row] = grouped[row] >= taken[place]
                scored[row] = (grouped[row] == taken[place]) & valid[row]
        forwards.append((View(hidden=_tensor(hidden, batch), scored=_tensor(scored, batch), divisor=share),))
    return MaskDraw(forwards=tuple(forwards), total=1)


def cost(config: Estimator, canvas: int, steps: int) -> ScoringCost:
    """One view per replayed step, at most one for each of the `steps` in which the rollout committed the canvas."""
    replayed = -(-steps // config.shrink)
    views = min(config.num_sampled_steps or replayed, replayed)
    return ScoringCost(own_views=views, shared_views=0, scored=canvas * views / replayed)


def _tensor(rows: np.ndarray, batch: TrainBatch) -> torch.Tensor:
    return stack(list(rows), batch.valid)
