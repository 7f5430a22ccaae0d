from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from helpers.toys import global_random_states

from coupled.rl.likelihood.noise import (
    NO_UNIT,
    bernoulli_mask,
    clipped_mask,
    diffusion_loss,
    forced_marginal,
    shuffled,
    stratified_ratios,
    warmup_cap,
)

NUM = 20_000
"""Blocks in a statistical test: shares are then within .02 of their expectation in far more than 99.9 % of cases."""


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


def test_shuffled_ratios_are_the_same_ones() -> None:
    ratios = stratified_ratios(50, 0.0, 1.0, 0)
    moved = shuffled(ratios, 0, "order")
    assert torch.equal(moved.sort().values, ratios.sort().values)
    assert not torch.equal(moved, ratios)
    assert torch.equal(moved, shuffled(ratios, 0, "order"))


def test_noise_masks_valid_positions_at_the_ratio_of_their_row() -> None:
    valid = torch.ones((3, 4000), dtype=torch.bool)
    valid[:, 3000:] = False
    ratio = torch.tensor([0.1, 0.5, 1.0])[:, None].expand(3, 4000)
    mask = bernoulli_mask(ratio, valid, 0, "mask", 1)
    assert not mask[:, 3000:].any()
    share = mask[:, :3000].float().mean(1)
    assert share.tolist() == pytest.approx([0.1, 0.5, 1.0], abs=0.03)
    assert share[2] == 1.0


def test_noise_is_a_function_of_its_key_alone() -> None:
    valid, ratio = torch.ones((2, 50), dtype=torch.bool), torch.full((2, 50), 0.5)
    units = torch.arange(2)[:, None].expand(2, 50).contiguous()
    before = global_random_states()
    for draw in (
        lambda *key: bernoulli_mask(ratio, valid, *key),
        lambda *key: clipped_mask(ratio, units, 50, *key)[0],
    ):
        one = draw(0, "mask", 1)
        assert torch.equal(one, draw(0, "mask", 1))
        assert not torch.equal(one, draw(0, "mask", 2))
        assert not torch.equal(one, draw(1, "mask", 1))
    assert torch.equal(stratified_ratios(4, 0.0, 1.0, "a"), stratified_ratios(4, 0.0, 1.0, "a"))
    assert global_random_states() == before


def test_the_diffusion_loss_matches_the_hand_computation() -> None:
    """Row 0: (1 + 2) / 0.5 = 6; row 1: 3 / 0.25 = 12; over 6 positions: 3."""
    logp = torch.tensor([[-1.0, -2.0, -50.0], [-60.0, -70.0, -3.0]])
    masked = torch.tensor([[True, True, False], [False, False, True]])
    divisor = torch.tensor([0.5, 0.25])[:, None].expand(2, 3)
    assert float(diffusion_loss(logp, masked, divisor, 6)) == pytest.approx(3.0)


def test_the_diffusion_loss_is_unbiased_where_the_context_does_not_matter() -> None:
    """E[1/t · Σ over masked] = Σ over all positions: here 8 nats a row."""
    size = 4000
    logp = torch.full((size, 4), -2.0)
    valid = torch.ones((size, 4), dtype=torch.bool)
    ratio = stratified_ratios(size, 0.1, 1.0, "t")[:, None].expand(size, 4)
    loss = diffusion_loss(logp, bernoulli_mask(ratio, valid, "m"), ratio, size)
    assert float(loss) == pytest.approx(8.0, rel=0.03)


# --- warm-up ------------------------------------------------------------------------------------------------------


def test_the_cap_of_the_mask_ratio_rises_from_its_start_to_one() -> None:
    assert [warmup_cap(s, 9, 0.1) for s in range(11)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0]
    )
    assert warmup_cap(0, 0, 0.001) == 1.0


# --- blocks: t ~ U(0, 1), one a block -----------------------------------------------------------------------------


def blocks(length: int, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One block a row: units and the ratio of each position."""
    units = torch.arange(len(ratio))[:, None].expand(len(ratio), length).contiguous()
    return units, ratio[:, None].expand(len(ratio), length)


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_a_block_without_a_mask_has_probability_one_over_b_plus_one_and_zero_when_clipped(length: int) -> None:
    units, ratio = blocks(length, stratified_ratios(NUM, 0.0, 1.0, 7))
    plain = bernoulli_mask(ratio, units >= 0, 7, "m")
    assert float((~plain.any(1)).float().mean()) == pytest.approx(1 / (length + 1), abs=0.01)
    clipped, _ = clipped_mask(ratio, units, length, 7, "m")
    assert clipped.any(1).all()


@pytest.mark.parametrize("length", [2, 4, 8])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_the_marginal_of_a_clipped_mask_is_the_stated_one_at_every_position(length: int, t: float) -> None:
    """u + (1 - u)^B / B with u = max(t, 1/B)."""
    units, ratio = blocks(length, torch.full((NUM,), t))
    masked, clipped = clipped_mask(ratio, units, length, 3, "m")
    u = max(t, 1 / length)
    assert torch.allclose(clipped, torch.tensor(u))
    expected = u + (1 - u) ** length / length
    assert forced_marginal(clipped, units)[0].tolist() == pytest.approx([expected] * length, rel=1e-6)
    assert masked.float().mean(0).tolist() == pytest.approx([expected] * length, abs=0.02)


def test_a_block_that_is_partly_prompt_forces_one_of_the_positions_it_has() -> None:
    """Two of four positions may be masked: the marginal is u + (1 - u)² / 2, and the prompt is never masked."""
    units = torch.arange(NUM)[:, None].expand(NUM, 4).clone()
    units[:, :2] = NO_UNIT
    masked, clipped = clipped_mask(torch.full((NUM, 4), 0.01), units, 4, 0, "m")
    assert not masked[:, :2].any()
    assert masked.any(1).all()
    expected = 0.25 + 0.75**2 / 2
    assert masked[:, 2:].float().mean(0).tolist() == pytest.approx([expected] * 2, abs=0.02)
    assert forced_marginal(clipped, units)[0, 2:].tolist() == pytest.approx([expected] * 2)


def law(u: float, length: int) -> dict[tuple[bool, ...], float]:
    """Every mask of a block with its probability, the forced ones included."""
    found = {mask: float(np.prod([u if m else 1 - u for m in mask])) for mask in product((False, True), repeat=length)}
    nothing = found.pop((False,) * length)
    for place in range(length):
        found[tuple(k == place for k in range(length))] += nothing / length
    return found


def surprise(mask: tuple[bool, ...], place: int) -> float:
    """-log p of a position given which others are masked: any function that depends on them will do."""
    return 1.0 + place + 0.7 * sum((k + 1) * m for k, m in enumerate(mask) if k != place)


@pytest.mark.parametrize("weight", ["paper", "exact"])
@pytest.mark.parametrize("t", [0.1, 0.6])
def test_the_expected_loss_is_the_one_of_enumerating_all_masks(weight: str, t: float) -> None:
    length = 3
    u = max(t, 1 / length)
    divisor = u if weight == "paper" else u + (1 - u) ** length / length
    expected = sum(
        chance * sum(surprise(mask, k) for k in range(length) if mask[k]) / divisor
        for mask, chance in law(u, length).items()
    )
    assert sum(law(u, length).values()) == pytest.approx(1.0)
    units, ratio = blocks(length, torch.full((NUM,), t))
    masked, clipped = clipped_mask(ratio, units, length, 1, "m")
    logp = torch.tensor([[-surprise(tuple(row), k) for k in range(length)] for row in masked.tolist()])
    weights = forced_marginal(clipped, units) if weight == "exact" else clipped
    assert float(diffusion_loss(logp, masked, weights, NUM)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_exact_weights_are_unbiased_where_the_context_does_not_matter_and_the_paper_s_are_not(t: float) -> None:
    """By enumeration, 1 nat a position: exact gives B; the paper's B · (u + (1 - u)^B / B) / u."""
    length = 4
    u = max(t, 1 / length)
    scored = sum(chance * sum(mask) for mask, chance in law(u, length).items())
    units, ratio = blocks(length, torch.tensor([t]))
    _, clipped = clipped_mask(ratio, units, length, 0)
    exact = float(forced_marginal(clipped, units)[0, 0])
    assert scored / exact == pytest.approx(length)
    assert scored / float(clipped[0, 0]) == pytest.approx(length * (u + (1 - u) ** length / length) / u)
