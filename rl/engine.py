"""Rollout engines: who denoises. This process, or workers of a run (`cluster/rollouts`), with equal results."""

from __future__ import annotations

from typing import Protocol

from coupled.rl.denoise import Request, Sampler, denoise
from coupled.rl.policy import Policy
from coupled.rl.types import Rollout


class RolloutEngine(Protocol):
    """Makes rollouts under the weights it was last given."""

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        """One rollout per request, in the order of the requests."""
        ...

    def load_weights(self, policy: Policy, version: int) -> None:
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
            rollouts = denoise(self._policy, chunk, sampler, seed=seed, weight_version=self._version)
            made.update((r.uid, r) for r in rollouts)
        return [made[r.uid] for r in requests]

    def load_weights(self, policy: Policy, version: int) -> None:
        self._version = version

    def close(self) -> None:
        """Nothing is held."""


def request_chunks(requests: list[Request], batch_size: int) -> list[list[Request]]:
    """Requests ordered by prompt length and cut into batches.

    All engines cut alike, so the matrix shapes, and with them the rounding, do not depend on who computes a batch.
    """
    ordered = sorted(requests, key=lambda r: len(r.prompt_ids))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
