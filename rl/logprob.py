"""Per-token log-probability estimates of a completion [DiffuCoder eq. 4].

A diffusion model has no left-to-right likelihood. With `V` the valid positions and `ℓ_k(M)` the log-probability of
token k when the positions M are masked and the others are visible, λ mask pairs give

    s_k = 1/(λ+1) · [ ℓ_k(V) + Σ_j ( 1[k∈M_j] / t_j · ℓ_k(M_j) + 1[k∈M'_j] / (1 - t_j) · ℓ_k(M'_j) ) ]

For the coupled estimator M'_j = V \\ M_j: each token is scored exactly once by each pair, in context.

Shapes: B rows, C canvas positions, S prompt + canvas, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from coupled.rl.policy import Policy
from coupled.rl.recipe import Estimator
from coupled.rl.shapes import Bool, Float, Int
from coupled.rl.types import MaskPair, TrainBatch


def estimate_logp(
    policy: Policy,
    batch: TrainBatch,
    pairs: tuple[MaskPair, ...],
    estimator: Estimator,
    temperature: float = 1.0,
) -> Float[Tensor, "B C"]:
    """s_k of every valid token, in nats; 0 elsewhere. Differentiable; fp32.

    `temperature` divides the logits. With the rollout's, the scored policy is the one that was sampled from: scored at
    1, a token that is likely at 1 but not at the rollout's temperature would hardly be reinforced.

    With `full_mask` there are no pairs, and s_k = ℓ_k(V) [d1].
    """
    batch = _without_shared_padding(batch)
    ids = canvas_for_scoring(batch, policy.mask_id, estimator.post_eos)
    scores = fully_masked_logp(policy, ids, batch, temperature)
    for pair in pairs:
        both = torch.cat((pair.first, pair.second))
        logp = masked_logp(
            policy,
            ids.repeat(2, 1),
            batch.pad_lengths.repeat(2),
            both,
            batch.ids[:, -batch.canvas_length :].repeat(2, 1),
            temperature,
        )
        first, second = logp.chunk(2)
        scores = scores + first / pair.ratio[:, None] + second / (1 - pair.ratio)[:, None]
    return scores / (len(pairs) + 1)


def canvas_for_scoring(batch: TrainBatch, mask_id: int, post_eos: str) -> Int[Tensor, "B S"]:
    """Prompt and canvas as scoring sees them: positions after the end token as the sampler left them, or MASK."""
    if post_eos == "kept":
        return batch.ids
    ids = batch.ids.clone()
    ids[:, -batch.canvas_length :][~batch.valid] = mask_id
    return ids


def masked_logp(
    policy: Policy,
    ids: Int[Tensor, "B S"],
    pad_lengths: Int[Tensor, " B"],
    masked: Bool[Tensor, "B C"],
    targets: Int[Tensor, "B C"],
    temperature: float = 1.0,
) -> Float[Tensor, "B C"]:
    """ℓ_k(M) at k ∈ M and 0 elsewhere, M being the positions `masked` of each row."""
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[:, -masked.shape[1] :] = masked
    full_targets = ids.clone()
    full_targets[:, -masked.shape[1] :] = targets
    logp = policy.logp_at(ids.masked_fill(rows, policy.mask_id), pad_lengths, rows, full_targets, temperature)
    return torch.zeros(masked.shape, device=ids.device).masked_scatter(masked, logp)


def fully_masked_logp(
    policy: Policy, ids: Int[Tensor, "B S"], batch: TrainBatch, temperature: float = 1.0
) -> Float[Tensor, "B C"]:
    """ℓ_k(V), computing each distinct input once.

    With every valid position masked, completions of one prompt often have the same input; the forward pass is then
    shared, and only the targets differ.
    """
    canvas = batch.canvas_length
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[:, -canvas:] = batch.valid
    # The padding length joins the comparison: equal ids with different padding are different inputs.
    inputs = torch.cat((batch.pad_lengths[:, None], ids.masked_fill(rows, policy.mask_id)), dim=1)
    distinct, which = torch.unique(inputs, dim=0, return_inverse=True)
    needed = torch.zeros((len(distinct), ids.shape[1]), dtype=torch.bool, device=ids.device)
    needed[:, -canvas:] = torch.zeros_like(needed[:, -canvas:], dtype=torch.int64).index_add_(
        0, which, batch.valid.long()
    ).bool()  # fmt: skip
    logits = policy.without_mask_token(policy.logits_at(distinct[:, 1:], distinct[:, 0], needed))
    logp = torch.log_softmax(logits / temperature, dim=-1)
    place = torch.full(needed.shape, -1, device=ids.device)
    place[needed] = torch.arange(len(logits), device=ids.device)
    line = place[which][:, -canvas:][batch.valid]
    picked = logp[line, batch.ids[:, -canvas:][batch.valid]]
    return torch.zeros(batch.valid.shape, device=ids.device).masked_scatter(batch.valid, picked)


def _without_shared_padding(batch: TrainBatch) -> TrainBatch:
    """Cut the leading columns that are padding in every row: they cost time and change nothing."""
    shared = int(batch.pad_lengths.min())
    if shared == 0:
        return batch
    return replace(batch, ids=batch.ids[:, shared:], pad_lengths=batch.pad_lengths - shared)
