from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import global_random_states

from coupled.rl.noise import bernoulli_mask, diffusion_loss, stratified_ratios


@pytest.mark.parametrize(("size", "low", "high"), [(1, 0.0, 1.0), (8, 0.001, 1.0), (64, 0.2, 0.8), (7, 0.5, 0.5)])
def test_mask_ratios_lie_in_their_range_one_in_each_of_equal_parts(size: int, low: float, high: float) -> None:
    ratios = stratified_ratios(size, low, high, 0, "ratio", 3)
    assert ratios.shape == (size,)
    assert ratios.min() >= low - 1e-6
    assert ratios.max() <= high + 1e-6
    if high > low:
        gaps = np.diff(np.sort(ratios.numpy()))
        assert gaps == pytest.approx((high - low) / size, abs=1e-5)


def test_each_mask_ratio_is_uniform_over_the_keys() -> None:
    first = np.array([float(stratified_ratios(4, 0.0, 1.0, 0, i)[0]) for i in range(1000)])
    counts = np.histogram(first, bins=10, range=(0, 1))[0]
    assert (np.square(counts - 100) / 100).sum() < 27.9, "chi-square, 9 degrees of freedom, p = 0.001"


def test_noise_masks_valid_positions_at_the_ratio_of_their_row() -> None:
    valid = torch.ones((3, 4000), dtype=torch.bool)
    valid[:, 3000:] = False
    mask = bernoulli_mask(torch.tensor([0.1, 0.5, 1.0]), valid, 0, "mask", 1)
    assert not mask[:, 3000:].any()
    share = mask[:, :3000].float().mean(1)
    assert share.tolist() == pytest.approx([0.1, 0.5, 1.0], abs=0.03)
    assert share[2] == 1.0


def test_noise_is_a_function_of_its_key_alone() -> None:
    valid, ratio = torch.ones((2, 50), dtype=torch.bool), torch.tensor([0.5, 0.5])
    before = global_random_states()
    one = bernoulli_mask(ratio, valid, 0, "mask", 1)
    assert torch.equal(one, bernoulli_mask(ratio, valid, 0, "mask", 1))
    assert not torch.equal(one, bernoulli_mask(ratio, valid, 0, "mask", 2))
    assert not torch.equal(one, bernoulli_mask(ratio, valid, 1, "mask", 1))
    assert torch.equal(stratified_ratios(4, 0.0, 1.0, "a"), stratified_ratios(4, 0.0, 1.0, "a"))
    assert global_random_states() == before


def test_the_diffusion_loss_matches_the_hand_computation() -> None:
    """Row 0: (1 + 2) / 0.5 = 6; row 1: 3 / 0.25 = 12; over 6 positions: 3."""
    logp = torch.tensor([[-1.0, -2.0, -50.0], [-60.0, -70.0, -3.0]])
    masked = torch.tensor([[True, True, False], [False, False, True]])
    assert float(diffusion_loss(logp, masked, torch.tensor([0.5, 0.25]), 6)) == pytest.approx(3.0)


def test_the_diffusion_loss_is_unbiased_where_the_context_does_not_matter() -> None:
    """E[1/t · Σ over masked] = Σ over all positions: here 8 nats a row."""
    size = 4000
    logp = torch.full((size, 4), -2.0)
    valid = torch.ones((size, 4), dtype=torch.bool)
    ratio = stratified_ratios(size, 0.1, 1.0, "t")
    loss = diffusion_loss(logp, bernoulli_mask(ratio, valid, "m"), ratio, size)
    assert float(loss) == pytest.approx(8.0, rel=0.03)
