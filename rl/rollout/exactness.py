"""Error of bounded and approximate rollouts: the same prompts are decoded a second time, exactly, and compared.

The exact rollouts have the same random numbers, so that their tokens are the same where nothing is approximated. The
nucleus and the temperature stay as they are: they define the distribution and are no error in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coupled.rl.objective.batch import rewards_of
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.types import Group, Rollout

NUM_COMPARED = 4
"""Prompts of a step whose groups are decoded twice: few, so that the cost is small beside the step."""
TOLERANCE = 0.1
"""Accepted difference of the mean rewards, in units of the reward; beyond it, and beyond chance, it is a mismatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Mean differences between rollouts and their exact counterparts.

    Example: reward -0.3 ± 0.05, length +2.5 tokens, entropy -0.02 nats, 61 % of the positions alike.
    """

    reward: float
    """Difference of the mean rewards, in units of the reward; nan when nothing was scored."""
    reward_error: float
    """Standard error of `reward`, over pairs of completions."""
    completion_length: float
    """Difference of the mean lengths, in tokens."""
    entropy: float
    """Difference of the mean entropies at commit, in nats per token."""
    token_agreement: float
    """Share of the positions of the longer completion that hold the same token in both."""

    def is_beyond(self, tolerance: float) -> bool:
        """Whether the reward differs by more than the tolerance, and by more than chance does (two standard errors)."""
        return abs(self.reward) > max(tolerance, 2 * self.reward_error)

    def row(self) -> dict[str, float]:
        """The differences as metrics."""
        return {
            "mismatch/reward": self.reward,
            "mismatch/reward_error": self.reward_error,
            "mismatch/completion_length": self.completion_length,
            "mismatch/entropy": self.entropy,
            "mismatch/token_agreement": self.token_agreement,
        }

    def __str__(self) -> str:
        return (
            f"reward {self.reward:+.3f} (standard error {self.reward_error:.3f}), length {self.completion_length:+.1f} "
            f"tokens, entropy {self.entropy:+.3f} nats, {100 * self.token_agreement:.0f} % of the tokens alike"
        )


def exact_counterpart(sampler: Sampler) -> Sampler:
    """The sampler of the published loop, to the end of the canvas, for the same distribution."""
    return sampler.exact().changed(has_early_exit=False)


def compare(made: Sequence[Group], exact: Sequence[Group]) -> Mismatch:
    """Differences between groups and the exactly decoded groups of the same requests."""
    ours = [rollout for group in made for rollout in group.rollouts]
    theirs = [rollout for group in exact for rollout in group.rollouts]
    assert [r.uid for r in ours] == [r.uid for r in theirs], "the same requests"
    gaps = (rewards_of(made) - rewards_of(exact)).flatten().double().numpy()
    gaps = gaps[~np.isnan(gaps)]
    pairs = list(zip(ours, theirs, strict=True))
    return Mismatch(
        reward=float(gaps.mean()) if len(gaps) else math.nan,
        reward_error=float(gaps.std(ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0,
        completion_length=float(np.mean([a.completion_length - b.completion_length for a, b in pairs])),
        entropy=float(np.mean([_entropy(a) - _entropy(b) for a, b in pairs])),
        token_agreement=float(np.mean([token_agreement(a, b) for a, b in pairs])),
    )


def token_agreement(one: Rollout, other: Rollout) -> float:
    """Share of equal tokens, position by position, up to the end of the longer completion.

    Example: `a b c end` and `a x end` agree at one of four positions.
    """
    length = max(one.completion_length, other.completion_length)
    is_both = np.arange(length) < min(one.completion_length, other.completion_length)
    return float(np.mean((one.canvas_ids[:length] == other.canvas_ids[:length]) & is_both))


def _entropy(rollout: Rollout) -> float:
    return float(rollout.commit_entropy[: rollout.completion_length].mean())
