from __future__ import annotations

from itertools import combinations

import pytest

from coupled.rl.evaluation.statistics import Interval, compare_paired, pass_at_k, sign_test, wilson


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 2), (3, 2, 3)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_passing_sample(n: int, c: int, k: int) -> None:
    subsets = list(combinations(range(n), k))
    share = sum(any(sample < c for sample in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(n, c, k) == pytest.approx(share)


def test_pass_at_k_of_known_values() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(200, 10, 100) == pytest.approx(0.9992, abs=1e-4)


@pytest.mark.parametrize("k", [0, 6])
def test_pass_at_k_of_more_than_there_are_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="1 ≤ k ≤ n"):
        pass_at_k(5, 2, k)


@pytest.mark.parametrize(
    ("passed", "trials", "low", "high"),
    # The published examples of the score interval: 0 of 10, 1 of 10, 81 of 263, 15 of 148.
    [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_the_wilson_interval_is_the_published_one(passed: int, trials: int, low: float, high: float) -> None:
    found = wilson(passed, trials)
    assert found.low == pytest.approx(low, abs=1e-4)
    assert found.high == pytest.approx(high, abs=1e-4)


def test_the_wilson_interval_is_symmetric_in_what_is_called_a_success() -> None:
    one, other = wilson(3, 20), wilson(17, 20)
    assert one.low == pytest.approx(1 - other.high)
    assert wilson(20, 20).high == 1.0
    assert wilson(20, 20).low < 1.0


@pytest.mark.parametrize(("passed", "trials"), [(3, 2), (-1, 2), (0, 0)])
def test_a_share_of_nothing_or_above_one_is_refused(passed: int, trials: int) -> None:
    with pytest.raises(ValueError, match="0 ≤ passed ≤ trials"):
        wilson(passed, trials)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (6, 1, 2 * 8 / 128), (3, 3, 1.0), (10, 2, 158 / 4096)],
)
def test_the_sign_test_is_exact(wins: int, losses: int, p: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(p)


def test_a_comparison_of_single_completions_is_mcnemars() -> None:
    found = compare_paired([0.0, 0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0, 0.0])
    assert (found.wins, found.losses, found.test) == (2, 1, "exact McNemar")
    assert found.p_value == 1.0
    assert found.gain.mean == pytest.approx(0.2)


def test_a_comparison_of_pass_rates_pairs_problems() -> None:
    first = [i / 100 for i in range(50)]
    found = compare_paired(first, [rate + 0.25 for rate in first])
    assert found.test == "sign test"
    assert (found.wins, found.losses) == (50, 0)
    assert found.p_value == pytest.approx(2 / 2**50)
    assert found.gain.low == pytest.approx(0.25)
    assert found.gain.high == pytest.approx(0.25)


def test_equal_checkpoints_differ_by_nothing() -> None:
    found = compare_paired([0.0, 1.0, 0.5], [0.0, 1.0, 0.5])
    assert found.gain == Interval(mean=0.0, low=0.0, high=0.0)
    assert found.p_value == 1.0


def test_other_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="same problems"):
        compare_paired([1.0], [1.0, 0.0])
