"""Mask draws for scoring: pure functions of a key, shared by old, reference and new.

Shapes: B rows, C canvas positions. The key of a draw is (run seed, step, inner iteration, sample uid, pair), so the
masks of a sample are the same for every micro-batch split, worker count and resumption.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coupled.rl.keys import Key, generator
from coupled.rl.recipe import Estimator
from coupled.rl.types import MaskPair, TrainBatch


def draw_masks(batch: TrainBatch, estimator: Estimator, key: tuple[Key, ...]) -> tuple[MaskPair, ...]:
    """The mask pairs that score a batch once: `num_pairs` of them, t ~ U(lo, hi) per sample and pair.

    `coupled`: the second mask of a pair is the complement of the first inside the valid positions.
    `decoupled`: the second is drawn independently, with ratio 1 - t. `full_mask`: no pairs are needed.
    """
    if estimator.name == "full_mask":
        return ()
    return tuple(_draw_pair(batch, estimator, (*key, pair)) for pair in range(estimator.num_pairs))


def _draw_pair(batch: TrainBatch, estimator: Estimator, key: tuple[Key, ...]) -> MaskPair:
    low, high = estimator.mask_ratio
    canvas = batch.canvas_length
    ratios, firsts, seconds = [], [], []
    for uid in batch.uids:
        stream = generator(*key, uid)
        t = low + (high - low) * stream.random()
        ratios.append(t)
        firsts.append(stream.random(canvas) < t)
        seconds.append(stream.random(canvas) < 1 - t)
    valid = batch.valid
    ratio = torch.tensor(ratios, dtype=torch.float32, device=valid.device)
    first = _stack(firsts).to(valid.device)
    if estimator.name == "coupled":
        return MaskPair.complementary(ratio, first, valid)
    return MaskPair(ratio=ratio, first=first & valid, second=_stack(seconds).to(valid.device) & valid)


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
