"""What likelihood training minimises: one batch, its noise, its loss.

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
from torch import Tensor

from coupled.rl.block_mask import block_causal_mask, blocks_of, two_stream_mask
from coupled.rl.fit_batch import FitBatch
from coupled.rl.keys import uniform
from coupled.rl.noise import (
    NO_UNIT,
    bernoulli_mask,
    clipped_mask,
    diffusion_loss,
    forced_marginal,
    shuffled,
    stratified_ratios,
    warmup_cap,
)
from coupled.rl.policy import Policy
from coupled.rl.recipe import Fit
from coupled.rl.shapes import Bool, Float, Int


def block_length_of(fit: Fit) -> int | None:
    """How a model attends that was trained with an objective: by blocks, by blocks of 1 (causally), or fully (None)."""
    lengths = {"masked_diffusion": None, "block_diffusion": fit.block_length}
    return lengths.get(fit.objective, 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noise:
    """Which positions are masked, and what their losses are divided by. Drawn for a whole batch, before it is split."""

    masked: Bool[Tensor, "B C"]
    divisor: Float[Tensor, "B C"]

    def rows(self, index: slice) -> Noise:
        return Noise(masked=self.masked[index], divisor=self.divisor[index])


def draw_noise(batch: FitBatch, fit: Fit, seed: int, step: int) -> Noise:
    """The masks of step `step` (from 0): a function of the seed and the step. Next-token prediction scores everything.

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
        low, high = 0.0, min(high, warmup_cap(step, fit.noise_warmup_steps, fit.noise_warmup_start))
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


def units_of(batch: FitBatch, fit: Fit) -> Int[Tensor, "B C"]:
    """Numbers of the units that share a mask ratio: samples, or blocks of samples. -1 where there is no loss."""
    valid, canvas = batch.carries_loss, batch.carries_loss.shape[1]
    row = torch.arange(len(batch.ids), device=valid.device)[:, None].expand(valid.shape)
    block = torch.zeros_like(batch.positions)
    if fit.objective == "block_diffusion":
        block = blocks_of(batch.positions, fit.block_length)
    names = torch.stack((row, batch.documents[:, -canvas:], block[:, -canvas:]), dim=-1)
    units = torch.full(valid.shape, NO_UNIT, device=valid.device)
    units[valid] = torch.unique(names[valid], dim=0, return_inverse=True)[1]
    return units


def fit_loss(
    policy: Policy, batch: FitBatch, noise: Noise, fit: Fit, num_positions: int, *, seed: int, step: int
) -> Float[Tensor, ""]:
    """The objective of some rows, in nats per position; parts of a batch add up to the whole of it.

    Args:
        num_positions: positions of the whole batch that carry loss.
    """
    rows = torch.zeros_like(batch.ids, dtype=torch.bool)
    rows[:, -noise.masked.shape[1] :] = noise.masked
    if fit.objective == "block_diffusion":
        found = two_stream_logp(policy, batch, rows, fit.block_length)
    else:
        seen = attention_of_step(batch, fit, seed, step)
        is_next_token = fit.objective == "autoregressive"
        ids = batch.ids if is_next_token else batch.ids.masked_fill(rows, policy.mask_id)
        shift = 1 if is_next_token else policy.family.shift
        found = logp_seeing(policy, ids, batch, seen, rows, shift=shift)
    logp = torch.zeros(noise.masked.shape, device=found.device)
    logp[noise.masked] = found
    return diffusion_loss(logp, noise.masked, noise.divisor, num_positions)


def attention_of_step(batch: FitBatch, fit: Fit, seed: int, step: int) -> Bool[Tensor, "B S S"]:
    """Who sees whom in one stream: positions of the same sample, all of them or those to the left.

    While attention is annealed, each position to the right is seen with a probability that rises from 0 to 1
    [DiffuLLaMA, attention-mask annealing].
    """
    documents = batch.documents
    causal = block_causal_mask(batch.positions, documents)
    if block_length_of(fit) == 1:
        return causal
    everything = block_causal_mask(torch.where(documents >= 0, 0, documents), documents)
    if step >= fit.attention_anneal_steps:
        return everything
    size = documents.shape[1]
    draws = torch.from_numpy(uniform((size, size), seed, "fit-attention", step)).to(documents.device)
    return causal | (everything & (draws < step / fit.attention_anneal_steps))


def logp_seeing(
    policy: Policy,
    ids: Int[Tensor, "B S"],
    batch: FitBatch,
    seen: Bool[Tensor, "B S S"],
    rows: Bool[Tensor, "B S"],
    *,
    shift: int,
) -> Float[Tensor, " N"]:
    """log p(batch.ids | ids) at the positions `rows`, in nats, fp32; MASK has probability zero."""
    sources = _moved(rows) if shift else rows
    return _logp(policy, policy.logits_seeing(ids, batch.positions, seen, sources), batch.ids[rows])


def two_stream_logp(
    policy: Policy, batch: FitBatch, rows: Bool[Tensor, "B S"], block_length: int
) -> Float[Tensor, " N"]:
    """log p of the masked positions `rows`, each given its own noisy block and the clean blocks before it.

    One forward pass over `[noisy ; clean]` [BD3-LM]. With shift 1 the first position of a block is predicted from the
    last one of the block before it, which is in the clean stream: what a decoder has, too, once that block is done.
    """
    blocks = blocks_of(batch.positions, block_length)
    seen = two_stream_mask(blocks, blocks, batch.documents, batch.documents)
    noisy = batch.ids.masked_fill(rows, policy.mask_id)
    is_first = (batch.positions % block_length == 0) & rows
    sources = torch.cat((rows, torch.zeros_like(rows)), dim=1)
    if policy.family.shift:
        sources = torch.cat((_moved(rows & ~is_first), _moved(is_first)), dim=1)
    logits = policy.logits_seeing(
        torch.cat((noisy, batch.ids), dim=1), torch.cat((batch.positions, batch.positions), dim=1), seen, sources
    )
    if policy.family.shift:
        logits = logits[_reading_order(rows, is_first)]
    return _logp(policy, logits, batch.ids[rows])


def _moved(rows: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    """The positions before those of `rows`."""
    return torch.cat((rows[:, 1:], torch.zeros_like(rows[:, :1])), dim=1)


def _reading_order(rows: Bool[Tensor, "B S"], is_first: Bool[Tensor, "B S"]) -> Int[Tensor, " N"]:
    """Where the logits of each position are, when each row's come out of the noisy stream first, then of the clean."""
    row, _ = rows.nonzero(as_tuple=True)
    from_clean = is_first[rows]
    came_out = torch.argsort(2 * row + from_clean, stable=True)
    return torch.argsort(came_out)


def _logp(policy: Policy, logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    allowed = policy.without_mask_token(logits)
    return torch.log_softmax(allowed, dim=-1).gather(-1, targets[:, None])[:, 0]
