"""Rollout by iterative denoising: start from a canvas of MASK, commit the surest positions, step by step.

Shapes: B rows, C canvas positions, S prompt + canvas, V vocabulary (see `shapes`). Source: method page §6.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from coupled.rl.keys import uniform
from coupled.rl.policy import Policy
from coupled.rl.shapes import Float, Int
from coupled.rl.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How a canvas is denoised. Example: 36 positions in 18 steps at temperature 1, lowest entropy first."""

    canvas: int
    denoising_steps: int
    temperature: float
    """0 is greedy: the likeliest token, with confidence from the untempered distribution."""
    top_p: float = 1.0
    order: str = "entropy"

    @property
    def hash(self) -> str:
        """Names the sampler in logs: equal samplers have equal hashes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to make. `uid` names its random stream."""

    uid: str
    prompt_ids: tuple[int, ...]


def unmask_counts(canvas: int, num_steps: int) -> list[int]:
    """How many positions each step commits: the schedule of Dream's reference sampler.

    With `t = linspace(1, 1e-3, steps + 1)`, step i commits `⌊m · (1 - t_{i+1} / t_i)⌋` of the m that are masked, and
    the last step all that are left. 256 in 256 steps gives [0, 1, …, 1, 2]; 256 in 128 gives [1, 2, …, 2, 3].
    """
    times = torch.linspace(1, 1e-3, num_steps + 1)
    left, counts = canvas, []
    for step in range(num_steps):
        is_last = step == num_steps - 1
        count = left if is_last else int(left * (1 - times[step + 1] / times[step]))
        counts.append(count)
        left -= count
    return counts


def nucleus(logits: Float[Tensor, "N V"], top_p: float) -> Float[Tensor, "N V"]:
    """Keep the likeliest tokens whose mass reaches `top_p` (at least one); the others get -inf."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before > top_p)
    return logits.masked_fill(dropped, float("-inf"))


def draw_tokens(logp: Float[Tensor, "N V"], draws: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the uniform draw. fp64 sums."""
    cumulative = logp.double().exp().cumsum(-1)
    # Scaled by the total, so that rounding can never select a token beyond the last possible one.
    target = draws.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logp.shape[-1] - 1)


@torch.no_grad()
def denoise(
    policy: Policy,
    requests: list[Request],
    sampler: Sampler,
    *,
    seed: int,
    weight_version: int = 0,
    watch: Callable[[int, np.ndarray], None] | None = None,
) -> list[Rollout]:
    """Denoise one completion per request, all in one batch.

    Each row's numbers are keyed by (seed, uid, step, position), so they do not depend on which rows share the batch.
    A row leaves the batch as soon as every position before its first end token is settled: nothing later can change
    its text. MASK is never sampled. `watch` is shown every step with the canvases [B, C] after it.
    """
    batch_size, canvas = len(requests), sampler.canvas
    device = policy.device
    longest = max(len(r.prompt_ids) for r in requests)
    ids = torch.full((batch_size, longest + canvas), policy.mask_id, device=device)
    for row, request in enumerate(requests):
        pad = longest - len(request.prompt_ids)
        ids[row, :pad] = policy.pad_id
        ids[row, pad:longest] = torch.tensor(request.prompt_ids, device=device)
    pad_lengths = torch.tensor([longest - len(r.prompt_ids) for r in requests], device=device)

    commit_step = torch.full((batch_size, canvas), -1, dtype=torch.int32, device=device)
    commit_logp = torch.zeros((batch_size, canvas), device=device)
    commit_entropy = torch.zeros((batch_size, canvas), device=device)
    forwards = torch.zeros(batch_size, dtype=torch.int64)
    draws = _draws(requests, sampler, seed).to(device)
    live = torch.arange(batch_size, device=device)

    for step, count in enumerate(unmask_counts(canvas, sampler.denoising_steps)):
        if count == 0:
            continue
        rows_ids = ids[live]
        is_masked = rows_ids == policy.mask_id
        is_masked[:, :longest] = False
        logits = policy.without_mask_token(policy.logits_at(rows_ids, pad_lengths[live], is_masked))
        forwards[live.cpu()] += 1
        tempered = nucleus(logits / sampler.temperature if sampler.temperature else logits, sampler.top_p)
        logp = torch.log_softmax(tempered, dim=-1)
        entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
        row_of, position_of = is_masked[:, longest:].nonzero(as_tuple=True)
        uniform_of = draws[0, live[row_of], step, position_of]
        tokens: Int[Tensor, " N"] | None = None
        if sampler.order == "maskgit":
            tokens = _choose(logp, uniform_of, sampler)
            confidence = logp.gather(-1, tokens[:, None])[:, 0]
        elif sampler.order == "margin":
            best = logp.exp().topk(2, dim=-1).values
            confidence = best[:, 0] - best[:, 1]
        elif sampler.order == "origin":
            confidence = draws[1, live[row_of], step, position_of].float()
        else:
            confidence = -entropy
        scores = torch.full((len(live), canvas), float("-inf"), device=device)
        scores[row_of, position_of] = confidence
        # A stable sort breaks ties by position, so the choice does not depend on the machine.
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        picked = is_chosen[row_of, position_of]
        # For orders that do not look at the draw, only the chosen positions are sampled.
        new = _choose(logp[picked], uniform_of[picked], sampler) if tokens is None else tokens[picked]
        global_row, place = live[row_of[picked]], position_of[picked]
        ids[global_row, longest + place] = new
        commit_step[global_row, place] = step
        commit_logp[global_row, place] = logp[picked].gather(-1, new[:, None])[:, 0]
        commit_entropy[global_row, place] = entropy[picked]
        if watch is not None:
            watch(step, ids[:, longest:].cpu().numpy())
        live = live[~is_settled(ids[live, longest:], policy.mask_id, policy.end_ids)]
        if len(live) == 0:
            break

    return [
        _rollout(
            policy,
            request,
            ids[row, longest:].cpu().numpy().copy(),
            commit_step[row].cpu().numpy().copy(),
            commit_logp[row].cpu().numpy().copy(),
            commit_entropy[row].cpu().numpy().copy(),
            int(forwards[row]),
            weight_version,
            sampler,
        )
        for row, request in enumerate(requests)
    ]


def is_settled(canvas: Int[Tensor, "B C"], mask_id: int, end_ids: tuple[int, ...]) -> Tensor:
    """Rows whose text is final: no MASK before the first end token (or none at all)."""
    is_end = torch.isin(canvas, torch.tensor(end_ids, device=canvas.device))
    before_end = is_end.cumsum(-1) == 0
    return ~((canvas == mask_id) & before_end).any(-1)


def completion_length(canvas_ids: np.ndarray, end_ids: tuple[int, ...]) -> tuple[int, bool]:
    """Tokens up to and including the first end token, and whether there is one."""
    ends = np.flatnonzero(np.isin(canvas_ids, end_ids))
    return (int(ends[0]) + 1, True) if len(ends) else (len(canvas_ids), False)


def _draws(requests: list[Request], sampler: Sampler, seed: int) -> Tensor:
    """Uniform numbers [2, B, steps, C]: one for the token, one for the order, of each (row, step, position)."""
    shape = (2, sampler.denoising_steps, sampler.canvas)
    if sampler.temperature == 0 and sampler.order != "origin":
        return torch.zeros((2, len(requests), 1, 1)).expand(-1, -1, shape[1], shape[2])
    stacked = np.stack([uniform(shape, seed, "denoise", r.uid) for r in requests], axis=1)
    return torch.from_numpy(stacked)


def _choose(logp: Float[Tensor, "N V"], draws: Float[Tensor, " N"], sampler: Sampler) -> Int[Tensor, " N"]:
    return logp.argmax(-1) if sampler.temperature == 0 else draw_tokens(logp, draws)


def _rollout(
    policy: Policy,
    request: Request,
    canvas_ids: np.ndarray,
    commit_step: np.ndarray,
    commit_logp: np.ndarray,
    commit_entropy: np.ndarray,
    num_forwards: int,
    weight_version: int,
    sampler: Sampler,
) -> Rollout:
    length, has_end = completion_length(canvas_ids, policy.end_ids)
    text_ids = canvas_ids[: length - 1] if has_end else canvas_ids
    return Rollout(
        uid=request.uid,
        prompt_ids=request.prompt_ids,
        canvas_ids=canvas_ids,
        completion_length=length,
        text=policy.tokenizer.decode(text_ids.tolist(), skip_special_tokens=True),
        finish_reason="end" if has_end else "length",
        commit_step=commit_step,
        commit_logp=commit_logp,
        commit_entropy=commit_entropy,
        num_forwards=num_forwards,
        weight_version=weight_version,
        sampler_hash=sampler.hash,
    )
