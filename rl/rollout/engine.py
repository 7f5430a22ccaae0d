"""Rollout engines: the protocols of sampling and of training, and the engine of a run in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from coupled.rl.cluster.types import NO_EVENTS, Counters, EventSink, GroupKey
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import denoise
from coupled.rl.rollout.denoise_blocks import denoise_blocks
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import Rollout


@runtime_checkable
class HasWeights(Protocol):
    """Holder of the weights that rollouts are made with: a learner, or the trainer of several ranks."""

    def trainable_state(self) -> dict[str, Tensor]:
        """Name → tensor of everything that training changes, on the CPU."""
        ...


@runtime_checkable
class Denoise(Protocol):
    """Denoises requests under the present weights: `learner.generate`, on one rank or several."""

    def __call__(
        self, requests: list[Request], sampler: Sampler, *, seed: int, weight_version: int
    ) -> list[Rollout]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineSnapshot:
    """The rollouts under way, as a checkpoint keeps them; empty where none run ahead of training.

    Example: after step 3 with lag 1, `versions` is {4: 2, 5: 3} and `states` holds version 2.
    """

    versions: Mapping[int, int] = field(default_factory=dict)
    """Step under way → training steps behind the weights that roll it out."""
    states: Mapping[int, dict[str, Tensor]] = field(default_factory=dict)
    """Version → weights, for the versions of `versions` other than the newest."""
    has_fallen_back: bool = False
    """Whether rollouts stopped running ahead, see `StepEngine.fall_back`."""


class RolloutEngine(Protocol):
    """Makes rollouts under the weights that were loaded last."""

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        """One rollout per request, in the order of the requests."""
        ...

    def load_weights(self, policy: HasWeights, version: int) -> None:
        """Roll out with the policy's present weights from now on. `version`: the training steps behind them."""
        ...

    def close(self) -> None:
        """Release the engine's resources. Harmless when repeated."""
        ...


@runtime_checkable
class StepEngine(RolloutEngine, Protocol):
    """Makes the rollouts of training steps, in order, possibly ahead of training."""

    @property
    def lag(self) -> int:
        """Training steps that rollouts may run ahead; 0 is on-policy."""
        ...

    def begin(
        self,
        requests_of: Callable[[int], list[Request]],
        sampler: Callable[[], Sampler],
        *,
        seed: int,
        num_trained: int,
        num_steps: int,
        on_rolled: Callable[[list[Rollout]], None] = lambda made: None,
    ) -> None:
        """Prepare steps `num_trained` + 1 … `num_steps`.

        `sampler` is called for every step that begins, because a run may fall back to exact rollouts. `on_rolled`
        gets the rollouts of each training batch once, as soon as they are made; it must return at once.
        """
        ...

    def rollouts(self, step: int) -> dict[str, Rollout]:
        """The rollouts of a training step by uid. Completions that could not be made are missing."""
        ...

    def trained(self, step: int) -> None:
        """Step `step` is trained and its weights are loaded: later steps may begin."""
        ...

    def state_of(self, version: int) -> dict[str, Tensor]:
        """The weights of an earlier version that rolled out the step in training."""
        ...

    def fall_back(self) -> None:
        """Roll out on-policy (lag 0) from the next step that begins."""
        ...

    def snapshot(self) -> EngineSnapshot:
        """The rollouts under way, for a checkpoint."""
        ...

    def restore(self, snapshot: EngineSnapshot) -> None:
        """Continue the rollouts of a checkpoint. Call before `load_weights` and `begin`."""
        ...

    def oldest(self) -> str:
        """The oldest unfinished batch and its worker, in a line; empty if no worker is outside this process."""
        ...

    def take_counters(self) -> Counters | None:
        """Events since the last call; None where no worker is outside this process."""
        ...


class InlineEngine:
    """Rolls out in this process, or on the trainer's ranks, with the present weights. A step is rolled out on request,
    never ahead of training.

    Args:
        denoise: makes the rollouts of a call.
        batch_size: requests of a call; None gives one call all requests, which several ranks cut and share out.
    """

    lag = 0

    def __init__(self, denoise: Denoise, batch_size: int | None, emit: EventSink = NO_EVENTS) -> None:
        self._denoise = denoise
        self._batch_size = batch_size
        self._emit = emit
        self._version = 0

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        batches = request_batches(requests, self._batch_size)
        made = {r.uid: r for batch in batches for r in self._roll_out(batch, sampler, seed)}
        return [made[r.uid] for r in requests]

    def load_weights(self, policy: HasWeights, version: int) -> None:
        self._version = version

    def close(self) -> None:
        """Does nothing: the engine holds no resources."""

    def begin(
        self,
        requests_of: Callable[[int], list[Request]],
        sampler: Callable[[], Sampler],
        *,
        seed: int,
        num_trained: int,
        num_steps: int,
        on_rolled: Callable[[list[Rollout]], None] = lambda made: None,
    ) -> None:
        self._requests_of, self._sampler, self._seed, self._on_rolled = requests_of, sampler, seed, on_rolled

    def rollouts(self, step: int) -> dict[str, Rollout]:
        batches = request_batches(self._requests_of(step), self._batch_size)
        self._emit("issue", step=step, version=self._version, units=len(batches))
        made: dict[str, Rollout] = {}
        for slot, batch in enumerate(batches):
            rollouts = self._roll_out(batch, self._sampler(), self._seed)
            self._emit("rolled", key=GroupKey(step=step, slot=slot))
            self._on_rolled(rollouts)
            made.update((r.uid, r) for r in rollouts)
        return made

    def trained(self, step: int) -> None:
        """Does nothing: the next step begins when its rollouts are requested."""

    def state_of(self, version: int) -> dict[str, Tensor]:
        raise LookupError(f"version {version} is not kept: rollouts of this process have the present weights")

    def fall_back(self) -> None:
        """Does nothing: rollouts are always on-policy."""

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot()

    def restore(self, snapshot: EngineSnapshot) -> None:
        """Does nothing: steps under way are rolled out anew, with the present weights."""

    def oldest(self) -> str:
        return ""

    def take_counters(self) -> None:
        return None

    def _roll_out(self, batch: list[Request], sampler: Sampler, seed: int) -> list[Rollout]:
        return self._denoise(batch, sampler, seed=seed, weight_version=self._version)


def policy_engine(policy: Policy, batch_size: int) -> InlineEngine:
    """The engine of a policy alone, for evaluation and sampling."""
    return InlineEngine(partial(roll_out, policy), batch_size)


def roll_out(
    policy: Policy,
    requests: list[Request],
    sampler: Sampler,
    *,
    seed: int,
    weight_version: int = 0,
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> list[Rollout]:
    """Denoise one batch as the policy's family requires: the whole canvas at once, or block after block.

    `on_step` receives the number of every step and the canvases [B, C] after it.
    """
    decode = denoise if policy.family.block_length is None else denoise_blocks
    return decode(policy, requests, sampler, seed=seed, weight_version=weight_version, on_step=on_step)


FEWEST_ROWS = 8
"""A batch with fewer rows is continued with longer prompts, and its shorter prompts are padded."""


def request_batches(requests: list[Request], batch_size: int | None) -> list[list[Request]]:
    """`request_chunks`; without a `batch_size` all requests are one batch."""
    return [requests] if batch_size is None else request_chunks(requests, batch_size)


def request_chunks(requests: list[Request], batch_size: int) -> list[list[Request]]:
    """Requests ordered by prompt length and cut into batches, of one length and without padding where possible.

    A batch ends when it is full, and when the length changes after `FEWEST_ROWS` rows. All engines cut alike, so the
    matrix shapes, and with them the rounding, do not depend on the process that computes a batch. A batch of the result
    is not cut again.
    """
    chunks: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: len(r.prompt_ids)):
        last = chunks[-1] if chunks else []
        is_longer = bool(last) and len(request.prompt_ids) > len(last[-1].prompt_ids)
        if not last or len(last) == batch_size or (len(last) >= FEWEST_ROWS and is_longer):
            chunks.append([])
        chunks[-1].append(request)
    return chunks
