"""A few numbers of each row of logits, from few passes over them: by torch, or by one Triton kernel on a GPU.

With z the tempered logits without forbidden tokens and p = softmax z,

    H = -Σ p log p = -log p₁ - Σ p (z - z₁)        p₁, p₂: of the likeliest tokens, z₁ the greatest logit

so that log-probabilities of the vocabulary are never written down.

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
"""What sums in another order may come to, in nats."""


def measure_states(
    head: OutputHead, hidden: Float[Tensor, "N D"], temperature: float, *, has_margin: bool, has_token: bool
) -> tuple[RowStatistics, Float[Tensor, "N V"] | None]:
    """The statistics of hidden states, and the logits that `measure` leaves; none where the kernel left none."""
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
    """Whether there is a kernel, and it says of a few rows what torch says. Warns, once, when it does not."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from coupled.rl.rollout.row_statistics_triton import largest_difference

        difference = largest_difference(device)
        why = f"it differs from torch by {difference:.2g}" if difference > AGREES else ""
    except Exception as error:  # whatever a compiler or a driver makes of it
        why = f"{type(error).__name__}: {error}"
    if why:
        warnings.warn(f"the Triton kernel for row statistics is not used on {device}: {why}", stacklevel=2)
    return not why
