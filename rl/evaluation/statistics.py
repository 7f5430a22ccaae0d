"""Statistics of benchmark scores: unbiased pass@k, intervals, and paired tests between two checkpoints.

Pure functions of numbers. Every resample is keyed (see `keys`), so equal values give equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coupled.rl.keys import generator

NUM_RESAMPLES = 10_000
Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its 95 % confidence interval. Example: 0.54 [0.49, 0.59]."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def bootstrap(values: Sequence[float]) -> Interval:
    """Mean and its 95 % percentile bootstrap interval, resampling problems (not completions, which are
    correlated within a problem)."""
    array = np.asarray(values, dtype=np.float64)
    picks = generator("bootstrap", len(array)).integers(0, len(array), size=(NUM_RESAMPLES, len(array)))
    low, high = np.percentile(array[picks].mean(-1), [2.5, 97.5])
    return Interval(mean=float(array.mean()), low=float(low), high=float(high))


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n samples, drawn without replacement, hold a passing one.

    Unbiased for the chance that one of k fresh samples passes [Chen et al. 2021, eq. 1]. Needs k ≤ n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ n samples; got k={k}, n={num_samples}: sample more, or lower k")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def wilson(num_passed: int, num_trials: int) -> Interval:
    """Share with its 95 % score interval [Wilson 1927]: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    For independent yes-or-no trials: one completion per problem. It stays inside [0, 1] and has a width at 0 and 1.
    """
    if not 0 <= num_passed <= num_trials or num_trials == 0:
        raise ValueError(f"a share needs 0 ≤ passed ≤ trials and a trial; got {num_passed} of {num_trials}")
    share, z2 = num_passed / num_trials, Z_95**2
    centre = share + z2 / (2 * num_trials)
    spread = Z_95 * math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials**2))
    scale = 1 + z2 / num_trials
    return Interval(mean=share, low=max(0.0, (centre - spread) / scale), high=min(1.0, (centre + spread) / scale))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` under equal chances: min(1, 2 Σ_{i ≤ min} C(m, i) / 2^m).

    For problems with one completion each, wins and losses are the discordant pairs, and this is McNemar's exact test.
    """
    num = wins + losses
    tail = sum(math.comb(num, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**num)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Paired difference between two checkpoints on the same problems."""

    gain: Interval
    """Mean of second - first, with the paired bootstrap interval."""
    wins: int
    """Problems on which the second is better."""
    losses: int
    p_value: float
    test: str
    """`exact McNemar` where every problem has one completion on either side, else `sign test`."""


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """second - first, paired by problem, so that the problems' difficulty cancels."""
    if len(first) != len(second):
        raise ValueError(f"a paired comparison needs the same problems; got {len(first)} and {len(second)}")
    differences = np.subtract(second, first)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    is_binary = bool(np.isin([*first, *second], (0.0, 1.0)).all())
    return Comparison(
        gain=bootstrap(differences.tolist()),
        wins=wins,
        losses=losses,
        p_value=sign_test(wins, losses),
        test="exact McNemar" if is_binary else "sign test",
    )
