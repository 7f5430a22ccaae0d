"""Requests, and the plan of steps that follows from a sampler's settings (`rl/recipe/rollout.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coupled.rl.recipe.rollout import Sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A requested completion. `uid` names its random stream."""

    uid: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the plan. Example: step 5, the second of the second block of 4, commits 1 of the positions 4 … 7."""

    number: int
    """The step's place in the random numbers, and in `Rollout.commit_step`."""
    block: slice
    """Canvas positions that may be committed."""
    count: int
    """Number of positions that are committed in every row."""
    is_refresh: bool
    """With a cache: the step computes all keys and values anew."""


def unmask_counts(canvas: int, num_steps: int) -> list[int]:
    """Number of positions that each step commits: the schedule of Dream's reference sampler.

    With `t = linspace(1, 1e-3, steps + 1)`, step i commits `⌊m · (1 - t_{i+1} / t_i)⌋` of the m masked positions, and
    the last step commits the rest. 256 in 256 steps gives [0, 1, …, 1, 2]; 256 in 128 gives [1, 2, …, 2, 3].
    """
    times = torch.linspace(1, 1e-3, num_steps + 1)
    left, counts = canvas, []
    for step in range(num_steps):
        is_last = step == num_steps - 1
        count = left if is_last else int(left * (1 - times[step + 1] / times[step]))
        counts.append(count)
        left -= count
    return counts


def steps_per_block(sampler: Sampler, block_length: int) -> int:
    """A block's share of the canvas's `denoising_steps`. Example: 256 positions in 128 steps, blocks of 4 → 2."""
    return max(1, min(block_length, -(-sampler.denoising_steps * block_length // sampler.canvas)))


def plan_steps(sampler: Sampler) -> list[Step]:
    """The steps that commit anything, in order.

    The whole canvas at once follows Dream's schedule, and blocks follow LLaDA's: the positions of a block are shared
    evenly over its steps, with one more in the first steps. Steps that commit nothing are left out; numbers have gaps.
    """
    canvas, size = sampler.canvas, sampler.block_length or sampler.canvas
    plan: list[Step] = []
    number = 0
    for start in range(0, canvas, size):
        block = slice(start, min(start + size, canvas))
        width = block.stop - block.start
        if sampler.block_length:
            num_steps = min(width, steps_per_block(sampler, size))
            counts = [width // num_steps + (step < width % num_steps) for step in range(num_steps)]
        else:
            counts = unmask_counts(canvas, sampler.denoising_steps)
        done = 0
        for step, count in enumerate(counts):
            if count:
                is_refresh = done % (sampler.refresh_steps or len(counts)) == 0
                plan.append(Step(number=number + step, block=block, count=count, is_refresh=is_refresh))
                done += 1
        number += len(counts)
    return plan
