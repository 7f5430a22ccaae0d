"""Every objective against the model computed the plain way: one sample, one block at a time, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.toys import NUM_TOKENS, MakePolicy
from torch import Tensor

from coupled.rl.likelihood.batch import LikelihoodBatch, PackedRow, collate
from coupled.rl.likelihood.objective import Noise, attention_of_step, block_length_of, draw_noise, fit_loss, units_of
from coupled.rl.likelihood.samples import Example
from coupled.rl.model.policy import Policy
from coupled.rl.objective.batch import micro_batches
from coupled.rl.recipe.likelihood import Fit

ONE = Example(prompt_ids=(4, 5, 6), response_ids=(7, 8, 9, 10, 1))
TWO = Example(prompt_ids=(9,), response_ids=(10, 11, 12, 13, 14, 15, 1))
TEXT = Example(prompt_ids=(), response_ids=(20, 21, 22, 23, 24, 25, 26, 27, 1))
OBJECTIVES = ("autoregressive", "masked_diffusion", "causal_diffusion", "block_diffusion")
LAYOUTS: dict[str, tuple[int, list[PackedRow]]] = {
    "one sample a row": (0, [(ONE,), (TWO,)]),
    "packed": (18, [(ONE, TWO), (TEXT,), (TWO, TEXT)]),
}


def fit_of(objective: str, context: int = 0, **fields: object) -> Fit:
    return Fit.model_validate({"objective": objective, "context": context, "canvas": 8, "block_length": 3, **fields})


def forward(policy: Policy, ids: Sequence[int], seen: Tensor) -> Tensor:
    """Log-probabilities [S, V] that come out of each position of one unpadded sequence, MASK and unnamed forbidden."""
    additive = torch.zeros(seen.shape).masked_fill(~seen, -1e9)[None, None]
    places = torch.arange(len(ids))[None]
    out = policy.model(
        input_ids=torch.tensor([list(ids)]), attention_mask=additive, position_ids=places, use_cache=False
    )
    logits = out.logits[0].clone()
    logits[:, [policy.mask_id, *range(NUM_TOKENS, logits.shape[1])]] = -torch.inf
    return logits.log_softmax(-1)


def plain_sample(policy: Policy, fit: Fit, ids: list[int], masked: list[bool]) -> list[Tensor]:
    """log p of each masked position of one sample, by the definition of the objective."""
    size = len(ids)
    noisy = [policy.mask_id if m else token for token, m in zip(ids, masked, strict=True)]
    everything, causal = torch.ones(size, size).bool(), torch.ones(size, size).tril().bool()
    found = []
    for place in (k for k in range(size) if masked[k]):
        source = place - policy.family.shift
        if fit.objective == "autoregressive":
            logp = forward(policy, ids, causal)[place - 1]
        elif fit.objective == "causal_diffusion":
            logp = forward(policy, noisy, causal)[source]
        elif fit.objective == "masked_diffusion":
            logp = forward(policy, noisy, everything)[source]
        else:
            start = place // fit.block_length * fit.block_length
            end = min(start + fit.block_length, size)
            # The block is denoised after a clean prefix; nothing after it exists yet.
            block = torch.arange(end) // fit.block_length
            logp = forward(policy, [*ids[:start], *noisy[start:end]], block[None, :] <= block[:, None])[source]
        found.append(logp[ids[place]])
    return found


def plain_loss(policy: Policy, fit: Fit, batch: LikelihoodBatch, noise: Noise, num: int) -> Tensor:
    total = torch.zeros(())
    canvas = noise.masked.shape[1]
    for row in range(len(batch.ids)):
        masked, divisor = torch.zeros(batch.ids.shape[1]).bool(), torch.ones(batch.ids.shape[1])
        masked[-canvas:], divisor[-canvas:] = noise.masked[row], noise.divisor[row]
        for document in range(int(batch.layout.sequence[row].max()) + 1):
            own = batch.layout.sequence[row] == document
            logp = plain_sample(policy, fit, batch.ids[row][own].tolist(), masked[own].tolist())
            total = total - (torch.stack(logp) / divisor[own][masked[own]]).sum() if logp else total
    return total / num


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_and_its_gradient_are_those_of_each_sample_alone(
    tiny_policy: MakePolicy, objective: str, layout: str, shift: int
) -> None:
    """For block diffusion: two streams at once equal one forward pass per block after a clean prefix."""
    policy = tiny_policy(shift=shift)
    context, rows = LAYOUTS[layout]
    fit = fit_of(objective, context)
    policy.attend(block_length_of(fit))
    batch = collate(rows, policy, fit)
    noise = draw_noise(batch, fit, 0, 3)
    assert noise.masked.sum() > 5
    num = int(batch.carries_loss.sum())
    loss = fit_loss(policy, batch, noise, fit, num, seed=0, step=3)
    expected = plain_loss(policy, fit, batch, noise, num)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    parameters = policy.trainable_parameters()
    mine, plain = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("block_length", [1, 2, 4, 5, 32])
@pytest.mark.parametrize("prompt_length", range(6))
@pytest.mark.parametrize("shift", [0, 1])
def test_two_streams_equal_per_block_forwards_wherever_the_prompt_ends(
    tiny_policy: MakePolicy, block_length: int, prompt_length: int, shift: int
) -> None:
    policy = tiny_policy(shift=shift)
    example = Example(prompt_ids=tuple(range(4, 4 + prompt_length)), response_ids=(30, 31, 32, 33, 34, 35, 1))
    fit = fit_of("block_diffusion", block_length=block_length)
    policy.attend(block_length)
    batch = collate([(example,)], policy, fit)
    everything = Noise(masked=batch.carries_loss, divisor=torch.ones(batch.carries_loss.shape))
    with torch.no_grad():
        for noise in (everything, draw_noise(batch, fit, 1, 0)):
            loss = fit_loss(policy, batch, noise, fit, 1, seed=1, step=0)
            torch.testing.assert_close(loss, plain_loss(policy, fit, batch, noise, 1), atol=1e-4, rtol=1e-5)


def test_next_token_prediction_does_not_depend_on_the_shift_of_diffusion(tiny_policy: MakePolicy) -> None:
    losses = []
    for shift in (0, 1):
        policy, fit = tiny_policy(shift=shift), fit_of("autoregressive")
        batch = collate([(ONE,), (TWO,)], policy, fit)
        noise = draw_noise(batch, fit, 0, 0)
        losses.append(float(fit_loss(policy, batch, noise, fit, 12, seed=0, step=0).detach()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("size", [1, 2])
def test_the_gradient_does_not_depend_on_the_micro_batches(tiny_policy: MakePolicy, objective: str, size: int) -> None:
    policy, fit = tiny_policy(), fit_of(objective, 18, clipped_noise="exact" if "block" in objective else "none")
    policy.attend(block_length_of(fit))
    batch = collate(LAYOUTS["packed"][1], policy, fit)
    noise = draw_noise(batch, fit, 0, 1)

    def gradients(size: int) -> list[Tensor]:
        for part in micro_batches(len(batch.ids), size):
            fit_loss(policy, batch.rows(part), noise.rows(part), fit, 40, seed=0, step=1).backward()
        found = [p.grad.clone() for p in policy.trainable_parameters() if p.grad is not None]
        policy.model.zero_grad()
        return found

    for one, joint in zip(gradients(size), gradients(3), strict=True):
        torch.testing.assert_close(one, joint, atol=1e-6, rtol=1e-4)


# --- units and noise ----------------------------------------------------------------------------------------------


def test_samples_and_blocks_have_a_mask_ratio_each(tiny_policy: MakePolicy) -> None:
    """ONE has a prompt of 3 and 5 response tokens, TWO 1 and 7: blocks of 3 on the grid of each sample."""
    policy, rows = tiny_policy(), [(ONE, TWO)]
    packed = fit_of("masked_diffusion", 18)
    assert units_of(collate(rows, policy, packed), packed).tolist() == [[-1] * 3 + [0] * 5 + [-1] + [1] * 7]
    block = fit_of("block_diffusion", 18)
    assert units_of(collate(rows, policy, block), block).tolist() == [
        [-1] * 3 + [0, 0, 0, 1, 1] + [-1] + [2, 2, 3, 3, 3, 4, 4]
    ]
    single = fit_of("masked_diffusion")
    assert units_of(collate([(ONE,), (TWO,)], policy, single), single).tolist() == [[0] * 8, [1] * 8]


@pytest.mark.parametrize("clipped", ["none", "paper", "exact"])
def test_noise_is_capped_and_unweighted_while_it_warms_up(tiny_policy: MakePolicy, clipped: str) -> None:
    policy = tiny_policy()
    fit = fit_of("block_diffusion", 18, noise_warmup_steps=100, clipped_noise=clipped, mask_ratio=(0.2, 1.0))
    rows = [(ONE, TWO)] * 200
    batch = collate(rows, policy, fit)
    early, late, after = (draw_noise(batch, fit, 0, step) for step in (10, 90, 100))
    assert early.divisor.unique().tolist() == late.divisor.unique().tolist() == [1.0]
    assert len(after.divisor.unique()) > 5
    num = int(batch.carries_loss.sum())
    shares = [int(noise.masked.sum()) / num for noise in (early, late, after)]
    if clipped == "none":
        # Half of the cap, .1 and .9; then the mean of U(.2, 1).
        assert shares == pytest.approx([0.05, 0.45, 0.6], abs=0.04)
        return
    assert shares[0] > 1 / 3, "every block has a mask from the first step"
    assert shares[0] < shares[1] < shares[2]
    units = units_of(batch, fit)
    for noise in (early, late, after):
        assert units[noise.masked].unique().tolist() == list(range(int(units.max()) + 1))


def test_noise_differs_between_steps_and_is_the_same_for_a_step(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    for objective in ("masked_diffusion", "block_diffusion"):
        fit = fit_of(objective, 18)
        batch = collate([(ONE, TWO)], policy, fit)
        drawn = [draw_noise(batch, fit, 0, step).masked for step in (0, 1, 0)]
        assert torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], drawn[1])


# --- attention ----------------------------------------------------------------------------------------------------


def test_annealed_attention_goes_from_causal_to_full(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    fit = fit_of("masked_diffusion", 18, attention_anneal_steps=4)
    batch = collate([(ONE, TWO), (TEXT,)], policy, fit)
    plain: dict[str, Any] = {
        name: attention_of_step(batch, fit_of(name, 18), 0, 0) for name in ("causal_diffusion", "masked_diffusion")
    }
    causal, full = plain["causal_diffusion"], plain["masked_diffusion"]
    seen = [attention_of_step(batch, fit, 0, step) for step in range(6)]
    assert torch.equal(seen[0], causal)
    assert torch.equal(seen[4], full)
    assert torch.equal(seen[5], full)
    for step in (1, 2, 3):
        assert not (causal & ~seen[step]).any()
        assert not (seen[step] & ~full).any()
        share = (seen[step] & ~causal).sum() / (full & ~causal).sum()
        assert float(share) == pytest.approx(step / 4, abs=0.15)
    assert int(full.sum()) == 64 + 64 + 81, "two samples of 8 in one row; 9 tokens, and 7 pads that read nothing"
