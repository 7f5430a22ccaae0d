"""Rollout by iterative denoising, the whole canvas at once: from MASK everywhere, commit the surest positions first.

Each step computes the hidden states of the canvases (`canvas_states`), measures the confidence of masked positions,
chooses positions and draws their tokens (`readout`), by the sampler's plan (`sampler`).

Shapes: B rows, R of them in a step, C canvas positions, S prompt + canvas, N masked positions, M chosen ones. Source:
docs/method.md, rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from coupled.rl.keys import uniform
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.canvas_states import CachedStates, distinct_states
from coupled.rl.rollout.readout import Choice, choose_positions, choose_tokens, read_out
from coupled.rl.rollout.sampler import Request, Step, plan_steps
from coupled.rl.shapes import Bool, Float, Int
from coupled.rl.types import Rollout


@torch.no_grad()
def denoise(
    policy: Policy,
    requests: list[Request],
    sampler: Sampler,
    *,
    seed: int,
    weight_version: int = 0,
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> list[Rollout]:
    """Denoise one completion per request, all in one batch.

    Each row's numbers are keyed by (seed, uid, step, position), so they do not depend on which rows share the batch.
    A row leaves the batch as soon as every position before its first end token is settled: nothing later can change
    its text. MASK is never sampled. `on_step` receives the number of every step and the canvases [B, C] after it.
    """
    plan = plan_steps(sampler)
    rows = _Rows(policy, requests, sampler.canvas)
    draws = keyed_draws(requests, sampler, seed, plan[-1].number + 1).to(policy.device)
    cached = None if sampler.cache == "none" else CachedStates(policy, sampler, rows.prompt_width)
    live = torch.arange(len(requests), device=policy.device)
    for step in plan:
        here = live[(rows.canvas_ids[live][:, step.block] == policy.mask_id).any(-1)]
        if len(here) == 0:
            continue
        rows.commit(here, _take_step(policy, rows, here, sampler, step, draws[:, here, step.number], cached), step)
        if on_step is not None:
            on_step(step.number, rows.canvas_ids.cpu().numpy())
        live = live[~_is_done(rows.canvas_ids[live], policy, sampler)]
        if len(live) == 0:
            break
    return [rows.rollout(row, request, weight_version, sampler) for row, request in enumerate(requests)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Commit:
    """M positions that R rows commit in a step, row by row."""

    is_chosen: Bool[Tensor, "R C"]
    is_filled: Bool[Tensor, "R C"]
    """The chosen positions that `end_fill` fills with an end token out of turn."""
    choice: Choice


def _take_step(
    policy: Policy,
    rows: _Rows,
    here: Int[Tensor, " R"],
    sampler: Sampler,
    step: Step,
    draws: Float[Tensor, "2 R C"],
    cached: CachedStates | None,
) -> Commit:
    """Choose positions of the step's block, and tokens for them."""
    canvases = rows.canvas_ids[here]
    is_masked = torch.zeros_like(canvases, dtype=torch.bool)
    is_masked[:, step.block] = canvases[:, step.block] == policy.mask_id
    count = torch.full((len(here),), step.count, device=canvases.device)
    nothing = torch.zeros_like(is_masked)
    token_draws, order_draws = draws
    if sampler.order == "origin" and not (sampler.is_parallel or sampler.end_fill is not None):
        # The choice of positions does not depend on the model: only the chosen ones are read.
        scores = order_draws.masked_fill(~is_masked, float("-inf")).float()
        is_chosen = choose_positions(scores, scores, scores, count, sampler)
        hidden, which = _states(policy, rows, here, is_chosen, step, cached)
        choice = choose_tokens(policy.head, hidden[which], sampler, token_draws[is_chosen])
        return Commit(is_chosen=is_chosen, is_filled=nothing, choice=choice)
    hidden, which = _states(policy, rows, here, is_masked, step, cached)
    row_of = is_masked.nonzero()[:, 0]
    reading = read_out(
        policy.head, hidden, sampler, token_draws[is_masked], order_draws[is_masked], row_of, count, which
    )
    scores, entropy, best = (
        torch.full(is_masked.shape, absent, device=hidden.device, dtype=values.dtype).masked_scatter(is_masked, values)
        for absent, values in (
            (float("-inf"), reading.confidence),
            (float("inf"), reading.entropy),
            (0.0, reading.best_probability),
        )
    )
    is_chosen = choose_positions(scores, entropy, best, count, sampler)
    is_filled, tokens = nothing, reading.tokens
    if sampler.end_fill is not None:
        assert reading.best_token is not None
        is_end = nothing.masked_scatter(is_masked, torch.isin(reading.best_token, rows.end_ids))
        is_behind = torch.isin(canvases, rows.end_ids).cumsum(-1) > 0
        is_filled = is_end & is_behind & (best >= sampler.end_fill) & ~is_chosen
        drawn = torch.full_like(reading.best_token, -1) if tokens is None else tokens
        tokens = torch.where(is_filled[is_masked], reading.best_token, drawn)
        is_chosen = is_chosen | is_filled
    picked = is_chosen[is_masked]
    tokens = None if tokens is None else tokens[picked]
    states, logits = reading.source(picked)
    choice = choose_tokens(policy.head, hidden[states], sampler, token_draws[is_chosen], tokens, logits)
    return Commit(is_chosen=is_chosen, is_filled=is_filled, choice=choice)


def _states(
    policy: Policy,
    rows: _Rows,
    here: Int[Tensor, " R"],
    places: Bool[Tensor, "R C"],
    step: Step,
    cached: CachedStates | None,
) -> tuple[Float[Tensor, "U D"], Int[Tensor, " N"]]:
    """The hidden states that predict the tokens at these places of the canvases, and which of them each place reads."""
    ids, pad_lengths = rows.ids[here], rows.pad_lengths[here]
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[:, rows.prompt_width :] = places
    if cached is None:
        return distinct_states(policy, ids, pad_lengths, wanted)
    return cached.read(here, ids, pad_lengths, wanted, step)


def _is_done(canvases: Int[Tensor, "R C"], policy: Policy, sampler: Sampler) -> Bool[Tensor, " R"]:
    if sampler.has_early_exit:
        return is_settled(canvases, policy.mask_id, policy.end_ids)
    return ~(canvases == policy.mask_id).any(-1)


class Record:
    """Step, log-probability and entropy of every committed position of B canvases, and the forward passes of each."""

    def __init__(self, policy: Policy, num_rows: int, canvas: int) -> None:
        self._policy = policy
        size, device = (num_rows, canvas), policy.device
        self.forwards = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._step = torch.full(size, -1, dtype=torch.int32, device=device)
        self._logp = torch.zeros(size, device=device)
        self._entropy = torch.zeros(size, device=device)
        self._kl_bound = torch.zeros(num_rows, device=device)
        self._fill_bound = torch.zeros(num_rows, device=device)

    def commit(
        self,
        rows: Int[Tensor, " M"],
        places: Int[Tensor, " M"],
        choice: Choice,
        step: int,
        *,
        is_filled: Bool[Tensor, " M"] | None = None,
    ) -> None:
        """Record M positions of one step. Filled positions add no entropy, but a bound of their own."""
        committed = choice.entropy.float()
        self._step[rows, places] = step
        self._logp[rows, places] = choice.logp.float()
        self._entropy[rows, places] = committed
        if is_filled is not None:
            missing = torch.where(is_filled, -torch.expm1(choice.logp), 0.0)
            self._fill_bound.index_add_(0, rows, missing.float())
            committed = torch.where(is_filled, 0.0, committed)
        entropy = torch.zeros_like(self._entropy)
        entropy[rows, places] = committed
        self._kl_bound += entropy.sum(-1) - entropy.amax(-1)

    def rollout(
        self, row: int, request: Request, canvas_ids: Int[Tensor, " C"], weight_version: int, sampler: Sampler
    ) -> Rollout:
        """The rollout of a finished row."""
        arrays = (canvas_ids, self._step[row], self._logp[row], self._entropy[row])
        ids, step, logp, entropy = (array.cpu().numpy().copy() for array in arrays)
        return make_rollout(
            self._policy,
            request,
            ids,
            step,
            logp,
            entropy,
            int(self.forwards[row]),
            weight_version,
            sampler,
            kl_bound=float(self._kl_bound[row]),
            fill_bound=float(self._fill_bound[row]),
        )


class _Rows:
    """The rows of a batch, and the state of their canvases."""

    def __init__(self, policy: Policy, requests: list[Request], canvas: int) -> None:
        self._policy = policy
        device = policy.device
        lengths = [len(r.prompt_ids) for r in requests]
        self.prompt_width = max(lengths)
        self.pad_lengths = torch.tensor([self.prompt_width - length for length in lengths], device=device)
        self.ids = torch.full((len(requests), self.prompt_width + canvas), policy.mask_id, device=device)
        for row, request in enumerate(requests):
            pad = self.prompt_width - len(request.prompt_ids)
            self.ids[row, :pad] = policy.pad_id
            self.ids[row, pad : self.prompt_width] = torch.tensor(request.prompt_ids, device=device)
        self.end_ids = torch.tensor(policy.end_ids, device=device)
        self._record = Record(policy, len(requests), canvas)

    @property
    def canvas_ids(self) -> Int[Tensor, "B C"]:
        return self.ids[:, self.prompt_width :]

    def commit(self, here: Int[Tensor, " R"], commit: Commit, step: Step) -> None:
        """Record the commits of the rows `here`."""
        row_of, place = commit.is_chosen.nonzero(as_tuple=True)
        row, choice = here[row_of], commit.choice
        self.ids[row, self.prompt_width + place] = choice.tokens
        self._record.forwards[here] += 1
        self._record.commit(row, place, choice, step.number, is_filled=commit.is_filled[commit.is_chosen])

    def rollout(self, row: int, request: Request, weight_version: int, sampler: Sampler) -> Rollout:
        """The rollout of a finished row."""
        return self._record.rollout(row, request, self.canvas_ids[row], weight_version, sampler)


def is_settled(canvas: Int[Tensor, "B C"], mask_id: int, end_ids: tuple[int, ...]) -> Tensor:
    """Rows whose text is final: no MASK before the first end token (or none at all)."""
    is_end = torch.isin(canvas, torch.tensor(end_ids, device=canvas.device))
    before_end = is_end.cumsum(-1) == 0
    return ~((canvas == mask_id) & before_end).any(-1)


def completion_length(canvas_ids: np.ndarray, end_ids: tuple[int, ...]) -> tuple[int, bool]:
    """Tokens up to and including the first end token, and whether there is one."""
    ends = np.flatnonzero(np.isin(canvas_ids, end_ids))
    return (int(ends[0]) + 1, True) if len(ends) else (len(canvas_ids), False)


def keyed_draws(requests: list[Request], sampler: Sampler, seed: int, num_steps: int = 0) -> Float[Tensor, "2 B T C"]:
    """Uniform numbers: one for the token, one for the order, of each (row, step, position)."""
    shape = (2, num_steps or sampler.denoising_steps, sampler.canvas)
    if sampler.temperature == 0 and sampler.order != "origin":
        return torch.zeros((2, len(requests), 1, 1)).expand(-1, -1, shape[1], shape[2])
    stacked = np.stack([uniform(shape, seed, "denoise", r.uid) for r in requests], axis=1)
    return torch.from_numpy(stacked)


@runtime_checkable
class Detokenizer(Protocol):
    """Converts token ids to text, and knows the end tokens: a policy, or a causal model."""

    tokenizer: Any
    end_ids: tuple[int, ...]


def make_rollout(
    model: Detokenizer,
    request: Request,
    canvas_ids: np.ndarray,
    commit_step: np.ndarray,
    commit_logp: np.ndarray,
    commit_entropy: np.ndarray,
    num_forwards: int,
    weight_version: int,
    sampler: Sampler,
    *,
    kl_bound: float = 0.0,
    fill_bound: float = 0.0,
) -> Rollout:
    """The record of a finished row. Arrays have one entry per canvas position."""
    length, has_end = completion_length(canvas_ids, model.end_ids)
    text_ids = canvas_ids[: length - 1] if has_end else canvas_ids
    return Rollout(
        uid=request.uid,
        prompt_ids=request.prompt_ids,
        canvas_ids=canvas_ids,
        completion_length=length,
        text=model.tokenizer.decode(text_ids.tolist(), skip_special_tokens=True),
        finish_reason="end" if has_end else "length",
        commit_step=commit_step,
        commit_logp=commit_logp,
        commit_entropy=commit_entropy,
        num_forwards=num_forwards,
        weight_version=weight_version,
        sampler_hash=sampler.hash,
        kl_bound=kl_bound,
        fill_bound=fill_bound,
    )
