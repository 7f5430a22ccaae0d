"""What hidden states say of masked positions: how sure each is, and which tokens the chosen ones get.

First every masked position gets a few numbers (entropy, probability of the likeliest token, margin), from logits that
are made for some rows at a time and thrown away. Then positions are chosen, and only those get a distribution and a
token. Both are exact: for `entropy` and `margin` the order does not depend on which tokens are drawn.

With a nucleus, confidence is that of the filtered distribution. It is bounded from the unfiltered one first, and
computed only where the bounds leave it open whether a position is among the surest:

    H(p) = P·H(q) + (1-P)·H(rest) + h(P),   P ≥ top_p,  0 ≤ H(rest) ≤ ln V
    ⇒ H(p) - h(top_p) - (1-top_p)·ln V  ≤  H(q)  ≤  H(p) / top_p          h: entropy of a coin
      p₁ - p₂  ≤  q₁ - q₂  ≤  (p₁ - p₂) / top_p,  and q₁ = 1 where p₁ > top_p

Shapes: N masked positions, M chosen ones, R rows of the batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coupled.rl.sampler import Sampler
from coupled.rl.shapes import Bool, Float, Int
from coupled.rl.vocabulary import CHUNK_LOGITS, OutputHead, fill_forbidden, project

FEW = 128
"""A nucleus is first looked for among so many of the likeliest tokens."""
FORBIDDEN = -1e30
"""Finite, so that a probability of zero times it is zero."""
ROUNDING = 1e-3
"""What sums over a vocabulary may be off by, in nats."""


# --- distributions ----------------------------------------------------------------------------------------------------


def likeliest(logits: Float[Tensor, "N V"], top_k: int) -> Float[Tensor, "N V"]:
    """Keep the `top_k` likeliest tokens (more where the last ones are equal); the others get -inf. 0 keeps all."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], float("-inf"))


def nucleus(logits: Float[Tensor, "N V"], top_p: float) -> Float[Tensor, "N V"]:
    """Keep the likeliest tokens whose mass reaches `top_p` (at least one); the others get -inf.

    A token stays if the mass of all likelier ones is at most `top_p`; equally likely tokens stay or go together.
    Nothing is sorted: see `least_kept`.
    """
    if top_p >= 1:
        return logits
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < least_kept(probability, top_p)[:, None], float("-inf"))


def least_kept(probability: Float[Tensor, "N V"], top_p: float) -> Float[Tensor, " N"]:
    """The smallest probability in the nucleus: the least p with mass{p' > p} ≤ top_p.

    Mostly it is among the few likeliest tokens. Where it is not, it is enclosed by bisection and then stepped to.
    """
    few = min(FEW, probability.shape[-1])
    best = probability.topk(few, dim=-1).values
    is_kept = best.cumsum(-1) - best <= top_p
    number = is_kept.sum(-1).clamp(min=1)
    least = best.gather(-1, number[:, None] - 1)[:, 0]
    is_open = number == few
    if few < probability.shape[-1] and bool(is_open.any()):
        least[is_open] = _enclose(probability[is_open], least[is_open], top_p)
    return least


def _enclose(probability: Float[Tensor, "N V"], kept: Float[Tensor, " N"], top_p: float) -> Float[Tensor, " N"]:
    """`least_kept`, from a probability that is known to be kept."""
    low, high = torch.zeros_like(kept), kept
    for _ in range(24):
        middle = (low + high) / 2
        is_kept = _mass_above(probability, middle) <= top_p
        low, high = torch.where(is_kept, low, middle), torch.where(is_kept, middle, high)
    # From here on through the probabilities that there are, of which few or none lie between.
    high = _next_below(probability, torch.nextafter(high, torch.full_like(high, 2.0)))
    while True:
        lower = _next_below(probability, high)
        is_kept = (lower >= 0) & (_mass_above(probability, lower) <= top_p)
        if not bool(is_kept.any()):
            return high
        high = torch.where(is_kept, lower, high)


def _mass_above(probability: Float[Tensor, "N V"], least: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    return (probability * (probability > least[:, None])).sum(-1)


def _next_below(probability: Float[Tensor, "N V"], limit: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The greatest probability below the limit; -1 where there is none."""
    return probability.masked_fill(probability >= limit[:, None], -1.0).amax(-1)


def draw_tokens(logp: Float[Tensor, "N V"], draws: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the uniform draw. fp64 sums."""
    cumulative = logp.double().exp().cumsum(-1)
    # Scaled by the total, so that rounding can never select a token beyond the last possible one.
    target = draws.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logp.shape[-1] - 1)


def distribution(head: OutputHead, hidden: Float[Tensor, "N D"], sampler: Sampler) -> Float[Tensor, "N V"]:
    """Log-probabilities that tokens are drawn with: tempered, filtered, without MASK and unnamed tokens."""
    logits = _tempered(head, hidden, sampler, float("-inf"))
    return torch.log_softmax(nucleus(likeliest(logits, sampler.top_k), sampler.top_p), dim=-1)


def entropy_of(logp: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """-Σ p log p, in nats; 0 log 0 = 0."""
    return -(logp.exp() * logp.clamp(min=FORBIDDEN)).sum(-1)


def _tempered(head: OutputHead, hidden: Float[Tensor, "N D"], sampler: Sampler, forbidden: float) -> Tensor:
    # The logits are nobody else's, so that they may be changed in place.
    logits = project(head, hidden)
    if sampler.temperature not in (0, 1):
        logits.div_(sampler.temperature)
    fill_forbidden(head, logits, forbidden)
    return logits


# --- how sure each position is ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """What N masked positions say, under the tempered and filtered distribution, before a token is chosen."""

    confidence: Float[Tensor, " N"]
    """The surer, the earlier a position is committed."""
    entropy: Float[Tensor, " N"]
    best_probability: Float[Tensor, " N"]
    """Of the likeliest token."""
    best_token: Int[Tensor, " N"] | None
    """The likeliest token, where the sampler fills with it."""
    tokens: Int[Tensor, " N"] | None = None
    """What each position would get, where the order depends on it; else tokens are drawn for the chosen ones alone."""

    @staticmethod
    def joined(parts: list[Reading]) -> Reading:
        """Consecutive positions as one record."""

        def column(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        return Reading(
            confidence=column("confidence"),
            entropy=column("entropy"),
            best_probability=column("best_probability"),
            best_token=column("best_token"),
            tokens=column("tokens"),
        )


def read_out(
    head: OutputHead,
    hidden: Float[Tensor, "N D"],
    sampler: Sampler,
    token_draws: Float[Tensor, " N"],
    order_draws: Float[Tensor, " N"],
    row_of: Int[Tensor, " N"],
    count: Int[Tensor, " R"],
) -> Reading:
    """How sure each masked position is.

    Args:
        row_of: the row that each position belongs to, ascending.
        count: how many positions of each row will be chosen. With a nucleus, a position that is certainly not among
            them gets a bound on its confidence instead of the confidence.
    """
    if sampler.order == "maskgit" and sampler.temperature > 0:
        return _with_tokens(head, hidden, sampler, token_draws)
    is_filtered = sampler.top_p < 1 or sampler.top_k > 0
    can_bound = sampler.order in ("entropy", "margin") and sampler.top_k == 0 and not _reads_all(sampler)
    parts, logits = [], hidden.new_empty(0)
    for rows in chunks(head, hidden):
        logits = _tempered(head, hidden[rows], sampler, FORBIDDEN)
        if is_filtered and not can_bound:
            logits = _filtered(logits, sampler)
        parts.append(_statistics(logits, sampler, order_draws[rows]))
    found = Reading.joined(parts)
    if not (is_filtered and can_bound):
        return found
    low, high = _bounds(found, sampler, head.num_tokens)
    is_rival = low <= _nth_smallest(high, row_of, count)[row_of] + ROUNDING
    rivals: Iterable[Tensor]
    if len(parts) == 1:
        rivals = [logits[is_rival]]
    else:
        chosen = hidden[is_rival]
        rivals = (_tempered(head, chosen[rows], sampler, FORBIDDEN) for rows in chunks(head, chosen))
    confidence = -low
    # The order draws are of no account where there are bounds.
    nothing = order_draws[:0]
    confidence[is_rival] = torch.cat([_statistics(_filtered(z, sampler), sampler, nothing).confidence for z in rivals])
    return replace(found, confidence=confidence)


def _reads_all(sampler: Sampler) -> bool:
    """Whether entropies or probabilities of all positions decide what a step commits."""
    return sampler.is_parallel or sampler.end_fill is not None


def _filtered(logits: Float[Tensor, "N V"], sampler: Sampler) -> Float[Tensor, "N V"]:
    """Without the tokens that the sampler leaves out."""
    return nucleus(likeliest(logits, sampler.top_k), sampler.top_p).clamp_(min=FORBIDDEN)


def _statistics(logits: Float[Tensor, "N V"], sampler: Sampler, order_draws: Float[Tensor, " K"]) -> Reading:
    """A reading, without writing log-probabilities down. Leaves the logits less the greatest of their row."""
    top = logits.amax(-1)
    second = logits.topk(2, dim=-1).values[:, 1] if sampler.order == "margin" else top
    token = logits.argmax(-1) if sampler.end_fill is not None else None
    probability = logits.softmax(-1)
    best_probability = probability.amax(-1)
    # H = -log p₁ - Σ p (z - z₁): the normaliser is never needed.
    entropy = -best_probability.log() - probability.mul_(logits.sub_(top[:, None])).sum(-1)
    confidence = -entropy
    if sampler.order == "margin":
        confidence = best_probability * (1 - (second - top).exp())
    elif sampler.order == "maskgit":
        confidence = best_probability
    elif sampler.order == "origin":
        confidence = order_draws.to(entropy.dtype)
    return Reading(confidence=confidence, entropy=entropy, best_probability=best_probability, best_token=token)


def _with_tokens(
    head: OutputHead, hidden: Float[Tensor, "N D"], sampler: Sampler, token_draws: Float[Tensor, " N"]
) -> Reading:
    """A reading where confidence is that of the token that is drawn, so that each position draws one."""
    parts = []
    for rows in chunks(head, hidden):
        logp = distribution(head, hidden[rows], sampler)
        tokens = draw_tokens(logp, token_draws[rows])
        best = logp.max(-1)
        parts.append(
            Reading(
                confidence=logp.gather(-1, tokens[:, None])[:, 0],
                entropy=entropy_of(logp),
                best_probability=best.values.exp(),
                best_token=best.indices,
                tokens=tokens,
            )
        )
    return Reading.joined(parts)


def _bounds(found: Reading, sampler: Sampler, num_tokens: int) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The least and the greatest that -confidence can be under the nucleus, from the unfiltered distribution."""
    top_p, is_alone = sampler.top_p, found.best_probability > sampler.top_p
    if sampler.order == "margin":
        margin = found.confidence
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


# --- what the chosen ones get -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """The tokens of M positions, with their log-probabilities and the entropies they were drawn at, in nats."""

    tokens: Int[Tensor, " M"]
    logp: Float[Tensor, " M"]
    entropy: Float[Tensor, " M"]


def choose_tokens(
    head: OutputHead,
    hidden: Float[Tensor, "M D"],
    sampler: Sampler,
    draws: Float[Tensor, " M"],
    tokens: Int[Tensor, " M"] | None = None,
) -> Choice:
    """Draw a token for each chosen position, or take the given ones where they are not -1."""
    parts = []
    for rows in chunks(head, hidden):
        logp = distribution(head, hidden[rows], sampler)
        drawn = _choose(logp, draws[rows], sampler) if tokens is None or bool((tokens[rows] < 0).any()) else None
        if tokens is not None:
            drawn = tokens[rows] if drawn is None else torch.where(tokens[rows] < 0, drawn, tokens[rows])
        assert drawn is not None
        parts.append((drawn, logp.gather(-1, drawn[:, None])[:, 0], entropy_of(logp)))
    chosen, logp, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return Choice(tokens=chosen, logp=logp, entropy=entropy)


def _choose(logp: Float[Tensor, "N V"], draws: Float[Tensor, " N"], sampler: Sampler) -> Int[Tensor, " N"]:
    return logp.argmax(-1) if sampler.temperature == 0 else draw_tokens(logp, draws)


def choose_positions(
    scores: Float[Tensor, "R L"],
    entropy: Float[Tensor, "R L"],
    best_probability: Float[Tensor, "R L"],
    count: Int[Tensor, " R"],
    sampler: Sampler,
) -> Bool[Tensor, "R L"]:
    """The surest `count` masked positions of each row, and those that are sure enough besides.

    With `confidence_threshold`, every position whose likeliest token has at least that probability; with
    `entropy_bound` γ, the surest ones as long as Σ H - max H ≤ γ over them, which bounds what committing them at once
    instead of one after the other can cost [EB-Sampler]. At least one position where any is masked.

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
