"""Per-token log-probability estimates of a completion, for every estimator and model family.

A diffusion model has no left-to-right likelihood. With `V` the valid positions and `ℓ_k(M)` the log-probability of
token k when the positions M are masked and the others are visible, an estimator (`rl/estimators`) draws the masks, and

    s_k = 1/total · Σ_views 1[k ∈ scored] · ℓ_k(hidden) / divisor

which for λ coupled pairs with M'_j = V \\ M_j is DiffuCoder's eq. 4:

    s_k = 1/(λ+1) · [ ℓ_k(V) + Σ_j ( 1[k∈M_j] / t_j · ℓ_k(M_j) + 1[k∈M'_j] / (1 - t_j) · ℓ_k(M'_j) ) ]

Shapes: B rows, C canvas positions, S prompt + canvas, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from coupled.rl.model.policy import Policy
from coupled.rl.recipe.objective import Estimator
from coupled.rl.shapes import Bool, Float, Int
from coupled.rl.types import MaskDraw, TrainBatch, View


def estimate_logp(
    policy: Policy,
    batch: TrainBatch,
    draw: MaskDraw,
    estimator: Estimator,
    temperature: float = 1.0,
    *,
    skips_empty_views: bool = True,
) -> Float[Tensor, "B C"]:
    """s_k of every valid token, in nats; 0 elsewhere. Differentiable; fp32. Their sum is the completion's score.

    `temperature` divides the logits. With the rollout's temperature, the scored policy is the sampled one. At
    1, a token that is likely at 1 but not at the rollout's temperature would hardly be reinforced.

    An estimate E of the completion as a whole is spread evenly, s_k = E/L: the ratio of every token is then
    exp((E - E_old)/L), and the k2 penalties ½ (s_k - s_k^ref)² of a completion add up to ½ (E - E_ref)²/L [ESPO].

    `skips_empty_views` leaves out forward passes that score no token. Ranks that gather layers together must make
    equally many passes, whatever their masks, and set it to False.
    """
    scores = torch.zeros(batch.valid.shape, device=batch.ids.device)
    forwards = that_score(draw.forwards) if skips_empty_views else draw.forwards
    for terms in _terms(policy, batch, draw, estimator, temperature, forwards):
        for term in terms:
            scores = scores + term
    return _estimate_of(scores, batch, draw)


def backward_by_view(
    policy: Policy,
    batch: TrainBatch,
    draw: MaskDraw,
    estimator: Estimator,
    slope: Float[Tensor, "B C"],
    temperature: float = 1.0,
    *,
    skips_empty_views: bool = True,
) -> None:
    """Add Σ_k slope_k · ∂s_k/∂θ to the gradients, one view at a time: no two views are in memory together.

    A loss is not linear in s, but s is linear in the views. So with slope = ∂loss/∂s, taken at the s of a pass without
    gradients, each view adds its own share to ∂loss/∂θ, whatever their number. `skips_empty_views`: as for
    `estimate_logp`.
    """
    forwards: tuple[tuple[View, ...], ...] = tuple((view,) for view in draw.views)
    if skips_empty_views:
        forwards = that_score(forwards)
    for terms in _terms(policy, batch, draw, estimator, temperature, forwards):
        (_estimate_of(terms[0], batch, draw) * slope).sum().backward()


def _terms(
    policy: Policy,
    batch: TrainBatch,
    draw: MaskDraw,
    estimator: Estimator,
    temperature: float,
    forwards: tuple[tuple[View, ...], ...],
) -> Iterator[tuple[Float[Tensor, "B C"], ...]]:
    """ℓ_k(hidden) / divisor at the scored positions of each view and 0 elsewhere, forward pass by forward pass."""
    if estimator.post_eos == "excluded":
        ended, moved = without_tail(batch, replace(draw, forwards=forwards), policy.mask_id)
        kept = estimator.model_copy(update={"post_eos": "kept"})
        for terms in _terms(policy, ended, moved, kept, temperature, moved.forwards):
            yield tuple(with_tail(term, batch.valid) for term in terms)
        return
    batch = _without_shared_padding(batch)
    ids = canvas_for_scoring(batch, policy.mask_id, estimator.post_eos)
    if draw.hidden_prompt is not None:
        ids = _with_hidden_prompt(ids, draw.hidden_prompt, batch, policy.mask_id)
    for views in forwards:
        found = _view_logp(policy, ids, batch, views, temperature)
        yield tuple(logp / view.divisor.to(logp.dtype)[:, None] for view, logp in zip(views, found, strict=True))


def _estimate_of(terms: Float[Tensor, "B C"], batch: TrainBatch, draw: MaskDraw) -> Float[Tensor, "B C"]:
    scores = terms / draw.total
    return spread_over_tokens(scores.sum(-1), batch.valid) if draw.is_sequence else scores


def spread_over_tokens(scores: Float[Tensor, " B"], valid: Bool[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """E/L at each of the L valid positions of a row. Example: E = -6, valid [1, 1, 1, 0] → [-2, -2, -2, 0]."""
    return (scores / valid.sum(-1).clamp(min=1))[:, None] * valid


def that_score(forwards: tuple[tuple[View, ...], ...]) -> tuple[tuple[View, ...], ...]:
    """The forward passes that score a token; at least one pass, so that the result always has a gradient."""
    return tuple(views for views in forwards if any(bool(view.scored.any()) for view in views)) or forwards[:1]


def _view_logp(
    policy: Policy, ids: Int[Tensor, "B S"], batch: TrainBatch, views: tuple[View, ...], temperature: float
) -> tuple[Float[Tensor, "B C"], ...]:
    """ℓ_k(hidden) at the scored positions of each view and 0 elsewhere, from one forward pass."""
    # With block attention the earlier blocks are visible in every view, so completions have no input in common.
    if len(views) == 1 and views[0].is_shared and policy.family.block_length is None:
        return (fully_masked_logp(policy, ids, batch, temperature),)
    times = len(views)
    logp = masked_logp(
        policy,
        ids.repeat(times, 1),
        batch.pad_lengths.repeat(times),
        torch.cat([view.hidden for view in views]),
        batch.ids[:, -batch.canvas_length :].repeat(times, 1),
        temperature,
        scored=torch.cat([view.scored for view in views]),
    )
    return logp.chunk(times)


def canvas_for_scoring(batch: TrainBatch, mask_id: int, post_eos: str) -> Int[Tensor, "B S"]:
    """Prompt and canvas as scoring reads them: after the end token the sampler's tokens (`kept`), or else MASK."""
    if post_eos == "kept":
        return batch.ids
    ids = batch.ids.clone()
    ids[:, -batch.canvas_length :][~batch.valid] = mask_id
    return ids


def without_tail(batch: TrainBatch, draw: MaskDraw, mask_id: int) -> tuple[TrainBatch, MaskDraw]:
    """The same completions cut after their ends: each row moves right, and its tail becomes padding.

    Padding is never attended and positions count from the first real token, so a row is scored as if its canvas had
    L positions. Example: a prompt p and the canvas [a, end, x, y] → 2 more positions of padding, then [p, a, end].
    """
    tail = batch.canvas_length - batch.valid.sum(-1)
    ids = batch.ids
    if draw.hidden_prompt is not None:  # the prompt moves below
        ids = _with_hidden_prompt(ids, draw.hidden_prompt, batch, mask_id)
    moved = replace(
        batch,
        ids=_moved_right(ids, tail, mask_id),
        pad_lengths=batch.pad_lengths + tail,
        valid=_moved_right(batch.valid, tail, False),
    )
    forwards = tuple(
        tuple(
            replace(view, hidden=_moved_right(view.hidden, tail, False), scored=_moved_right(view.scored, tail, False))
            for view in views
        )
        for views in draw.forwards
    )
    return moved, replace(draw, forwards=forwards, hidden_prompt=None)


def with_tail(scores: Float[Tensor, "B C"], valid: Bool[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Scores of `without_tail` back at the positions of the canvas; 0 after the end."""
    tail = valid.shape[1] - valid.sum(-1)
    place = torch.arange(valid.shape[1], device=valid.device)
    return scores.gather(1, (place + tail[:, None]).clamp(max=valid.shape[1] - 1)) * valid


def _moved_right(rows: Tensor, by: Int[Tensor, " B"], filler: int | bool) -> Tensor:
    source = torch.arange(rows.shape[1], device=rows.device) - by[:, None]
    return rows.gather(1, source.clamp(min=0)).masked_fill(source < 0, filler)


def masked_logp(
    policy: Policy,
    ids: Int[Tensor, "B S"],
    pad_lengths: Int[Tensor, " B"],
    masked: Bool[Tensor, "B C"],
    targets: Int[Tensor, "B C"],
    temperature: float = 1.0,
    *,
    scored: Bool[Tensor, "B C"] | None = None,
) -> Float[Tensor, "B C"]:
    """ℓ_k(M) at k ∈ `scored` (by default M) and 0 elsewhere, M being the positions `masked` of each row."""
    scored = masked if scored is None else scored
    canvas = masked.shape[1]
    hidden, rows = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, -canvas:], rows[:, -canvas:] = masked, scored
    full_targets = ids.clone()
    full_targets[:, -canvas:] = targets
    logp = policy.logp_at(ids.masked_fill(hidden, policy.mask_id), pad_lengths, rows, full_targets, temperature)
    return logp.new_zeros(masked.shape).masked_scatter(scored, logp)


def fully_masked_logp(
    policy: Policy, ids: Int[Tensor, "B S"], batch: TrainBatch, temperature: float = 1.0
) -> Float[Tensor, "B C"]:
    """ℓ_k(V), computing each distinct input once.

    With every valid position masked, completions of one prompt often have the same input; the forward pass is then
    shared, and only the targets differ.
    """
    canvas = batch.canvas_length
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[:, -canvas:] = batch.valid
    # The padding length is compared as well: equal ids with different padding are different inputs.
    inputs = torch.cat((batch.pad_lengths[:, None], ids.masked_fill(rows, policy.mask_id)), dim=1)
    distinct, which = torch.unique(inputs, dim=0, return_inverse=True)
    needed = torch.zeros((len(distinct), ids.shape[1]), dtype=torch.bool, device=ids.device)
    needed[:, -canvas:] = torch.zeros_like(needed[:, -canvas:], dtype=torch.int64).index_add_(
        0, which, batch.valid.long()
    ).bool()  # fmt: skip
    place = torch.full(needed.shape, -1, device=ids.device)
    place[needed] = torch.arange(int(needed.sum()), device=ids.device)
    line = place[which][:, -canvas:][batch.valid]
    targets = batch.ids[:, -canvas:][batch.valid]
    picked = policy.logp_of(distinct[:, 1:], distinct[:, 0], needed, line, targets, temperature)
    return picked.new_zeros(batch.valid.shape).masked_scatter(batch.valid, picked)


def _with_hidden_prompt(
    ids: Int[Tensor, "B S"], hidden_prompt: Bool[Tensor, "B P"], batch: TrainBatch, mask_id: int
) -> Int[Tensor, "B S"]:
    width = ids.shape[1] - batch.canvas_length
    # Leading columns may have been cut since the draw; they were padding, and prompts end at the right.
    hidden = hidden_prompt[:, hidden_prompt.shape[1] - width :]
    return torch.cat((ids[:, :width].masked_fill(hidden, mask_id), ids[:, width:]), dim=1)


def _without_shared_padding(batch: TrainBatch) -> TrainBatch:
    """Cut the leading columns before the canvas that are padding in every row: they do not change scores."""
    shared = min(int(batch.pad_lengths.min()), batch.ids.shape[1] - batch.canvas_length)
    if shared == 0:
        return batch
    return replace(batch, ids=batch.ids[:, shared:], pad_lengths=batch.pad_lengths - shared)
