"""What to denoise and how: requests, the sampler's settings, and the plan of steps that follows from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch

from coupled.rl.recipe.schema import Recipe

PARALLEL = ("confidence_threshold", "entropy_bound")
"""Settings by which a step commits more than the schedule says."""


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
    """Approximate: a step also commits every token that is at least so sure; none: by the schedule alone."""
    entropy_bound: float | None = None
    """Bounded: a step also commits the surest tokens as long as the entropies of all but the last add up to at most
    this, in nats [EB-Sampler]; none: by the schedule alone."""
    end_fill: float | None = None
    """Bounded: behind an end token, positions whose likeliest token is an end token of at least this probability get it
    at once; none: they wait for their turn."""
    block_length: int = 0
    """Of full attention: so many canvas positions are denoised before any later one [LLaDA]; 0: the whole canvas."""
    cache: Literal["none", "prefix", "dual"] = "none"
    """Approximate, of full attention: keys and values from before the block (prefix), or from outside of it (dual), are
    kept from the last refresh instead of being computed anew [Fast-dLLM]."""
    refresh_steps: int = 0
    """With a cache: steps after which it is computed anew; 0: at the start of each block alone."""
    has_early_exit: bool = True
    """A row is done when everything before its first end token is; False: when its whole canvas is."""

    @property
    def hash(self) -> str:
        """Names the sampler in logs: equal samplers have equal hashes."""
        known = {f.name: f.default for f in fields(self) if f.name not in ("top_p", "order")}
        settings = {k: v for k, v in asdict(self).items() if k not in known or v != known[k]}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def is_parallel(self) -> bool:
        """Whether a step may commit more positions than the schedule says."""
        return any(getattr(self, name) is not None for name in PARALLEL)

    @property
    def is_exact(self) -> bool:
        """Whether rollouts have the distribution of the plain loop with these steps, order, temperature and nucleus."""
        return not self.is_parallel and self.end_fill is None and self.cache == "none"

    def exact(self) -> Sampler:
        """The same sampler without its bounded and approximate parts."""
        return replace(
            self, confidence_threshold=None, entropy_bound=None, end_fill=None, cache="none", refresh_steps=0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to make. `uid` names its random stream."""

    uid: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the plan. Example: step 5, the second of the second block of 4, commits 1 of the positions 4 … 7."""

    number: int
    """Of the random numbers, and what `Rollout.commit_step` holds."""
    block: slice
    """Canvas positions that may be committed."""
    count: int
    """How many of them are, in every row."""
    is_refresh: bool
    """With a cache: everything is computed anew."""


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


def steps_per_block(sampler: Sampler, block_length: int) -> int:
    """`denoising_steps` are those of the whole canvas, shared out: 256 positions in 128 steps, blocks of 4 → 2."""
    return max(1, min(block_length, -(-sampler.denoising_steps * block_length // sampler.canvas)))


def plan_steps(sampler: Sampler) -> list[Step]:
    """The steps that commit anything, in order.

    The whole canvas at once follows Dream's schedule, and blocks follow LLaDA's: the positions of a block are shared
    evenly over its steps, the first ones getting one more. What commits nothing is left out, but keeps its number.
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


def sampler_of(recipe: Recipe) -> Sampler:
    """The rollout sampler of a recipe."""
    rollout = recipe.rollout
    return Sampler(
        canvas=rollout.canvas,
        denoising_steps=rollout.denoising_steps,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        order=rollout.order,
        top_k=rollout.top_k,
        confidence_threshold=rollout.confidence_threshold,
        entropy_bound=rollout.entropy_bound,
        end_fill=rollout.end_fill,
        block_length=rollout.block_length,
        cache=rollout.cache,
        refresh_steps=rollout.refresh_steps,
        has_early_exit=rollout.has_early_exit,
    )
