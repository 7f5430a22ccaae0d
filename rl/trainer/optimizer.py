"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math

import torch

from coupled.rl.model.policy import Policy
from coupled.rl.model.weights import whole_tensor
from coupled.rl.recipe.objective import Optimizer


def learning_rate(step: int, num_steps: int, config: Optimizer) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then cosine to `final_fraction` of the peak.

    Example: peak 1, 2 warm-up steps, `final_fraction` 1 → steps 0, 1, 2 have 0.5, 1, 1.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, num_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    share = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * share


def make_optimizer(policy: Policy, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms and biases are not decayed."""
    decayed = [p for p in policy.trainable_parameters() if p.ndim >= 2]
    plain = [p for p in policy.trainable_parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)


def apply_step(optimizer: torch.optim.AdamW, policy: Policy, rate: float, max_grad_norm: float) -> float:
    """Clip, step, clear. Returns the gradient norm before clipping.

    A gradient that is not finite leaves the weights unchanged: one bad batch must not end a run.
    """
    norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(policy.trainable_parameters(), max_grad_norm)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
