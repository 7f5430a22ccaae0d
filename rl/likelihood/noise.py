"""The forward process of masked diffusion: masked positions, and the divisors of their losses.

Sources: LLaDA; DiffuCoder eq. 1; for blocks BD3-LM and Stable-DiffCoder §3.3. A *unit* shares one mask
ratio t: it is a sample, or a block of a sample. Positions outside of all units have -1 and are never masked.

Shapes: B rows, C positions that may be masked, U units.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coupled.rl.keys import Key, generator, uniform
from coupled.rl.shapes import Bool, Float, Int

NO_UNIT = -1


def stratified_ratios(num: int, low: float, high: float, *key: Key) -> Float[Tensor, " U"]:
    """Mask ratios t ~ U(low, high), one per unit, spread evenly over the units.

    `t_i = low + (high - low) · frac(u + i / U)`: each t is uniform, and together they cover the range, which lowers
    the variance of the batch loss.
    """
    offset = uniform((), *key)
    spread = (offset + np.arange(num) / num) % 1.0
    return torch.from_numpy(low + (high - low) * spread).float()


def shuffled(ratios: Float[Tensor, " U"], *key: Key) -> Float[Tensor, " U"]:
    """The same ratios in another order: without it, neighbouring blocks of a row would have similar ratios."""
    return ratios[torch.from_numpy(generator(*key).permutation(len(ratios)))]


def warmup_cap(step: int, num_steps: int, start: float) -> float:
    """`u_max(s) = u_init + (1 - u_init) · s / S` for s < S, and 1 from then on [Stable-DiffCoder eq. 10].

    Example: start .1 over 9 steps → .1, .2, …, .9, then 1.
    """
    return start + (1 - start) * step / num_steps if step < num_steps else 1.0


def bernoulli_mask(ratio: Float[Tensor, "B C"], valid: Bool[Tensor, "B C"], *key: Key) -> Bool[Tensor, "B C"]:
    """Mask each valid position independently, with its own probability."""
    draws = torch.from_numpy(uniform(tuple(valid.shape), *key)).float().to(valid.device)
    return (draws < ratio.to(valid.device)) & valid


def clipped_mask(
    ratio: Float[Tensor, "B C"], units: Int[Tensor, "B C"], block_length: int, *key: Key
) -> tuple[Bool[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Masks with at least one position in every unit, and u_blk = min(1, max(t, 1/B)) of each position.

    Positions are masked independently with u_blk; in a unit without a mask, one position, chosen uniformly, is masked
    [Stable-DiffCoder §3.3]. Without these two rules a block of B has no mask with probability 1/(B+1) when t ~ U(0, 1),
    and no loss. The position with the smallest draw is chosen: it is masked anyway if any position is, and otherwise
    each position is equally likely to have the smallest draw.
    """
    clipped = ratio.clamp(min=1 / block_length, max=1.0)
    draws = torch.from_numpy(uniform(tuple(units.shape), *key)).to(units.device)
    valid = units != NO_UNIT
    smallest = torch.full((int(units.max()) + 1,), 2.0, dtype=draws.dtype, device=units.device)
    smallest = smallest.scatter_reduce(0, units[valid], draws[valid], "amin")
    is_smallest = draws == smallest[units.clamp(min=0)]
    return ((draws < clipped) | is_smallest) & valid, clipped


def forced_marginal(clipped: Float[Tensor, "B C"], units: Int[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Probability that `clipped_mask` masks a position: `u + (1 - u)^n / n` for a unit of n positions."""
    valid = units != NO_UNIT
    sizes = torch.bincount(units[valid], minlength=int(units.max()) + 1)[units.clamp(min=0)]
    return torch.where(valid, clipped + (1 - clipped) ** sizes / sizes, clipped)


def diffusion_loss(
    logp: Float[Tensor, "B C"], masked: Bool[Tensor, "B C"], divisor: Float[Tensor, "B C"], num_positions: int
) -> Float[Tensor, ""]:
    """Masked-diffusion bound `-Σ_{k masked} log p(y_k | rest) / w_k / num_positions`, in nats per position.

    Source: docs/method.md, with w_k = t; an unbiased estimate of the negative ELBO when t ~ U(0, 1) and w_k is the
    probability that k is masked.
    """
    return -((logp * masked) / divisor).sum() / num_positions
