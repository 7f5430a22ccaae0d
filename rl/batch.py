"""From judged groups to one batch of tensors, and from a batch to micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from coupled.rl.errors import RolloutError
from coupled.rl.policy import Policy
from coupled.rl.shapes import Float
from coupled.rl.types import Group, TrainBatch


def rewards_of(groups: Sequence[Group]) -> Float[Tensor, "P G"]:
    """Scores as a table; NaN where the judge had no verdict."""
    rows = [[float("nan") if v.score is None else v.score for v in g.verdicts] for g in groups]
    return torch.tensor(rows, dtype=torch.float32)


def collate(groups: Sequence[Group], advantages: Float[Tensor, "P G"], policy: Policy) -> TrainBatch:
    """One row per rollout, prompts padded on the left, groups ordered by prompt length.

    The order lets micro-batches hold prompts of like length, which saves padding; sums do not depend on it.
    """
    order = sorted(range(len(groups)), key=lambda i: len(groups[i].prompt.token_ids))
    rollouts = [r for i in order for r in groups[i].rollouts]
    longest = max(len(r.prompt_ids) for r in rollouts)
    canvas = len(rollouts[0].canvas_ids)
    ids = torch.full((len(rollouts), longest + canvas), policy.pad_id)
    valid = torch.zeros((len(rollouts), canvas), dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        ids[row, longest - len(rollout.prompt_ids) : longest] = torch.tensor(rollout.prompt_ids)
        ids[row, longest:] = torch.from_numpy(rollout.canvas_ids)
        valid[row, : rollout.completion_length] = True
    is_scored = torch.tensor([v.score is not None for i in order for v in groups[i].verdicts])
    device = policy.device
    return TrainBatch(
        uids=tuple(r.uid for r in rollouts),
        ids=ids.to(device),
        pad_lengths=torch.tensor([longest - len(r.prompt_ids) for r in rollouts], device=device),
        valid=(valid & is_scored[:, None]).to(device),
        advantages=advantages[order].flatten().to(device),
        is_scored=is_scored.to(device),
    )


def micro_batches(num_rows: int, size: int) -> Iterator[slice]:
    """Row slices of at most `size`. Example: 5 rows by 2 → 0:2, 2:4, 4:5."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def refuse_identical_groups(groups: Sequence[Group]) -> None:
    """A sampler at temperature > 0 whose every group holds one and the same completion is broken, not unlucky.

    Raises:
        RolloutError: all completions of each of two or more groups are identical.
    """
    if len(groups) > 1 and all(len({tuple(r.canvas_ids.tolist()) for r in g.rollouts}) == 1 for g in groups):
        raise RolloutError(
            f"all {len(groups)} groups hold identical completions although rollout.temperature is above 0, so every "
            "advantage is 0: the sampler ignores its random numbers, or the policy has collapsed. Raise "
            "rollout.temperature, or lower optimizer.learning_rate and resume from an earlier checkpoint"
        )
