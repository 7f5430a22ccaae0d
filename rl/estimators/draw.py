"""Mask draws for scoring: pure functions of a key, shared by old, reference and new.

Shapes: B rows, C canvas positions, S prompt + canvas. The key of a draw is (run seed, step, inner iteration, mask,
sample uid), so the masks of a sample are the same for every micro-batch split, worker count and resumption.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from coupled.rl.estimators import ESTIMATORS
from coupled.rl.keys import Key, generator
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskDraw, TrainBatch


def draw_masks(batch: TrainBatch, estimator: Estimator, key: tuple[Key, ...]) -> MaskDraw:
    """The masked inputs of the recipe's estimator that score a batch once, and how their log-probabilities are summed.

    With `prompt_mask_probability` p > 0 each prompt token is hidden with probability p in all inputs of the draw [d1].
    """
    draw = ESTIMATORS[estimator.name].draw(batch, estimator, key)
    if estimator.prompt_mask_probability == 0:
        return draw
    return replace(draw, hidden_prompt=_hidden_prompt(batch, estimator.prompt_mask_probability, key))


def _hidden_prompt(batch: TrainBatch, probability: float, key: tuple[Key, ...]) -> Tensor:
    width = batch.ids.shape[1] - batch.canvas_length
    hidden = np.zeros((len(batch), width), dtype=bool)
    for row, (uid, pad) in enumerate(zip(batch.uids, batch.pad_lengths.tolist(), strict=True)):
        # Counted from the first real token, so that padding does not move the draws.
        hidden[row, pad:] = generator(*key, "prompt", uid).random(width - pad) < probability
    return torch.from_numpy(hidden).to(batch.valid.device)
