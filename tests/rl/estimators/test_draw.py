from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.toys import global_random_states, make_batch

from coupled.rl.estimators.coupled import draw_pairs
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.objective.batch import micro_batches
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskPair, TrainBatch

COUPLED = Estimator(num_pairs=3)
KEY = (0, "mask", 4, 1)


def many_rows(size: int = 2000, canvas: int = 8) -> TrainBatch:
    """Rows of 5 valid positions of 8."""
    return make_batch([2] * size, [5] * size, canvas=canvas)


def same(one: tuple[MaskPair, ...], other: tuple[MaskPair, ...]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.ratio, b.ratio) and torch.equal(a.first, b.first) and torch.equal(a.second, b.second)
        for a, b in zip(one, other, strict=True)
    )


def test_each_valid_position_is_masked_in_exactly_one_of_each_coupled_pair() -> None:
    batch = many_rows(50)
    pairs = draw_pairs(batch, COUPLED, KEY)
    assert len(pairs) == 3
    for pair in pairs:
        assert torch.equal(pair.first.int() + pair.second.int(), batch.valid.int())


@pytest.mark.parametrize("name", ["coupled", "decoupled"])
def test_nothing_outside_the_valid_positions_is_ever_masked(name: str) -> None:
    batch = many_rows(200)
    for pair in draw_pairs(batch, Estimator(name=name, num_pairs=2), KEY):
        assert pair.first.any()
        assert pair.second.any()
        assert not (pair.first & ~batch.valid).any()
        assert not (pair.second & ~batch.valid).any()


def test_a_decoupled_pair_is_independent_and_its_second_mask_has_ratio_1_minus_t() -> None:
    batch = make_batch([1] * 4000, [8] * 4000, canvas=8)
    (pair,) = draw_pairs(batch, Estimator(name="decoupled", mask_ratio=(0.3, 0.7)), KEY)
    assert not torch.equal(pair.second, batch.valid & ~pair.first)
    ratio = pair.ratio[:, None]
    excess_first, excess_second = pair.first.float() - ratio, pair.second.float() - (1 - ratio)
    for rows in (pair.ratio < 0.5, pair.ratio > 0.5):
        # About 16 000 Bernoulli draws each: a standard error of at most 0.004.
        assert abs(excess_first[rows].mean()) < 0.015
        assert abs(excess_second[rows].mean()) < 0.015
    assert abs((excess_first * excess_second).mean()) < 0.01, "coupled masks would have about -0.24"


def test_a_coupled_first_mask_has_ratio_t_whatever_t_is() -> None:
    batch = make_batch([1] * 4000, [8] * 4000, canvas=8)
    (pair,) = draw_pairs(batch, Estimator(mask_ratio=(0.2, 0.8)), KEY)
    share = pair.first.float().mean(1)
    low, high = pair.ratio < 0.4, pair.ratio > 0.6
    assert abs(share[low].mean() - pair.ratio[low].mean()) < 0.02
    assert abs(share[high].mean() - pair.ratio[high].mean()) < 0.02


def test_mask_ratios_are_drawn_per_sample_and_pair_evenly_over_their_range() -> None:
    pairs = draw_pairs(many_rows(), Estimator(num_pairs=2, mask_ratio=(0.2, 0.8)), KEY)
    for pair in pairs:
        assert pair.ratio.min() >= 0.2
        assert pair.ratio.max() <= 0.8
        counts = np.histogram(pair.ratio.numpy(), bins=6, range=(0.2, 0.8))[0]
        assert (np.square(counts - 2000 / 6) / (2000 / 6)).sum() < 20.5, "chi-square, 5 degrees of freedom, p = 0.001"
    assert abs(np.corrcoef(pairs[0].ratio.numpy(), pairs[1].ratio.numpy())[0, 1]) < 0.1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_masks_are_the_same_for_any_micro_batch_split(size: int) -> None:
    batch = make_batch([2, 3, 4, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1, 6])
    joint = draw_pairs(batch, COUPLED, KEY)
    for rows in micro_batches(len(batch), size):
        assert same(draw_pairs(batch.rows(rows), COUPLED, KEY), tuple(p.rows(rows) for p in joint))


@pytest.mark.parametrize("name", ["coupled", "decoupled"])
def test_masks_are_the_same_for_any_row_order_and_any_call(name: str) -> None:
    estimator = Estimator(name=name, num_pairs=2)
    batch = make_batch([3] * 4, [6] * 4)
    order = [2, 0, 3, 1]
    shuffled = TrainBatch(
        uids=tuple(batch.uids[i] for i in order),
        ids=batch.ids[order],
        pad_lengths=batch.pad_lengths[order],
        valid=batch.valid[order],
        advantages=batch.advantages[order],
        is_scored=batch.is_scored[order],
    )
    first = draw_pairs(batch, estimator, KEY)
    expected = tuple(MaskPair(ratio=p.ratio[order], first=p.first[order], second=p.second[order]) for p in first)
    assert same(draw_pairs(shuffled, estimator, KEY), expected)
    assert same(draw_pairs(batch, estimator, KEY), first)


@pytest.mark.parametrize(
    "key",
    [(1, "mask", 4, 1), (0, "mask", 5, 1), (0, "mask", 4, 0)],
    ids=["another seed", "another step", "another inner iteration"],
)
def test_another_key_gives_other_masks(key: tuple[int | str, ...]) -> None:
    batch = make_batch([2] * 6, [6] * 6)
    (one,), (other,) = draw_pairs(batch, Estimator(), KEY), draw_pairs(batch, Estimator(), key)
    assert not torch.equal(one.ratio, other.ratio)
    assert not torch.equal(one.first, other.first)


def test_another_uid_or_pair_gives_other_masks() -> None:
    batch = make_batch([2] * 6, [6] * 6, uids=[f"completion-{i}" for i in range(6)])
    first, second = draw_pairs(batch, Estimator(num_pairs=2), KEY)
    assert len(set(first.ratio.tolist()) | set(second.ratio.tolist())) == 12
    assert not torch.equal(first.first, second.first)


def test_the_masks_of_a_key_never_change_between_versions() -> None:
    batch = make_batch([2], [6], uids=["step-1/0-list/0"])
    (pair,) = draw_pairs(batch, Estimator(), (0, "mask", 1, 0))
    assert pair.ratio.tolist() == pytest.approx([0.5671], abs=1e-4)
    assert pair.first.int().tolist() == [[0, 1, 0, 1, 1, 0]]


def test_full_mask_draws_nothing() -> None:
    (view,) = draw_masks(make_batch(), Estimator(name="full_mask"), KEY).views
    assert torch.equal(view.hidden, make_batch().valid)
    assert torch.equal(view.scored, make_batch().valid)


@pytest.mark.parametrize("name", ["coupled", "decoupled", "full_mask"])
def test_drawing_masks_leaves_every_global_generator_untouched(name: str) -> None:
    before = global_random_states()
    draw_masks(make_batch(), Estimator(name=name), KEY)
    assert global_random_states() == before
