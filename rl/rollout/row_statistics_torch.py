"""Row statistics and draws in torch: the reference that a kernel must agree with.

Shapes: N rows, M chosen positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from coupled.rl.model.vocabulary import OutputHead, fill_forbidden, project
from coupled.rl.rollout.distributions import FORBIDDEN, draw_tokens, entropy_of
from coupled.rl.shapes import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowStatistics:
    """Statistics of N rows of logits; entropies in nats."""

    entropy: Float[Tensor, " N"]
    best_probability: Float[Tensor, " N"]
    margin: Float[Tensor, " N"] | None = None
    """p₁ - p₂, if requested."""
    best_token: Int[Tensor, " N"] | None = None
    """The likeliest token, if requested; the first of equally likely ones."""

    @staticmethod
    def joined(parts: list[RowStatistics]) -> RowStatistics:
        """Consecutive rows as one record."""
        return RowStatistics(**_joined(parts))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """The tokens of M positions, with their log-probabilities and the entropies they were drawn at, in nats."""

    tokens: Int[Tensor, " M"]
    logp: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]

    @staticmethod
    def joined(parts: list[Choice]) -> Choice:
        """Consecutive positions as one record."""
        return Choice(**_joined(parts))


def _joined(parts: Sequence[Any]) -> dict[str, Any]:
    """The columns of records, concatenated."""
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(parts[0])}
    return {name: None if column[0] is None else torch.cat(column) for name, column in columns.items()}


def tempered(head: OutputHead, hidden: Float[Tensor, "N D"], temperature: float) -> Float[Tensor, "N V"]:
    """Logits at a temperature (0: as they are), at least fp32; tokens that may not be drawn have `FORBIDDEN`."""
    # The logits are new, so they may be changed in place.
    logits = project(head, hidden)
    if temperature not in (0, 1):
        logits.div_(temperature)
    fill_forbidden(head, logits, FORBIDDEN)
    return logits


def measure(logits: Float[Tensor, "N V"], *, has_margin: bool, has_token: bool) -> RowStatistics:
    """The statistics of tempered logits. In place, the greatest logit of each row is subtracted from the row."""
    top = logits.amax(-1)
    second = logits.topk(2, dim=-1).values[:, 1] if has_margin else top
    token = logits.argmax(-1) if has_token else None
    probability = logits.softmax(-1)
    best_probability = probability.amax(-1)
    entropy = -best_probability.log() - probability.mul_(logits.sub_(top[:, None])).sum(-1)
    return RowStatistics(
        entropy=entropy,
        best_probability=best_probability,
        margin=best_probability * (1 - (second - top).exp()) if has_margin else None,
        best_token=token,
    )


def draw_logits(
    logits: Float[Tensor, "N V"],
    temperature: float,
    draws: Float[Tensor, " N"],
    given: Int[Tensor, " N"] | None = None,
) -> Choice:
    """A token for each row of tempered logits, which may be filtered and shifted by a constant per row; at temperature
    0 the likeliest token. Given tokens other than -1 are used instead."""
    logp = torch.log_softmax(logits, dim=-1)
    if given is None or bool((given < 0).any()):
        drawn = logp.argmax(-1) if temperature == 0 else draw_tokens(logp, draws)
        given = drawn if given is None else torch.where(given < 0, drawn, given)
    return Choice(tokens=given, logp=logp.gather(-1, given[:, None])[:, 0], entropy=entropy_of(logp))
