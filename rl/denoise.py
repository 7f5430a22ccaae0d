"""Rollout by iterative denoising, the whole canvas at once: from MASK everywhere, commit the surest positions first.

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

from coupled.rl.errors import RolloutError
from coupled.rl.keys import uniform
from coupled.rl.policy import Policy
from coupled.rl.shapes import Bool, Float, Int
from coupled.rl.types import Rollout

PARALLEL = ("confidence_threshold", "entropy_bound")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How a canvas is denoised. Example: 36 positions in 18 steps at temperature 1, lowest entropy first."""

    canvas: int
    denoising_steps: int
    temperature: float
    """0 is greedy: the likeliest token, with confidence from the untempered distribution."""
    top_p: float = 1.0
    order: str = "entropy"
    top_k: int = 0
    """Only the k likeliest tokens are kept, before the nucleus; 0 keeps all."""
    confidence_threshold: float | None = None
    """Of block families: a step also commits every token that is at least so sure; none: by the schedule alone."""
    entropy_bound: float | None = None
    """Of block families: a step also commits the surest tokens as long as the entropies of all but the last add up to
    at most this, in nats [EB-Sampler]; none: by the schedule alone."""

    @property
    def hash(self) -> str:
        """Names the sampler in logs: equal samplers have equal hashes."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("top_k", *PARALLEL) or v}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


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


def likeliest(logits: Float[Tensor, "N V"], top_k: int) -> Float[Tensor, "N V"]:
    """Keep the `top_k` likeliest tokens (more where the last ones are equal); the others get -inf. 0 keeps all."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], float("-inf"))


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """What a forward pass says of N masked positions, under the tempered and filtered distribution."""

    logp: Float[Tensor, "N V"]
    entropy: Float[Tensor, " N"]
    confidence: Float[Tensor, " N"]
    """The surer, the earlier a position is committed."""
    tokens: Int[Tensor, " N"] | None
    """What each position would get, where the order depends on it; else tokens are drawn for the chosen ones alone."""

    def draw(self, picked: Bool[Tensor, " N"], draws: Float[Tensor, " N"], sampler: Sampler) -> Int[Tensor, " M"]:
        """Tokens of the picked positions."""
        if self.tokens is not None:
            return self.tokens[picked]
        return _choose(self.logp[picked], draws[picked], sampler)


def read_out(
    logits: Float[Tensor, "N V"], sampler: Sampler, token_draws: Float[Tensor, " N"], order_draws: Float[Tensor, " N"]
) -> Reading:
    """Distribution, entropy and confidence of each masked position."""
    tempered = logits / sampler.temperature if sampler.temperature else logits
    logp = torch.log_softmax(nucleus(likeliest(tempered, sampler.top_k), sampler.top_p), dim=-1)
    entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
    tokens: Int[Tensor, " N"] | None = None
    if sampler.order == "maskgit":
        tokens = _choose(logp, token_draws, sampler)
        confidence = logp.gather(-1, tokens[:, None])[:, 0]
    elif sampler.order == "margin":
        best = logp.exp().topk(2, dim=-1).values
        confidence = best[:, 0] - best[:, 1]
    elif sampler.order == "origin":
        confidence = order_draws.float()
    else:
        confidence = -entropy
    return Reading(logp=logp, entropy=entropy, confidence=confidence, tokens=tokens)


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

    Raises:
        RolloutError: the sampler has a setting that is for block families alone.
    """
    if any(getattr(sampler, name) is not None for name in PARALLEL):
        raise RolloutError(
            f"{' and '.join(PARALLEL)} are for models with block attention; {policy.family.name} reads its whole "
            "canvas: leave them out, or lower rollout.denoising_steps to commit several tokens a step"
        )
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
    draws = keyed_draws(requests, sampler, seed).to(device)
    live = torch.arange(batch_size, device=device)

    for step, count in enumerate(unmask_counts(canvas, sampler.denoising_steps)):
        if count == 0:
            continue
        rows_ids = ids[live]
        is_masked = rows_ids == policy.mask_id
        is_masked[:, :longest] = False
        logits = policy.without_mask_token(policy.logits_at(rows_ids, pad_lengths[live], is_masked))
        forwards[live.cpu()] += 1
        row_of, position_of = is_masked[:, longest:].nonzero(as_tuple=True)
        uniform_of = draws[0, live[row_of], step, position_of]
        reading = read_out(logits, sampler, uniform_of, draws[1, live[row_of], step, position_of])
        scores = torch.full((len(live), canvas), float("-inf"), device=device)
        scores[row_of, position_of] = reading.confidence
        # A stable sort breaks ties by position, so the choice does not depend on the machine.
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        picked = is_chosen[row_of, position_of]
        new = reading.draw(picked, uniform_of, sampler)
        global_row, place = live[row_of[picked]], position_of[picked]
        ids[global_row, longest + place] = new
        commit_step[global_row, place] = step
        commit_logp[global_row, place] = reading.logp[picked].gather(-1, new[:, None])[:, 0]
        commit_entropy[global_row, place] = reading.entropy[picked]
        if watch is not None:
            watch(step, ids[:, longest:].cpu().numpy())
        live = live[~is_settled(ids[live, longest:], policy.mask_id, policy.end_ids)]
        if len(live) == 0:
            break

    return [
        make_rollout(
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


def keyed_draws(requests: list[Request], sampler: Sampler, seed: int, num_steps: int = 0) -> Float[Tensor, "2 B T C"]:
    """Uniform numbers: one for the token, one for the order, of each (row, step, position)."""
    shape = (2, num_steps or sampler.denoising_steps, sampler.canvas)
    if sampler.temperature == 0 and sampler.order != "origin":
        return torch.zeros((2, len(requests), 1, 1)).expand(-1, -1, shape[1], shape[2])
    stacked = np.stack([uniform(shape, seed, "denoise", r.uid) for r in requests], axis=1)
    return torch.from_numpy(stacked)


def _choose(logp: Float[Tensor, "N V"], draws: Float[Tensor, " N"], sampler: Sampler) -> Int[Tensor, " N"]:
    return logp.argmax(-1) if sampler.temperature == 0 else draw_tokens(logp, draws)


def make_rollout(
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
    """The record of a finished row. Arrays have one entry per canvas position."""
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
