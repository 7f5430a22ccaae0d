"""The objectives of likelihood training: the noise and the loss of one batch.

| objective          | sees                                              | masks                | divides by   |
|--------------------|---------------------------------------------------|----------------------|--------------|
| autoregressive     | what is to the left                               | nothing              | 1            |
| causal_diffusion   | what is to the left                               | share t of a sample  | t            |
| masked_diffusion   | everything                                        | share t of a sample  | t            |
| block_diffusion    | its own noisy block and the clean blocks before it| share t of a block   | t            |

Position p is predicted from the hidden state at p - shift; next-token prediction always from p - 1.

Shapes: B rows, S positions of a row, C trailing positions that may carry loss, U units that share a mask ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from coupled.rl.errors import RecipeError
from coupled.rl.keys import uniform
from coupled.rl.likelihood.batch import LikelihoodBatch
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
from coupled.rl.model.attention import may_attend
from coupled.rl.model.families import Family
from coupled.rl.model.policy import Policy, before
from coupled.rl.model.vocabulary import token_logp
from coupled.rl.recipe.likelihood import Fit
from coupled.rl.shapes import Bool, Float, Int

NOISE_WARMUP_START = 0.001
"""The cap of t at step 0 of a noise warm-up; equals the smallest t that is drawn without a warm-up."""


def settle(fit: Fit, family: Family) -> Fit:
    """The settings, with objective and block length taken from the model's attention where the recipe leaves them open.

    Raises:
        RecipeError: other settings do not fit that objective.
    """
    has_blocks = family.block_length not in (None, 1)
    values = fit.model_dump()
    if fit.objective is None:
        values["objective"] = "block_diffusion" if has_blocks else "masked_diffusion"
    if not fit.block_length:
        values["block_length"] = family.block_length if has_blocks else 4
    try:
        return Fit.model_validate(values)
    except ValidationError as error:
        message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise RecipeError(
            f"{message}, which follows from the model's attention where the recipe leaves it open"
        ) from error


def block_length_of(fit: Fit) -> int | None:
    """Block length of the attention that an objective trains: 1 for causal attention, None for full attention."""
    assert fit.objective is not None, "settle() comes first"
    if fit.objective == "block_diffusion":
        return fit.block_length
    return None if fit.objective == "masked_diffusion" else 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noise:
    """Masked positions and the divisors of their losses, drawn for a whole batch before it is split."""

    masked: Bool[Tensor, "B C"]
    divisor: Float[Tensor, "B C"]

    def rows(self, index: slice) -> Noise:
        return Noise(masked=self.masked[index], divisor=self.divisor[index])


def draw_noise(batch: LikelihoodBatch, fit: Fit, seed: int, step: int) -> Noise:
    """The masks of step `step` (from 0), a function of seed and step. Next-token prediction scores all positions.

    While the noise warms up, t ~ U(0, u_max(step)) and the loss is not divided; afterwards t ~ U(mask_ratio) and it is
    [Stable-DiffCoder eq. 10].
    """
    ones = torch.ones(batch.carries_loss.shape, device=batch.ids.device)
    if fit.objective == "autoregressive":
        return Noise(masked=batch.carries_loss, divisor=ones)
    units = units_of(batch, fit)
    is_warm = step >= fit.noise_warmup_steps
    low, high = fit.mask_ratio
    if not is_warm:
        low, high = 0.0, min(high, warmup_cap(step, fit.noise_warmup_steps, NOISE_WARMUP_START))
    ratios = stratified_ratios(int(units.max()) + 1, low, high, seed, "fit-ratio", step)
    if fit.context or fit.objective == "block_diffusion":
        ratios = shuffled(ratios, seed, "fit-ratio-order", step)
    ratio = torch.where(units == NO_UNIT, ones, ratios.to(ones.device)[units.clamp(min=0)])
    if fit.clipped_noise == "none":
        masked = bernoulli_mask(ratio, batch.carries_loss, seed, "fit-mask", step)
    else:
        masked, ratio = clipped_mask(ratio, units, fit.block_length, seed, "fit-mask", step)
        ratio = forced_marginal(ratio, units) if fit.clipped_noise == "exact" else ratio
    return Noise(masked=masked, divisor=ratio if is_warm else ones)


def units_of(batch: LikelihoodBatch, fit: Fit) -> Int[Tensor, "B C"]:
    """Numbers of the units that share a mask ratio: samples, or blocks of samples. -1 at positions without loss."""
    valid, canvas = batch.carries_loss, batch.carries_loss.shape[1]
    row = torch.arange(len(batch.ids), device=valid.device)[:, None].expand(valid.shape)
    layout = batch.layout.columns(slice(-canvas, None))
    block = torch.zeros_like(layout.position)
    if fit.objective == "block_diffusion":
        block = layout.position // fit.block_length
    names = torch.stack((row, layout.sequence, block), dim=-1)
    units = torch.full(valid.shape, NO_UNIT, device=valid.device)
    units[valid] = torch.unique(names[valid], dim=0, return_inverse=True)[1]
    return units


def fit_loss(
    policy: Policy, batch: LikelihoodBatch, noise: Noise, fit: Fit, num_positions: int, *, seed: int, step: int
) -> Float[Tensor, ""]:
    """The loss of some rows, in nats per position; the losses of the parts of a batch add up.

    Args:
        num_positions: positions of the whole batch that carry loss.
    """
    rows = torch.zeros_like(batch.ids, dtype=torch.bool)
    rows[:, -noise.masked.shape[1] :] = noise.masked
    noisy = batch.ids.masked_fill(rows, policy.mask_id)
    if fit.objective == "block_diffusion":
        found = policy.logp_at(noisy, batch.layout, rows, batch.ids)
    else:
        is_next_token = fit.objective == "autoregressive"
        allowed = attention_of_step(batch, fit, seed, step)
        hidden = policy.hidden_after(batch.ids if is_next_token else noisy, batch.layout.position, allowed)
        sources = before(rows) if is_next_token or policy.family.shift else rows
        line = torch.arange(int(rows.sum()), device=rows.device)
        found = token_logp(policy.head, hidden[sources], line, batch.ids[rows])
    logp = torch.zeros(noise.masked.shape, device=found.device)
    logp[noise.masked] = found
    return diffusion_loss(logp, noise.masked, noise.divisor, num_positions)


def attention_of_step(batch: LikelihoodBatch, fit: Fit, seed: int, step: int) -> Bool[Tensor, "B Q S"]:
    """Attention mask of one stream: positions of the same sample, all or only the ones to the left.

    While attention is annealed, each position to the right is read with a probability that rises from 0 to 1
    [DiffuLLaMA, attention-mask annealing].
    """
    layout, size = batch.layout, batch.ids.shape[1]
    causal = may_attend(layout, layout, block_length=1)
    if block_length_of(fit) == 1:
        return causal
    everything = may_attend(layout, layout)
    if step >= fit.attention_anneal_steps:
        return everything
    draws = torch.from_numpy(uniform((size, size), seed, "fit-attention", step)).to(batch.ids.device)
    return causal | (everything & (draws < step / fit.attention_anneal_steps))
