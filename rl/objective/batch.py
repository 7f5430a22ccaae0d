"""Judged groups as one batch of tensors, and the micro-batches of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from coupled.rl.errors import RolloutError
from coupled.rl.model.policy import Policy
from coupled.rl.shapes import Float
from coupled.rl.types import Group, TrainBatch

MAX_SURPRISE_NATS = 20.0


def rewards_of(groups: Sequence[Group]) -> Float[Tensor, "P G"]:
    """Scores as a table; NaN where the judge had no verdict."""
    rows = [[float("nan") if v.score is None else v.score for v in g.verdicts] for g in groups]
    return torch.tensor(rows, dtype=torch.float32)


def passes_of(groups: Sequence[Group]) -> Float[Tensor, "P G"]:
    """1 where a completion passes all hidden tests, 0 where it fails one; NaN where no test was judged."""
    rows = [[float("nan") if v.total == 0 else float(v.passed == v.total) for v in g.verdicts] for g in groups]
    return torch.tensor(rows, dtype=torch.float32)


def collate(groups: Sequence[Group], advantages: Float[Tensor, "P G"], policy: Policy) -> TrainBatch:
    """One row per rollout, prompts padded on the left, groups ordered by prompt length.

    The order puts prompts of similar length into the same micro-batch, which saves padding; sums do not depend on it.
    """
    order = sorted(range(len(groups)), key=lambda i: len(groups[i].prompt.token_ids))
    rollouts = [r for i in order for r in groups[i].rollouts]
    longest = max(len(r.prompt_ids) for r in rollouts)
    canvas = len(rollouts[0].canvas_ids)
    ids = torch.full((len(rollouts), longest + canvas), policy.pad_id)
    commit_step = torch.full((len(rollouts), canvas), -1)
    valid = torch.zeros((len(rollouts), canvas), dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        ids[row, longest - len(rollout.prompt_ids) : longest] = torch.tensor(rollout.prompt_ids)
        ids[row, longest:] = torch.tensor(rollout.canvas_ids)  # copied: arrays from Ray are read-only
        commit_step[row] = torch.tensor(rollout.commit_step)
        valid[row, : rollout.completion_length] = True
    if (block_length := policy.family.block_length) is not None:
        # Scoring reads all blocks at once, each after finished earlier blocks, so it needs the step within the block.
        commit_step = torch.where(commit_step >= 0, commit_step % block_length, -1)
    is_scored = torch.tensor([v.score is not None for i in order for v in groups[i].verdicts])
    device = policy.device
    return TrainBatch(
        uids=tuple(r.uid for r in rollouts),
        ids=ids.to(device),
        pad_lengths=torch.tensor([longest - len(r.prompt_ids) for r in rollouts], device=device),
        valid=(valid & is_scored[:, None]).to(device),
        advantages=advantages[order].flatten().to(device),
        is_scored=is_scored.to(device),
        commit_step=commit_step.to(device),
    )


def micro_batches(num_rows: int, size: int) -> Iterator[slice]:
    """Row slices of at most `size`. Example: 5 rows by 2 → 0:2, 2:4, 4:5."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def refuse_identical_groups(groups: Sequence[Group]) -> None:
    """Refuse groups of identical completions that had low probabilities: the sampler ignores its random numbers.

    A sharp policy may repeat itself. That every group repeats one completion of probability p has a probability of
    about Π p^(G-1) over the groups; below e^-20 it is not chance.

    Raises:
        RolloutError: every group holds one completion G times, at odds below e^-20.
    """
    if any(len({tuple(r.canvas_ids.tolist()) for r in g.rollouts}) > 1 for g in groups):
        return
    surprise = -sum((len(g.rollouts) - 1) * float(g.rollouts[0].commit_logp.sum()) for g in groups)
    if surprise > MAX_SURPRISE_NATS:
        raise RolloutError(
            f"each of {len(groups)} groups holds one completion {len(groups[0].rollouts)} times over, although the "
            f"odds against that are e^{surprise:.0f} at this temperature, so every advantage is 0. The rollout engine "
            "ignores its random numbers: use an engine that samples (rollout.workers=inline does)"
        )
