"""The clipped objective with a KL penalty [GRPO; DiffuCoder], for per-token log-probability estimates s."""

from __future__ import annotations

import torch
from torch import Tensor

from coupled.rl.recipe.objective import Loss
from coupled.rl.shapes import Bool, Float
from coupled.rl.types import LossOutput


def kl_estimate(
    new: Float[Tensor, "B C"], reference: Float[Tensor, "B C"], max_log_ratio: float, kind: str = "k3"
) -> Float[Tensor, "B C"]:
    """Schulman's estimates of KL(π ‖ π_ref) from tokens of π; with r = s_ref - s, clamped to ± `max_log_ratio`:

    k1:  -r               unbiased; negative for some tokens
    k2:  r² / 2           biased; never negative
    k3:  exp(r) - r - 1   unbiased; never negative

    As penalties they differ. On policy k2 has the gradient of KL(π ‖ π_ref), k3 the gradient of KL(π_ref ‖ π), and the
    gradient of k1 is zero on average: k1 measures and does not pull.

    The clamp bounds k3: without it, one token whose log-probability falls by 10 nats would weigh 22 000.
    """
    log_ratio = (reference - new).clamp(-max_log_ratio, max_log_ratio)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return log_ratio.exp() - log_ratio - 1
    raise ValueError(f"kl must be k1, k2 or k3; got {kind!r}")


def policy_log_ratio(
    new: Float[Tensor, "B C"], old: Float[Tensor, "B C"], valid: Bool[Tensor, "B C"], kind: str
) -> Float[Tensor, "B C"]:
    """log ρ of every token.

    token:     s_k - s_k^old, each token its own
    sequence:  1/|V_i| · Σ_{k∈V_i} (s_k - s_k^old), one for all tokens of a completion: ρ_i is the geometric mean of
               the token ratios [GSPO], so a completion is clipped whole or not at all
    """
    log_ratio = new - old
    if kind == "token":
        return log_ratio
    if kind == "sequence":
        length = valid.sum(-1, keepdim=True).clamp(min=1)
        return ((log_ratio * valid).sum(-1, keepdim=True) / length).expand_as(log_ratio)
    raise ValueError(f"ratio must be token or sequence; got {kind!r}")


def loss_denominator(valid: Bool[Tensor, "B C"], norm: str) -> int:
    """Divisor of the summed loss of a *whole* batch, with which gradients of its parts add up to the joint gradient.

    token:     T, the valid tokens: all tokens count alike [DAPO; the default]
    sequence:  N, the completions that carry loss; each sums its own mean, so all completions count alike [GRPO]
    fixed:     N · C with C the canvas: a constant, so that the weight of a token does not depend on length [Dr. GRPO]
    """
    num_rows = int(valid.any(-1).sum())
    sizes = {"token": int(valid.sum()), "sequence": num_rows, "fixed": num_rows * valid.shape[-1]}
    if norm not in sizes:
        raise ValueError(f"norm must be token, sequence or fixed; got {norm!r}")
    return max(1, sizes[norm])


def coupled_grpo_loss(
    new: Float[Tensor, "B C"],
    old: Float[Tensor, "B C"],
    reference: Float[Tensor, "B C"] | None,
    advantages: Float[Tensor, " B"],
    valid: Bool[Tensor, "B C"],
    denominator: int,
    config: Loss,
) -> LossOutput:
    """`1/T · Σ_i Σ_{k∈V_i} [ -min(ρ_k A_i, clip(ρ_k, 1-ε_low, 1+ε_high) A_i) + β · KL_k ]`, ρ_k = exp(s_k - s_k^old).

    Where A_i < 0 it is multiplied by `negative_weight`. s bounds the log-likelihood from below: raising it raises the
    likelihood, while lowering it may only loosen the bound, so a negative advantage is weaker evidence [SPG]. There
    `dual_clip` c also bounds the term: max(min(…), c · A_i) [Ye et al. 2020], because min(…) has no lower bound.

    With `objective: likelihood` the first term is `-A_i · s_k`: there is no ratio, nothing is clipped, and `old` is
    not read [wd1, whose A_i is `advantage: softmax`]. At θ = θ_old its gradient equals the clipped term's.

    T is the `denominator` of the whole batch (`loss_denominator`); with `norm: sequence` the sum over k is a mean.
    The sums in the result are over the given rows; sums over tokens are not normalised, whatever the norm.
    """
    advantage = torch.where(advantages < 0, config.negative_weight * advantages, advantages)[:, None]
    sums: dict[str, float] = {}
    if config.objective == "likelihood":
        per_token = -advantage * new
    else:
        per_token, sums = _clipped(new, old, advantage, valid, config)
    sums |= {"tokens": float(valid.sum()), "kl": 0.0}
    if reference is not None:
        kl = kl_estimate(new, reference, config.max_log_ratio, config.kl)
        per_token = per_token + config.kl_beta * kl
        sums["kl"] = float((kl.detach() * valid).sum())
    counted = per_token * valid
    if config.norm == "sequence":
        counted = counted / valid.sum(-1, keepdim=True).clamp(min=1)
    loss = counted.sum() / denominator
    sums["loss"] = float(loss.detach())
    return LossOutput(loss=loss, sums=sums)


def _clipped(
    new: Float[Tensor, "B C"],
    old: Float[Tensor, "B C"],
    advantage: Float[Tensor, "B 1"],
    valid: Bool[Tensor, "B C"],
    config: Loss,
) -> tuple[Float[Tensor, "B C"], dict[str, float]]:
    """The clipped term of each token, and the sums for the metrics of clipping."""
    log_ratio = policy_log_ratio(new, old, valid, config.ratio).clamp(-config.max_log_ratio, config.max_log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    per_token = -torch.minimum(ratio * advantage, clipped * advantage)
    sums = {
        "ratio": float((ratio.detach() * valid).sum()),
        "clip_low": float(((ratio < 1 - config.clip_low) & (advantage < 0) & valid).sum()),
        "clip_high": float(((ratio > 1 + config.clip_high) & (advantage > 0) & valid).sum()),
    }
    if config.dual_clip is not None:
        bounded = torch.minimum(per_token, -config.dual_clip * advantage)
        per_token = torch.where(advantage < 0, bounded, per_token)
        sums["clip_dual"] = float(((ratio > config.dual_clip) & (advantage < 0) & valid).sum())
    return per_token, sums


def add_sums(total: dict[str, float], part: dict[str, float]) -> None:
    """Add the sums of a micro-batch to the batch's sums, in place."""
    for name, value in part.items():
        total[name] = total.get(name, 0.0) + value
