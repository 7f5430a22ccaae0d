from __future__ import annotations

import pytest
import torch

from coupled.rl.objective.advantage import filter_groups, group_advantages

NAN = float("nan")


def advantages(rows: list[list[float]], kind: str) -> list[list[float]]:
    return group_advantages(torch.tensor(rows), kind).tolist()


def near(rows: list[list[float]]) -> list[object]:
    return [pytest.approx(row, abs=1e-5) for row in rows]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # rewards [0, 1, 2, 5]: mean 2, squares of the differences 4, 1, 0, 9 → variance 14/3, std 2.1602469.
        ("mean", [-2.0, -1.0, 0.0, 3.0]),
        # 0 - (1+2+5)/3, 1 - (0+2+5)/3, 2 - (0+1+5)/3, 5 - (0+1+2)/3
        ("loo", [-2.6666667, -1.3333333, 0.0, 4.0]),
        ("z", [-0.9257772, -0.4628886, 0.0, 1.3886658]),
        # e^r: 1, 2.7182818, 7.3890561, 148.4131591 of 159.5204970; e^-r: 1, .3678794, .1353353, .0067379 of 1.5099527
        ("softmax", [-0.6560036, -0.2265961, -0.0433084, 0.9259083]),
    ],
)
def test_advantages_match_the_hand_computation(kind: str, expected: list[float]) -> None:
    assert advantages([[0.0, 1.0, 2.0, 5.0]], kind) == near([expected])


def test_the_standardised_advantage_has_its_epsilon_outside_the_root() -> None:
    """std([0, 2e-4]) is √2·1e-4, so the advantages are ∓1e-4 / (√2·1e-4 + 1e-4)."""
    assert advantages([[0.0, 2e-4]], "z") == near([[-0.4142136, 0.4142136]])


@pytest.mark.parametrize("kind", ["mean", "loo", "z", "softmax"])
def test_groups_do_not_influence_each_other(kind: str) -> None:
    rows = [[0.0, 1.0, 2.0], [5.0, 5.0, 8.0], [1.0, 1.0, 1.0]]
    together = advantages(rows, kind)
    assert together == [advantages([row], kind)[0] for row in rows]
    assert together[2] == [0.0, 0.0, 0.0], "equal rewards teach nothing"
    shifted = advantages([[r + 3.0 for r in row] for row in rows], kind)
    assert shifted == near(together), "only differences count"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", [-0.5, 0.0, 0.5]),
        ("loo", [-1.0, 0.0, 1.0]),
        # std of [0, 1] is 0.70710678
        ("z", [-0.7070068, 0.0, 0.7070068]),
        # (e - 1) / (e + 1)
        ("softmax", [-0.4621172, 0.0, 0.4621172]),
    ],
)
def test_a_missing_verdict_is_left_out_and_gets_zero(kind: str, expected: list[float]) -> None:
    assert advantages([[0.0, NAN, 1.0]], kind) == near([expected])


@pytest.mark.parametrize("kind", ["mean", "loo", "z", "softmax"])
@pytest.mark.parametrize("row", [[NAN, 3.0, NAN], [NAN, NAN, NAN], [3.0]])
def test_a_group_with_fewer_than_two_verdicts_has_nothing_to_compare(kind: str, row: list[float]) -> None:
    assert advantages([row], kind) == [[0.0] * len(row)]


@pytest.mark.parametrize("kind", ["mean", "loo", "z", "softmax"])
def test_advantages_of_a_group_add_up_to_zero(kind: str) -> None:
    rewards = torch.randn((20, 7), generator=torch.Generator().manual_seed(0))
    assert group_advantages(rewards, kind).sum(-1).abs().max() < 1e-5


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mean, loo, z or softmax; got 'median'"):
        group_advantages(torch.zeros(1, 2), "median")


# --- filters --------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor(
    [
        [0.5, 0.5, 0.5, 0.5],  # nothing passes, equal rewards
        [0.0, 0.5, 0.0, 0.5],  # nothing passes, but the format differs
        [2.5, 0.5, 0.5, 0.5],  # one of four passes
        [2.5, 2.5, 2.5, NAN],  # three of three that were judged
        [NAN, NAN, 2.5, NAN],  # one verdict: nothing to compare
        [NAN, NAN, NAN, NAN],
    ]
)
PASSED = torch.tensor(
    [[0.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, NAN], [NAN, NAN, 1.0, NAN], [NAN] * 4]
)


@pytest.mark.parametrize(
    ("kind", "bounds", "kept", "too_hard", "too_easy"),
    [
        ("none", (0.0, 1.0), [1, 1, 1, 1, 1, 1], [0] * 6, [0] * 6),
        ("zero_std", (0.0, 1.0), [0, 1, 1, 0, 0, 0], [0] * 6, [0] * 6),
        ("accuracy", (0.0, 1.0), [0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]),
        ("accuracy", (0.25, 1.0), [0] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]),
        ("accuracy", (0.0, 0.2), [0] * 6, [1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]),
    ],
)
def test_filters_keep_and_drop_what_they_say(
    kind: str, bounds: tuple[float, float], kept: list[int], too_hard: list[int], too_easy: list[int]
) -> None:
    found = filter_groups(REWARDS, PASSED, kind, bounds)
    assert found.is_kept.int().tolist() == kept
    assert found.is_too_hard.int().tolist() == too_hard
    assert found.is_too_easy.int().tolist() == too_easy


def test_equal_rewards_are_dropped_however_their_mean_rounds() -> None:
    """The mean of three times 0.1 is not 0.1 in float32, so that a deviation may come out a little above 0."""
    rewards = torch.tensor([[0.1] * 3, [0.7] * 3, [0.1, 0.1, 0.1000001]])
    assert filter_groups(rewards, rewards, "zero_std", (0.0, 1.0)).is_kept.tolist() == [False, False, True]


@pytest.mark.parametrize("kind", ["mean", "loo", "z", "softmax"])
def test_what_zero_std_drops_has_no_advantage(kind: str) -> None:
    dropped = ~filter_groups(REWARDS, PASSED, "zero_std", (0.0, 1.0)).is_kept
    advantages = group_advantages(REWARDS, kind)
    assert (advantages[dropped] == 0).all()
    assert (advantages[~dropped] != 0).any(-1).all()


def test_an_unknown_filter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="none, zero_std or accuracy; got 'std'"):
        filter_groups(REWARDS, PASSED, "std", (0.0, 1.0))
