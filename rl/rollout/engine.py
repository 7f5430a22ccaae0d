"""Rollout engines: who denoises. This process, or workers of a run (`cluster/rollouts`), with equal results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import denoise
from coupled.rl.rollout.denoise_blocks import denoise_blocks
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import Rollout


@runtime_checkable
class HasWeights(Protocol):
    """What holds the weights that rollouts are made with: a policy, or the trainer of several ranks."""

    def trainable_state(self) -> dict[str, Tensor]:
        """Name → tensor of everything that training changes, on the CPU."""
        ...


class RolloutEngine(Protocol):
    """Makes rollouts under the weights it was last given."""

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        """One rollout per request, in the order of the requests."""
        ...

    def load_weights(self, policy: HasWeights, version: int) -> None:
        """Roll out with the policy's present weights from now on."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...


class InlineEngine:
    """Denoises in this process, on the trainer's live weights."""

    def __init__(self, policy: Policy, batch_size: int) -> None:
        self._policy = policy
        self._batch_size = batch_size
        self._version = 0

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        made: dict[str, Rollout] = {}
        for chunk in request_chunks(requests, self._batch_size):
            rollouts = roll_out(self._policy, chunk, sampler, seed=seed, weight_version=self._version)
            made.update((r.uid, r) for r in rollouts)
        return [made[r.uid] for r in requests]

    def load_weights(self, policy: HasWeights, version: int) -> None:
        self._version = version

    def close(self) -> None:
        """Nothing is held."""


def roll_out(
    policy: Policy,
    requests: list[Request],
    sampler: Sampler,
    *,
    seed: int,
    weight_version: int = 0,
    watch: Callable[[int, np.ndarray], None] | None = None,
) -> list[Rollout]:
    """Denoise one batch in the way of the policy's family: the whole canvas at once, or block after block.

    `watch` is shown every step with the canvases [B, C] after it.
    """
    decode = denoise if policy.family.block_length is None else denoise_blocks
    return decode(policy, requests, sampler, seed=seed, weight_version=weight_version, watch=watch)


FEWEST_ROWS = 8
"""A batch of fewer rows goes on with longer prompts, and pads the shorter ones."""


def request_chunks(requests: list[Request], batch_size: int) -> list[list[Request]]:
    """Requests ordered by prompt length and cut into batches, where it is possible of equal length: without padding.

    A batch ends when it is full, and when the length changes after `FEWEST_ROWS` rows. All engines cut alike, so the
    matrix shapes, and with them the rounding, do not depend on who computes a batch.
    """
    chunks: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: len(r.prompt_ids)):
        last = chunks[-1] if chunks else []
        is_longer = bool(last) and len(request.prompt_ids) > len(last[-1].prompt_ids)
        if not last or len(last) == batch_size or (len(last) >= FEWEST_ROWS and is_longer):
            chunks.append([])
        chunks[-1].append(request)
    return chunks
