"""Check that scoring and rollout agree: a few rollouts are replayed through scoring before a run trains.

A rollout and the scores that train on it are two computations of one policy. Training does not fail when they differ in
the mask token, the padding, the temperature or the logit shift; it optimises the wrong objective. The check restores
the canvas before each denoising step, scores the tokens that the step committed with `Policy.logp_at`, and compares
with the log-probabilities that the rollout recorded.

Shapes: B rollouts, S prompt + canvas, R replayed steps (of all rollouts), N committed tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from coupled.reward import Status, Verdict
from coupled.rl.errors import RolloutError
from coupled.rl.model.policy import Policy
from coupled.rl.objective.batch import collate, micro_batches
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.shapes import Bool, Float, Int
from coupled.rl.types import Group, Prompt, Rollout

NUM_ROLLOUTS = 4
NUM_STEPS = 8
"""Few rows: at most 8 forward passes of 4 rows to roll out, and 32 rows to score."""
TOLERANCE_NATS = {"cpu": 1e-5, "gpu": 1e-3, "bfloat16": 0.05}
"""Limit on the largest difference in float32, and on the mean one in bfloat16, where a logit of 16 is rounded to 1/16
and single tokens are noisy. A replay is batched unlike the rollout, so that a GPU sums in another order. Mistakes to
find make a tenth of a nat and more on average; in bfloat16 a temperature that is a few per cent off passes.
"""
TEMPERATURES = (0.05, 20.0)
"""Range in which the diagnosis searches for the temperature that was used."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """Denoising steps as scoring reads them, one row each.

    Example: a canvas [a, b] committed in the order b, a gives two rows, `masked` [1, 1] and [1, 0], `committed` [0, 1]
    and [1, 0].
    """

    uids: tuple[str, ...]
    """The rollout of each row."""
    steps: tuple[int, ...]
    """The denoising step of each row."""
    ids: Int[Tensor, "R S"]
    """Prompt and finished canvas."""
    pad_lengths: Int[Tensor, " R"]
    masked: Bool[Tensor, "R S"]
    """Positions that were MASK before the step."""
    committed: Bool[Tensor, "R S"]
    """Positions that the step commits."""
    recorded: Float[Tensor, " N"]
    """The rollout's log-probabilities of the committed tokens, in nats, row by row."""


def prompts_to_check(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts from the shortest to the longest, so that some rows are padded."""
    ordered = sorted(prompts, key=lambda p: len(p.token_ids))
    places = np.linspace(0, len(ordered) - 1, min(NUM_ROLLOUTS, len(ordered))).round().astype(int)
    return [ordered[i] for i in places.tolist()]


def sampler_for_parity(sampler: Sampler, block_length: int | None = None) -> Sampler:
    """The run's sampler, exact, in few steps and blocks, without the nucleus: scores are of the whole distribution."""
    canvas = sampler.canvas
    if block_length is not None:
        # A row is replayed once for each step of each block.
        canvas = min(canvas, max(1, NUM_STEPS // 2) * block_length)
    steps = min(sampler.denoising_steps, NUM_STEPS, canvas)
    return sampler.exact().changed(canvas=canvas, denoising_steps=steps, top_p=1.0, top_k=0)


def replay_of(policy: Policy, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Replay:
    """The states of all steps that committed something, padded as training batches are."""
    verdict = Verdict(score=0.0, parts={}, status=Status.OK)
    groups = [Group(prompt=p, rollouts=(r,), verdicts=(verdict,)) for p, r in zip(prompts, rollouts, strict=True)]
    batch = collate(groups, torch.zeros((len(groups), 1)), policy)
    made = {r.uid: r for r in rollouts}
    rows = [(row, made[uid], step) for row, uid in enumerate(batch.uids) for step in _steps(made[uid])]
    which = torch.tensor([row for row, _, _ in rows], device=policy.device)
    commit_step = torch.from_numpy(np.stack([r.commit_step for _, r, _ in rows])).to(policy.device)
    commit_logp = torch.from_numpy(np.stack([r.commit_logp for _, r, _ in rows])).to(policy.device)
    step = torch.tensor([step for _, _, step in rows], device=policy.device)[:, None]
    ids = batch.ids[which]
    masked, committed = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    # A position that no step committed (-1) was MASK to the end.
    masked[:, -batch.canvas_length :] = (commit_step < 0) | (commit_step >= step)
    committed[:, -batch.canvas_length :] = commit_step == step
    return Replay(
        uids=tuple(r.uid for _, r, _ in rows),
        steps=tuple(s for _, _, s in rows),
        ids=ids,
        pad_lengths=batch.pad_lengths[which],
        masked=masked,
        committed=committed,
        recorded=commit_logp[commit_step == step],
    )


@torch.no_grad()
def check_parity(
    policy: Policy, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], temperature: float, batch_size: int
) -> float:
    """The difference in nats between recorded and replayed log-probabilities, if it is within the tolerance.

    Args:
        prompts: one per rollout.
        rollouts: of the policy's present weights, sampled without a nucleus.
        temperature: the divisor of logits in scoring.
        batch_size: rows per forward pass.

    Raises:
        RolloutError: the difference exceeds the tolerance. The message names the setting that explains it.
    """
    replay = replay_of(policy, prompts, rollouts)
    is_exact = policy.compute_dtype == torch.float32
    tolerance = TOLERANCE_NATS[("cpu" if policy.device.type == "cpu" else "gpu") if is_exact else "bfloat16"]
    scored = torch.cat([_score(policy, replay, rows, temperature) for rows in _batches(replay, batch_size)])
    found = _distance(policy, scored, replay.recorded)
    if found <= tolerance:
        return found
    differences = (scored - replay.recorded).abs().nan_to_num(nan=math.inf)
    worst = int(differences.argmax())
    row, place = (int(i) for i in replay.committed.nonzero()[worst])
    position = place - (replay.ids.shape[1] - len(rollouts[0].canvas_ids))
    reason = _Diagnosis(policy, replay, scored, temperature, batch_size, tolerance).reason(rollouts)
    num_odd = int((differences > tolerance).sum())
    raise RolloutError(
        f"scoring must give a rollout's tokens the log-probabilities they were drawn with, within {tolerance:g} nats"
        f"{'' if is_exact else ' on average'}; of {len(scored)} tokens of {len(rollouts)} rollouts {num_odd} differ, "
        f"most by {float(differences[worst]):.3g}: {replay.uids[row]}, step {replay.steps[row]}, canvas position "
        f"{position}, drawn with {float(replay.recorded[worst]):.4g} and scored {float(scored[worst]):.4g}. {reason}"
    )


def _distance(policy: Policy, one: Float[Tensor, " N"], other: Float[Tensor, " N"]) -> float:
    differences = (one - other).abs().nan_to_num(nan=math.inf)
    return float(differences.max() if policy.compute_dtype == torch.float32 else differences.mean())


def _steps(rollout: Rollout) -> list[int]:
    return sorted({int(step) for step in rollout.commit_step if step >= 0})


def _batches(replay: Replay, size: int) -> Iterator[slice]:
    return micro_batches(len(replay.uids), size)


def _score(policy: Policy, replay: Replay, rows: slice, temperature: float, *, cut: int = 0) -> Float[Tensor, " N"]:
    """Scores by the code that scores training batches. `cut` leading positions, all padding, are left out."""
    ids = replay.ids[rows, cut:]
    masked = ids.masked_fill(replay.masked[rows, cut:], policy.mask_id)
    return policy.logp_at(masked, replay.pad_lengths[rows] - cut, replay.committed[rows, cut:], ids, temperature)


# --- the diagnosis: change one setting at a time, and compare ---------------------------------------------------------


class _Diagnosis:
    """Finds the one setting that explains the difference.

    The scores are computed once more in the plain way: logits, divided by the temperature, log-softmax. If they equal
    the recorded ones, scoring is at fault, and the diagnosis searches the setting that reproduces its scores. Otherwise
    the rollout is at fault, and the setting is searched that reproduces the recorded values.
    """

    def __init__(
        self,
        policy: Policy,
        replay: Replay,
        scored: Float[Tensor, " N"],
        temperature: float,
        batch_size: int,
        tolerance: float,
    ) -> None:
        self._policy = policy
        self._replay = replay
        self._temperature = temperature
        self._batch_size = batch_size
        self._tolerance = tolerance
        self._scoring_is_odd = self._agree(self._plain(policy, replay, temperature), replay.recorded)
        self._wanted = scored if self._scoring_is_odd else replay.recorded

    def reason(self, rollouts: Sequence[Rollout]) -> str:
        """The explanation of the difference, and the remedy."""
        tried = (self._mask_token(rollouts), self._padding(), self._found_temperature(), self._shift())
        return next(
            (f"The cause is {reason}" for reason in tried if reason is not None),
            "Neither the mask token, nor padding, nor the temperature, nor the shift explains it alone. The rollout "
            "engine may hold other weights than the trainer, or compute in another precision: try "
            "rollout.workers=inline, and model.compute_dtype=float32",
        )

    def _mask_token(self, rollouts: Sequence[Rollout]) -> str | None:
        policy = self._policy
        for mask_id in _other_mask_ids(policy, rollouts):
            other = policy.replaced(mask_id=mask_id)
            # The side that masks with another token forbids that token in its draws, or still forbids MASK.
            if any(
                self._agree(self._plain(forbidding, self._replay, self._temperature, mask_id), self._wanted)
                for forbidding in (other, policy)
            ):
                return (
                    f"the mask token: {self._sides(_name(policy, mask_id), _name(policy, policy.mask_id))}. Make "
                    "tokenizer.mask_token and mask_token_id in config.json of the checkpoint agree"
                )
        return None

    def _padding(self) -> str | None:
        policy, replay, temperature = self._policy, self._replay, self._temperature
        if not replay.pad_lengths.any():
            return None
        alone = torch.cat(
            [
                _score(policy, replay, slice(row, row + 1), temperature, cut=pad)
                for row, pad in enumerate(replay.pad_lengths.tolist())
            ]
        )
        if self._agree(alone, replay.recorded):
            return (
                "the padding: each row scored alone, without padding, has the log-probabilities it was drawn with. "
                "Padding must never be attended, and positions count from the first real token: fix the use of "
                "pad_lengths in scoring"
            )
        attended = replace(replay, pad_lengths=torch.zeros_like(replay.pad_lengths))
        if self._agree(self._plain(policy, attended, temperature), self._wanted):
            return (
                f"the padding: {self._sides('all positions', 'the real ones', 'attended to')}. Padding must never be "
                "attended, and positions count from the first real token: fix that side, or use rollout.workers=inline"
            )
        return None

    def _found_temperature(self) -> str | None:
        found = self._fitting_temperature()
        if not self._agree(self._plain(self._policy, self._replay, found), self._wanted):
            return None
        return (
            f"the temperature: {self._sides(f'{found:.4g}', f'{self._temperature:g}')}. Leave estimator.temperature "
            "unset, so that both read rollout.temperature; if it is, fix the division of the logits"
        )

    def _shift(self) -> str | None:
        family = self._policy.family
        for shift in {0, 1} - {family.shift}:
            other = self._policy.replaced(family=replace(family, shift=shift))
            if self._agree(self._plain(other, self._replay, self._temperature), self._wanted):
                return (
                    f"the logit shift: {self._sides(str(shift), str(family.shift))}. Set model.shift to the "
                    "shift that the checkpoint was trained with, for both sides"
                )
        return None

    def _sides(self, odd: str, stated: str, verb: str = "used") -> str:
        rollout, scoring = (stated, odd) if self._scoring_is_odd else (odd, stated)
        return f"the rollout {verb} {rollout}, scoring {scoring}"

    def _agree(self, one: Float[Tensor, " N"], other: Float[Tensor, " N"]) -> bool:
        return _distance(self._policy, one, other) <= self._tolerance

    def _plain(
        self, policy: Policy, replay: Replay, temperature: float, mask_id: int | None = None
    ) -> Float[Tensor, " N"]:
        filler = policy.mask_id if mask_id is None else mask_id
        parts = []
        for rows in _batches(replay, self._batch_size):
            ids, committed = replay.ids[rows], replay.committed[rows]
            masked = ids.masked_fill(replay.masked[rows], filler)
            logits = policy.without_mask_token(policy.logits_at(masked, replay.pad_lengths[rows], committed, ids))
            logp = torch.log_softmax(logits / temperature, dim=-1)
            parts.append(logp.gather(-1, ids[committed][:, None])[:, 0])
        return torch.cat(parts)

    def _fitting_temperature(self) -> float:
        """The temperature with the least squared differences from the wanted scores: a grid, then golden sections."""

        def misfit(log_temperature: float) -> float:
            plain = self._plain(self._policy, self._replay, math.exp(log_temperature))
            return float((plain - self._wanted).double().square().sum().nan_to_num(nan=math.inf))

        grid = np.linspace(math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]), 25).tolist()
        best = min(range(len(grid)), key=[misfit(t) for t in grid].__getitem__)
        low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
        golden = (math.sqrt(5) - 1) / 2
        for _ in range(40):
            left, right = high - golden * (high - low), low + golden * (high - low)
            low, high = (low, right) if misfit(left) < misfit(right) else (left, high)
        return math.exp((low + high) / 2)


def _other_mask_ids(policy: Policy, rollouts: Sequence[Rollout]) -> list[int]:
    """Candidates for MASK: the tokens that rollouts left where they committed nothing, and every special token."""
    left = {int(i) for r in rollouts for i in r.canvas_ids[r.commit_step < 0]}
    named = {policy.pad_id, getattr(policy.config, "mask_token_id", None), *policy.tokenizer.all_special_ids}
    known = {i for i in named if i is not None}
    return [*sorted(left - {policy.mask_id}), *sorted(known - left - {policy.mask_id})]


def _name(policy: Policy, token_id: int) -> str:
    return f"{policy.tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id})"
