"""Group-relative advantages [GRPO]: the reward of a completion relative to the other completions of its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coupled.rl.shapes import Bool, Float

EPSILON = 1e-4


def group_advantages(rewards: Float[Tensor, "P G"], kind: str) -> Float[Tensor, "P G"]:
    """Advantages of completions within their group; completions without a verdict (NaN) are left out and get 0.

    mean:  A_i = r_i - mean(r)
    loo:   A_i = r_i - mean of the others = (r_i - mean(r)) · n / (n - 1)
    z:     A_i = (r_i - mean(r)) / (std(r) + 1e-4), std with n - 1
    softmax:  A_i = exp(r_i) / Σ_j exp(r_j) - exp(-r_i) / Σ_j exp(-r_j), the weights w⁺ - w⁻ of wd1

    Example: rewards [0, 1, 2] → mean [-1, 0, 1], loo [-1.5, 0, 1.5], z [-1, 0, 1] / 1.0001, softmax [-.575, 0, .575].
    The advantages of a group with fewer than two verdicts are 0.
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
    elif kind == "softmax":
        # Subtracting the mean does not change the softmax.
        weights = [torch.where(known, sign * centred, -torch.inf).softmax(-1) for sign in (1, -1)]
        centred = torch.where(known, weights[0] - weights[1], 0.0)
    elif kind != "mean":
        raise ValueError(f"advantage must be mean, loo, z or softmax; got {kind!r}")
    return torch.where(count >= 2, centred, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupFilter:
    """The groups that are trained on. Example: three groups, the second too easy → `is_kept` [1, 0, 1]."""

    is_kept: Bool[Tensor, " P"]
    is_too_hard: Bool[Tensor, " P"]
    """Dropped because too few completions pass (accuracy filter only)."""
    is_too_easy: Bool[Tensor, " P"]
    """Dropped because too many completions pass (accuracy filter only)."""


def filter_groups(
    rewards: Float[Tensor, "P G"], passed: Float[Tensor, "P G"], kind: str, accuracy_range: tuple[float, float]
) -> GroupFilter:
    """Drop groups without information. Tokens are counted afterwards, so the other groups weigh more.

    Args:
        rewards: NaN where there is no verdict.
        passed: 1 where all hidden tests pass, 0 where one fails, NaN where they were not judged.
        kind: `none` keeps all; `zero_std` drops groups whose rewards are all equal or fewer than two; `accuracy`
            keeps groups whose share of passing completions is strictly inside `accuracy_range` [DAPO].
    """
    nothing = torch.zeros(len(rewards), dtype=torch.bool)
    if kind == "none":
        return GroupFilter(is_kept=~nothing, is_too_hard=nothing, is_too_easy=nothing)
    if kind == "zero_std":
        # Extremes are compared rather than a rounded deviation; a group without verdicts has -inf and inf.
        highest = rewards.nan_to_num(nan=-torch.inf).amax(-1)
        lowest = rewards.nan_to_num(nan=torch.inf).amin(-1)
        return GroupFilter(is_kept=highest > lowest, is_too_hard=nothing, is_too_easy=nothing)
    if kind == "accuracy":
        low, high = accuracy_range
        accuracy = passed.nanmean(-1)  # NaN where no completion was judged: all comparisons are false
        return GroupFilter(
            is_kept=(accuracy > low) & (accuracy < high), is_too_hard=accuracy <= low, is_too_easy=accuracy >= high
        )
    raise ValueError(f"group_filter must be none, zero_std or accuracy; got {kind!r}")
