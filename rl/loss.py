"""The clipped objective with a KL penalty [GRPO; DiffuCoder], for per-token log-probability estimates s."""

from __future__ import annotations

import torch
from torch import Tensor

from coupled.rl.recipe import Loss
from coupled.rl.shapes import Bool, Float
from coupled.rl.types import LossOutput


def kl_k3(new: Float[Tensor, "B C"], reference: Float[Tensor, "B C"], max_log_ratio: float) -> Float[Tensor, "B C"]:
    """`exp(s_ref - s) - (s_ref - s) - 1 ≥ 0`: Schulman's low-variance KL estimate, with the log-ratio clamped.

    The clamp matters: one token whose log-probability falls by 10 nats would weigh 22 000.
    """
    log_ratio = (reference - new).clamp(-max_log_ratio, max_log_ratio)
    return log_ratio.exp() - log_ratio - 1


def coupled_grpo_loss(
    new: Float[Tensor, "B C"],
    old: Float[Tensor, "B C"],
    reference: Float[Tensor, "B C"] | None,
    advantages: Float[Tensor, " B"],
    valid: Bool[Tensor, "B C"],
    num_tokens: int,
    config: Loss,
) -> LossOutput:
    """`1/T · Σ_i Σ_{k∈V_i} [ -min(ρ_k A_i, clip(ρ_k, 1-ε_low, 1+ε_high) A_i) + β · k3_k ]`, ρ_k = exp(s_k - s_k^old).

    Where A_i < 0 it is multiplied by `negative_weight`. s bounds the log-likelihood from below: raising it raises the
    likelihood, lowering it may only loosen the bound, so what it says against a completion is worth less [SPG].

    T = `num_tokens` counts the valid tokens of the whole batch, so that the gradients of its parts add up to the
    gradient of the whole. The sums in the result are over the rows given here.
    """
    log_ratio = (new - old).clamp(-config.max_log_ratio, config.max_log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    advantage = torch.where(advantages < 0, config.negative_weight * advantages, advantages)[:, None]
    per_token = -torch.minimum(ratio * advantage, clipped * advantage)
    sums = {
        "tokens": float(valid.sum()),
        "ratio": float((ratio.detach() * valid).sum()),
        "clip_low": float(((ratio < 1 - config.clip_low) & (advantage < 0) & valid).sum()),
        "clip_high": float(((ratio > 1 + config.clip_high) & (advantage > 0) & valid).sum()),
        "kl": 0.0,
    }
    if reference is not None:
        kl = kl_k3(new, reference, config.max_log_ratio)
        per_token = per_token + config.kl_beta * kl
        sums["kl"] = float((kl.detach() * valid).sum())
    loss = (per_token * valid).sum() / num_tokens
    sums["loss"] = float(loss.detach())
    return LossOutput(loss=loss, sums=sums)
