"""Statistics of each row of logits, from few passes over them: by torch, or by one Triton kernel on a GPU.

With z the tempered logits without forbidden tokens and p = softmax z,

    H = -Σ p log p = -log p₁ - Σ p (z - z₁)        p₁, p₂: the two greatest probabilities; z₁: the greatest logit

so that log-probabilities of the vocabulary are never stored.

Shapes: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor

from coupled.rl.model.vocabulary import OutputHead, raw_logits
from coupled.rl.rollout.row_statistics_torch import Choice, RowStatistics, draw_logits, measure, tempered
from coupled.rl.shapes import Float, Int

AGREES = 1e-4
"""Accepted difference between sums in different orders, in nats."""


def measure_states(
    head: OutputHead, hidden: Float[Tensor, "N D"], temperature: float, *, has_margin: bool, has_token: bool
) -> tuple[RowStatistics, Float[Tensor, "N V"] | None]:
    """The statistics of hidden states, and the logits as `measure` leaves them; None if the kernel made them."""
    if is_fused(hidden):
        from coupled.rl.rollout.row_statistics_triton import fused_statistics

        return fused_statistics(head, raw_logits(head, hidden), temperature), None
    logits = tempered(head, hidden, temperature)
    return measure(logits, has_margin=has_margin, has_token=has_token), logits


def draw_states(
    head: OutputHead,
    hidden: Float[Tensor, "N D"],
    temperature: float,
    draws: Float[Tensor, " N"],
    given: Int[Tensor, " N"] | None = None,
) -> Choice:
    """As `draw_logits`, from hidden states and the whole vocabulary."""
    if is_fused(hidden):
        from coupled.rl.rollout.row_statistics_triton import fused_choice

        return fused_choice(head, raw_logits(head, hidden), temperature, draws, given)
    return draw_logits(tempered(head, hidden, temperature), temperature, draws, given)


def is_fused(hidden: Tensor) -> bool:
    """Whether the kernel reads the rows: on a GPU, in up to fp32, where Triton is installed (torch brings it there)."""
    return hidden.device.type == "cuda" and hidden.dtype != torch.float64 and _has_kernel(hidden.device)


@cache
def _has_kernel(device: torch.device) -> bool:
    """Whether there is a kernel that agrees with torch on a few rows. Warns once if it does not."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from coupled.rl.rollout.row_statistics_triton import largest_difference

        difference = largest_difference(device)
        why = f"it differs from torch by {difference:.2g}" if difference > AGREES else ""
    except Exception as error:  # compilers and drivers raise many types
        why = f"{type(error).__name__}: {error}"
    if why:
        warnings.warn(f"the Triton kernel for row statistics is not used on {device}: {why}", stacklevel=2)
    return not why
