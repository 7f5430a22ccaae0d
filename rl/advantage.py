"""Group-relative advantages [GRPO]: how much better a completion is than the others of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from coupled.rl.shapes import Float

EPSILON = 1e-4


def group_advantages(rewards: Float[Tensor, "P G"], kind: str) -> Float[Tensor, "P G"]:
    """Advantages of completions within their group; NaN rewards (no verdict) are left out and get 0.

    mean:  A_i = r_i - mean(r)
    loo:   A_i = r_i - mean of the others = (r_i - mean(r)) · n / (n - 1)
    z:     A_i = (r_i - mean(r)) / (std(r) + 1e-4), std with n - 1

    Example: rewards [0, 1, 2] → mean [-1, 0, 1], loo [-1.5, 0, 1.5], z [-1, 0, 1] / 1.0001.
    A group with fewer than two verdicts has nothing to compare: its advantages are 0.
    """
    known = ~rewards.isnan()
    count = known.sum(-1, keepdim=True)
    filled = rewards.nan_to_num(0.0)
    centred = torch.where(known, filled - filled.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
    if kind == "loo":
        centred = centred * count / (count - 1).clamp(min=1)
    elif kind == "z":
        variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + EPSILON)
    elif kind != "mean":
        raise ValueError(f"advantage must be mean, loo or z; got {kind!r}")
    return torch.where(count >= 2, centred, 0.0)
