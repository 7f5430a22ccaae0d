"""Order and confidence in which a diffusion model decodes: pure functions of rollouts.

Source: method page §7 [DiffuCoder §4, App. A.2]. `order` is p_1..p_T: the positions of a completion in the order in
which they were unmasked. Tokens of one step are ordered from left to right. Positions after the first end token
are not part of a completion and count neither as written nor as still masked.

Shapes: T tokens of a completion, C canvas positions, N denoising steps, R rollouts (see `shapes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from coupled.rl.model.policy import Policy
from coupled.rl.types import Rollout


def unmasking_order(commit_step: Sequence[int] | np.ndarray) -> list[int]:
    """p_1..p_T from the step at which each position was unmasked. Example: steps [0, 2, 1, 1] give [0, 2, 3, 1]."""
    steps = np.asarray(commit_step)
    if (steps < 0).any():
        raise ValueError(f"an order needs every position unmasked; got commit steps {steps.tolist()}")
    return [int(place) for place in np.argsort(steps, kind="stable")]


def local_arness(order: Sequence[int], k: int, denominator: Literal["T", "T-k"] = "T") -> float:
    """Local AR-ness@k: the share of t with {p_{t-1}..p_{t-k}} = {p_t - 1..p_t - k}.

    The first k tokens have no k predecessors. They count as misses with denominator T, and are left out with T - k.
    Left to right gives (T - k) / T, or 1.
    """
    num = len(order)
    hits = sum(set(order[t - k : t]) == set(range(order[t] - k, order[t])) for t in range(k, num))
    total = num if denominator == "T" else num - k
    return hits / total if total > 0 else float("nan")


def global_arness(order: Sequence[int], k: int) -> float:
    """Global AR-ness@k: the share of t with p_t among the k leftmost positions that are still masked. Left to right
    gives 1 for every k."""
    masked, hits = sorted(order), 0
    for place in order:
        hits += place in masked[:k]
        masked.remove(place)
    return hits / len(order) if order else float("nan")


def order_of(rollout: Rollout) -> list[int]:
    """Unmasking order of a rollout's completion."""
    return unmasking_order(rollout.commit_step[: rollout.completion_length])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Heatmap:
    """Mean per (step, position) and the number of rollouts in it; NaN where there is none."""

    values: np.ndarray
    """float64 [N, C]"""
    counts: np.ndarray
    """int64 [N, C]"""


def commit_map(rollouts: Sequence[Rollout], num_steps: int) -> Heatmap:
    """Order of commit: per position, among the completions that reach it, the share that unmasks it at each step.

    Columns sum to 1 where any completion has the position.
    """
    canvas = len(rollouts[0].canvas_ids)
    counts = np.zeros((num_steps, canvas), dtype=np.int64)
    for rollout in rollouts:
        length = rollout.completion_length
        np.add.at(counts, (rollout.commit_step[:length], np.arange(length)), 1)
    total = np.broadcast_to(counts.sum(0), counts.shape)
    with np.errstate(invalid="ignore"):
        return Heatmap(values=np.where(total > 0, counts / total, np.nan), counts=total)


def canvas_before(rollout: Rollout, step: int, mask_id: int) -> np.ndarray:
    """The canvas [C] that the sampler received at a step: tokens committed earlier, and MASK."""
    is_masked = (rollout.commit_step < 0) | (rollout.commit_step >= step)
    return np.where(is_masked, mask_id, rollout.canvas_ids)


@torch.no_grad()
def confidence_map(policy: Policy, rollouts: Sequence[Rollout], num_steps: int, batch_size: int = 32) -> Heatmap:
    """Mean probability of the likeliest token at every position that is masked before each step, untempered.

    The first row is the entropy sink: at the first step confidence falls with the distance from the prompt, and rises
    where completions usually end. A rollout counts until its last commit; each of its states is recomputed.
    """
    canvas = len(rollouts[0].canvas_ids)
    sums, counts = np.zeros((num_steps, canvas)), np.zeros((num_steps, canvas), dtype=np.int64)
    for chunk in _chunks(sorted(rollouts, key=lambda r: len(r.prompt_ids)), batch_size):
        for step in range(num_steps):
            live = [r for r in chunk if step <= r.commit_step.max()]
            if not live:
                break
            confidence, is_masked = _confidence(policy, live, step)
            sums[step] += np.where(is_masked, confidence, 0).sum(0)
            counts[step] += is_masked.sum(0)
    with np.errstate(invalid="ignore"):
        return Heatmap(values=np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), counts=counts)


def _confidence(policy: Policy, rollouts: Sequence[Rollout], step: int) -> tuple[np.ndarray, np.ndarray]:
    """Greatest probability [R, C], and True at masked positions [R, C]."""
    longest = max(len(r.prompt_ids) for r in rollouts)
    rows, pads = [], []
    for rollout in rollouts:
        pad = longest - len(rollout.prompt_ids)
        shown = canvas_before(rollout, step, policy.mask_id).tolist()
        rows.append([policy.pad_id] * pad + list(rollout.prompt_ids) + shown)
        pads.append(pad)
    ids = torch.tensor(rows, device=policy.device)
    is_masked = ids == policy.mask_id
    is_masked[:, :longest] = False
    logits = policy.without_mask_token(policy.logits_at(ids, torch.tensor(pads, device=policy.device), is_masked))
    found = np.zeros(tuple(is_masked.shape))
    found[is_masked.cpu().numpy()] = logits.softmax(-1).amax(-1).cpu().numpy()
    return found[:, longest:], is_masked[:, longest:].cpu().numpy()


def _chunks(rollouts: Sequence[Rollout], size: int) -> Iterator[Sequence[Rollout]]:
    for start in range(0, len(rollouts), size):
        yield rollouts[start : start + size]
