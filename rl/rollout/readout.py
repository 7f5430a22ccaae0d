"""Confidence of masked positions, the choice of positions, and the tokens that the chosen ones get.

First every masked position gets a few numbers (entropy, probability of the likeliest token, margin), from logits that
are made for some rows at a time and released. Then positions are chosen, and only those get a distribution and a token.
Both are exact: for `entropy` and `margin` the order does not depend on the tokens that are drawn.

With a nucleus, confidence is computed from the filtered distribution. It is bounded from the unfiltered one first, and
computed only where the bounds do not decide whether a position is among the most confident:

    H(p) = P·H(q) + (1-P)·H(rest) + h(P),   P ≥ top_p,  0 ≤ H(rest) ≤ ln V
    ⇒ H(p) - h(top_p) - (1-top_p)·ln V  ≤  H(q)  ≤  H(p) / top_p          h: entropy of a coin
      p₁ - p₂  ≤  q₁ - q₂  ≤  (p₁ - p₂) / top_p,  and q₁ = 1 where p₁ > top_p

Shapes: N masked positions, U distinct hidden states that they are read from, M chosen positions, R rows of the batch,
D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from coupled.rl.model.vocabulary import CHUNK_LOGITS, OutputHead
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.distributions import FORBIDDEN, likeliest, nucleus
from coupled.rl.rollout.row_statistics import draw_states, measure_states
from coupled.rl.rollout.row_statistics_torch import Choice, RowStatistics, draw_logits, measure, tempered
from coupled.rl.shapes import Bool, Float, Int

ROUNDING = 1e-3
"""Rounding error of sums over a vocabulary, in nats."""


# --- the confidence of each position ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """Statistics of N masked positions under the tempered and filtered distribution, before tokens are chosen."""

    confidence: Float[Tensor, " N"]
    """Positions are committed in descending order of it."""
    entropy: Float[Tensor, " N"]
    best_probability: Float[Tensor, " N"]
    """Probability of the likeliest token."""
    best_token: Int[Tensor, " N"] | None
    """The likeliest token, if the sampler fills with it."""
    which: Int[Tensor, " N"]
    """Index of the hidden state that each position is read from."""
    tokens: Int[Tensor, " N"] | None = None
    """The token of each position, if the order depends on it; None: tokens are drawn only for the chosen positions."""
    logits: Float[Tensor, "U V"] | None = None
    """Logits of the hidden states, tempered and unfiltered, less the greatest of each row, if they were kept."""

    def source(self, picked: Bool[Tensor, " N"]) -> tuple[Int[Tensor, " M"], Float[Tensor, "M V"] | None]:
        """The hidden states that the picked positions are read from, and their logits if they were kept."""
        states = self.which[picked]
        return states, None if self.logits is None else self.logits[states]


def read_out(
    head: OutputHead,
    hidden: Float[Tensor, "U D"],
    sampler: Sampler,
    token_draws: Float[Tensor, " N"],
    order_draws: Float[Tensor, " N"],
    row_of: Int[Tensor, " N"],
    count: Int[Tensor, " R"],
    which: Int[Tensor, " N"] | None = None,
) -> Reading:
    """Statistics of every masked position.

    Args:
        row_of: the row that each position belongs to, ascending.
        count: how many positions of each row will be chosen. With a nucleus, a position that is certainly not among
            them gets a bound on its confidence instead of the confidence.
        which: the hidden state that each position is read from; none: each has its own. What does not depend on the
            random numbers is computed once for each state.
    """
    which = torch.arange(len(hidden), device=hidden.device) if which is None else which
    if sampler.order == "maskgit" and sampler.temperature > 0:
        return _with_tokens(head, hidden, sampler, token_draws, which)
    can_bound = _is_filtered(sampler) and _has_bounds(sampler)
    parts, logits = [], None
    for rows in chunks(head, hidden):
        part, logits = _statistics(head, hidden[rows], sampler, is_filtered=not can_bound)
        parts.append(part)
    if len(parts) > 1:
        logits = None
    found = RowStatistics.joined(parts)
    confidence = _confidence(found, sampler)
    if can_bound:
        low, high = _bounds(found, sampler, head.num_tokens)
        is_near = low[which] <= _nth_smallest(high[which], row_of, count)[row_of] + ROUNDING
        rivals = torch.zeros_like(low, dtype=torch.bool).index_fill_(0, which[is_near], True)
        confidence = -low
        confidence[rivals] = _filtered_confidence(head, hidden, logits, rivals, sampler)
    return Reading(
        confidence=order_draws.to(found.entropy.dtype) if sampler.order == "origin" else confidence[which],
        entropy=found.entropy[which],
        best_probability=found.best_probability[which],
        best_token=None if found.best_token is None else found.best_token[which],
        which=which,
        logits=logits,
    )


def _is_filtered(sampler: Sampler) -> bool:
    """True if the sampler leaves tokens out."""
    return sampler.top_p < 1 or sampler.top_k > 0


def _has_bounds(sampler: Sampler) -> bool:
    """True if the filtered confidence is bounded by the unfiltered one, and no other statistic needs all positions."""
    reads_all = sampler.is_parallel or sampler.end_fill is not None
    return sampler.order in ("entropy", "margin") and sampler.top_k == 0 and not reads_all


def _filtered(logits: Float[Tensor, "N V"], sampler: Sampler) -> Float[Tensor, "N V"]:
    """Without the tokens that the sampler leaves out."""
    return nucleus(likeliest(logits, sampler.top_k), sampler.top_p).clamp_(min=FORBIDDEN)


def _statistics(
    head: OutputHead, hidden: Float[Tensor, "N D"], sampler: Sampler, *, is_filtered: bool
) -> tuple[RowStatistics, Float[Tensor, "N V"] | None]:
    """The statistics that the sampler needs; and the logits, if they were made whole and unfiltered."""
    wanted = {"has_margin": sampler.order == "margin", "has_token": sampler.end_fill is not None}
    if is_filtered and _is_filtered(sampler):
        return measure(_filtered(tempered(head, hidden, sampler.temperature), sampler), **wanted), None
    return measure_states(head, hidden, sampler.temperature, **wanted)


def _confidence(found: RowStatistics, sampler: Sampler) -> Float[Tensor, " N"]:
    if sampler.order == "margin":
        assert found.margin is not None
        return found.margin
    return found.best_probability if sampler.order == "maskgit" else -found.entropy


def _filtered_confidence(
    head: OutputHead,
    hidden: Float[Tensor, "U D"],
    logits: Float[Tensor, "U V"] | None,
    rivals: Bool[Tensor, " U"],
    sampler: Sampler,
) -> Float[Tensor, " K"]:
    """Confidence of the hidden states `rivals` under the filtered distribution."""
    if logits is not None:
        found = measure(_filtered(logits[rivals], sampler), has_margin=sampler.order == "margin", has_token=False)
        return _confidence(found, sampler)
    chosen = hidden[rivals]
    parts = [_statistics(head, chosen[rows], sampler, is_filtered=True)[0] for rows in chunks(head, chosen)]
    return _confidence(RowStatistics.joined(parts), sampler)


def _with_tokens(
    head: OutputHead,
    hidden: Float[Tensor, "U D"],
    sampler: Sampler,
    token_draws: Float[Tensor, " N"],
    which: Int[Tensor, " N"],
) -> Reading:
    """A reading whose confidence is the drawn token's log-probability, so that each position draws a token."""
    parts, best = [], []
    for rows in chunks(head, hidden[which]):
        logits = _filtered(tempered(head, hidden[which[rows]], sampler.temperature), sampler)
        parts.append(draw_logits(logits, sampler.temperature, token_draws[rows]))
        best.append(logits.log_softmax(-1).max(-1))
    drawn = Choice.joined(parts)
    return Reading(
        confidence=drawn.logp,
        entropy=drawn.entropy,
        best_probability=torch.cat([part.values for part in best]).exp(),
        best_token=torch.cat([part.indices for part in best]),
        tokens=drawn.tokens,
        which=which,
    )


def _bounds(found: RowStatistics, sampler: Sampler, num_tokens: int) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Lower and upper bound of -confidence under the nucleus, from the unfiltered distribution."""
    top_p, is_alone = sampler.top_p, found.best_probability > sampler.top_p
    if sampler.order == "margin":
        margin = _confidence(found, sampler)
        low = -(margin / top_p).clamp(max=1.0)
        return torch.where(is_alone, -1.0, low), torch.where(is_alone, -1.0, -margin)
    coin = -top_p * math.log(top_p) - (1 - top_p) * math.log1p(-top_p)
    low = (found.entropy - coin - (1 - top_p) * math.log(num_tokens)).clamp(min=0.0)
    return torch.where(is_alone, 0.0, low), torch.where(is_alone, 0.0, found.entropy / top_p)


def _nth_smallest(values: Float[Tensor, " N"], row_of: Int[Tensor, " N"], count: Int[Tensor, " R"]) -> Tensor:
    """The `count`-th smallest value of each row; inf where a row has fewer, -inf where the count is 0."""
    sizes = row_of.bincount(minlength=len(count))
    rank = torch.arange(len(values), device=values.device) - (sizes.cumsum(0) - sizes)[row_of]
    table = values.new_full((len(count), max(int(sizes.max()), int(count.max())) + 1), float("inf"))
    table[row_of, rank] = values
    found = table.sort(dim=-1).values.gather(-1, (count - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(count > 0, found, float("-inf"))


# --- tokens of the chosen positions -----------------------------------------------------------------------------------


def choose_tokens(
    head: OutputHead,
    hidden: Float[Tensor, "M D"],
    sampler: Sampler,
    draws: Float[Tensor, " M"],
    tokens: Int[Tensor, " M"] | None = None,
    logits: Float[Tensor, "M V"] | None = None,
) -> Choice:
    """Draw a token for each chosen position, or take the given ones where they are not -1.

    `logits`: kept by a reading; None makes them from the hidden states.
    """
    parts = []
    for rows in chunks(head, hidden):
        given = None if tokens is None else tokens[rows]
        if logits is not None:
            parts.append(draw_logits(_filtered(logits[rows], sampler), sampler.temperature, draws[rows], given))
        elif _is_filtered(sampler):
            filtered = _filtered(tempered(head, hidden[rows], sampler.temperature), sampler)
            parts.append(draw_logits(filtered, sampler.temperature, draws[rows], given))
        else:
            parts.append(draw_states(head, hidden[rows], sampler.temperature, draws[rows], given))
    return Choice.joined(parts)


def choose_positions(
    scores: Float[Tensor, "R L"],
    entropy: Float[Tensor, "R L"],
    best_probability: Float[Tensor, "R L"],
    count: Int[Tensor, " R"],
    sampler: Sampler,
) -> Bool[Tensor, "R L"]:
    """The `count` most confident masked positions of each row, and others above a threshold.

    With `confidence_threshold`, every position whose likeliest token has at least that probability; with
    `entropy_bound` γ, the most confident ones as long as Σ H - max H ≤ γ over them, which bounds the cost of committing
    them at once instead of one after the other [EB-Sampler]. At least one position where any is masked.

    Args:
        scores: -inf where nothing is masked; a stable sort breaks ties by position, so that the choice does not depend
            on the machine.
    """
    is_masked = scores > float("-inf")
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.zeros_like(order).scatter(
        1, order, torch.arange(scores.shape[1], device=order.device).expand_as(order)
    )
    if sampler.is_parallel:
        count = count.clamp(min=1)
    chosen = rank < count[:, None]
    if sampler.confidence_threshold is not None:
        chosen |= best_probability >= sampler.confidence_threshold
    if sampler.entropy_bound is not None:
        by_entropy = entropy.sort(dim=-1, stable=True)
        before = torch.cat((torch.zeros_like(entropy[:, :1]), by_entropy.values.cumsum(-1)[:, :-1]), dim=1)
        within = before <= sampler.entropy_bound
        chosen |= torch.zeros_like(within).scatter(1, by_entropy.indices, within)
    return chosen & is_masked


def chunks(head: OutputHead, hidden: Tensor) -> Iterator[slice]:
    """Slices of rows whose logits are made together; one empty slice where there are no rows."""
    most = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cuda"])
    size = max(1, most // head.num_tokens)
    for start in range(0, max(1, len(hidden)), size):
        yield slice(start, min(start + size, len(hidden)))
