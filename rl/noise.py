"""The forward process of masked diffusion: which positions of a response are masked [LLaDA; DiffuCoder eq. 1]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coupled.rl.keys import Key, uniform
from coupled.rl.shapes import Bool, Float


def stratified_ratios(batch_size: int, low: float, high: float, *key: Key) -> Float[Tensor, " B"]:
    """Mask ratios t ~ U(low, high), one a row, spread evenly over the batch.

    `t_i = low + (high - low) · frac(u + i / B)`: each t is uniform, and together they cover the range, which lowers
    the variance of the batch loss.
    """
    offset = uniform((), *key)
    spread = (offset + np.arange(batch_size) / batch_size) % 1.0
    return torch.from_numpy(low + (high - low) * spread).float()


def bernoulli_mask(ratio: Float[Tensor, " B"], valid: Bool[Tensor, "B C"], *key: Key) -> Bool[Tensor, "B C"]:
    """Mask each valid position of row i independently with probability `ratio[i]`."""
    draws = torch.from_numpy(uniform(tuple(valid.shape), *key)).float().to(valid.device)
    return (draws < ratio.to(valid.device)[:, None]) & valid


def diffusion_loss(
    logp: Float[Tensor, "B C"], masked: Bool[Tensor, "B C"], ratio: Float[Tensor, " B"], num_positions: int
) -> Float[Tensor, ""]:
    """Masked-diffusion bound `-Σ_i (1/t_i) Σ_{k∈M_i} log p(y_k | rest) / num_positions`, in nats per position.

    Source: method page §2; an unbiased estimate of the negative ELBO when t ~ U(0, 1).
    """
    per_row = (logp * masked).sum(-1) / ratio.to(logp.device)
    return -per_row.sum() / num_positions
