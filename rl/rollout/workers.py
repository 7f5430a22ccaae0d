"""The rollout engine of a run: batches of requests as units, made by this process, by processes or by Ray actors.

All cut alike and key their random numbers alike, so that what comes out is the same bit for bit. Weights belong to the
driver, which puts them into the object store as NumPy arrays that Ray reads without copying, or into a file; a worker
says what it loaded, and gets no work before that is what was sent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coupled.rl.cluster.admission import InOrder
from coupled.rl.cluster.coordinator import Coordinator, Weights
from coupled.rl.cluster.ledger import Entry
from coupled.rl.cluster.pool import PoolSpec
from coupled.rl.cluster.runtime import Runtime
from coupled.rl.cluster.transport import Carrier, InlineTransport, Transport, WorkerSpec
from coupled.rl.cluster.types import PATIENT, TRAINING, ClusterError, Counters, GroupKey, Health, State, Unit
from coupled.rl.errors import CoupledError, RolloutError
from coupled.rl.model.open import open_policy, use_threads
from coupled.rl.model.policy import Policy, digest_of
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import HasWeights, request_chunks, roll_out
from coupled.rl.rollout.sampler import Request
from coupled.rl.trainer.rank_group import RankGroup
from coupled.rl.types import Rollout

EventSink = Callable[..., None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What one call of a rollout worker makes."""

    requests: list[Request]
    sampler: Sampler
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SentTensor:
    """A tensor as bytes, which NumPy knows whatever the type: it has no bfloat16."""

    data: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> SentTensor:
        """Of a tensor on the CPU, without a copy if it is contiguous."""
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return cls(data=data, dtype=tensor.dtype, shape=tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """A copy, for arrays of the object store are read-only."""
        return torch.from_numpy(self.data.copy()).view(self.dtype).reshape(self.shape)


def received(handle: dict[str, SentTensor] | str) -> dict[str, Tensor]:
    """The weights behind a handle of either carrier."""
    if isinstance(handle, str):
        return load_file(handle)
    return {name: sent.tensor() for name, sent in handle.items()}


class RolloutWorker:
    """What runs in a worker: a policy of its own."""

    def __init__(self, recipe: Recipe) -> None:
        use_threads(recipe)
        self._policy = open_policy(recipe.model, recipe.seed)
        self._version = -1

    def hello(self) -> dict[str, Any]:
        """Say who this is, once the model is loaded."""
        return {"host": socket.gethostname(), "pid": os.getpid(), "device": str(self._policy.device)}

    def load(self, version: int, handle: dict[str, SentTensor] | str) -> str:
        """Take the trainer's weights, arrays or a file; returns the digest of what is now in the policy."""
        self._policy.load_trainable_state(received(handle))
        self._version = version
        return digest_of(self._policy.trainable_state())

    def generate(self, batch: Batch) -> list[Rollout]:
        """Denoise one batch."""
        return roll_out(self._policy, batch.requests, batch.sampler, seed=batch.seed, weight_version=self._version)


class LiveWorker(RolloutWorker):
    """The trainer's own policy, with the weights it has at this moment."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._version = -1

    def load(self, version: int, handle: Any) -> str:
        """There is nothing to load."""
        self._version = version
        return LIVE


class LiveRankGroup:
    """The trainer's ranks, with the weights they have at this moment."""

    def __init__(self, rank_group: RankGroup) -> None:
        self._rank_group = rank_group
        self._version = -1

    def hello(self) -> dict[str, Any]:
        """Say who this is."""
        return {"host": socket.gethostname(), "pid": os.getpid(), "device": str(self._rank_group.policy.device)}

    def load(self, version: int, handle: Any) -> str:
        """There is nothing to load."""
        self._version = version
        return LIVE

    def generate(self, batch: Batch) -> list[Rollout]:
        """Denoise all that was asked for, each rank its share."""
        return self._rank_group.generate(batch.requests, batch.sampler, seed=batch.seed, weight_version=self._version)


LIVE = "live"


class FileCarrier:
    """Weights in files that every worker can read; checked by their digest when they are loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def send(self, state: Mapping[str, Tensor], version: int) -> str:
        path = self._path(version)
        partial = path.with_name(f".partial-{path.name}")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
        partial.rename(path)
        return str(path.resolve())

    def drop(self, version: int) -> None:
        self._path(version).unlink(missing_ok=True)

    def _path(self, version: int) -> Path:
        return self._folder / f"version_{version:06d}.safetensors"


class ObjectCarrier:
    """Weights in Ray's object store, put there by the driver: they outlive any actor and any other host."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def send(self, state: Mapping[str, Tensor], version: int) -> Any:
        return self._ray.put({name: SentTensor.of(tensor) for name, tensor in state.items()})

    def drop(self, version: int) -> None:
        """The store drops what no handle names."""


class ClusterEngine:
    """Rolls out batches on a pool of workers, up to `lag` training steps ahead of the trainer.

    Args:
        batch_size: requests that a worker gets at a time; none gives it all of them.
        room: what there is for workers and what they need, should too few of them start.
    """

    def __init__(
        self,
        transport: Transport,
        spec: WorkerSpec,
        carrier: Carrier | None,
        *,
        num_workers: int = 1,
        min_workers: int = 1,
        batch_size: int | None,
        lag: int = 0,
        health: Health = PATIENT,
        tell: EventSink = lambda event, **facts: None,
        on_close: Callable[[], None] = lambda: None,
        room: Callable[[], str] = lambda: "",
    ) -> None:
        self._room = room
        self._carrier = carrier
        self._batch_size = batch_size
        self._on_close = on_close
        self._version = 0
        self._num_calls = 0
        self._states: dict[int, dict[str, Tensor]] = {}
        self._keeps_states = lag > 0
        self._sent: list[int] = []
        self._make: Callable[[int], list[Batch]] = lambda step: []
        self._on_rolled: Callable[[list[Rollout]], None] = lambda made: None
        self._last = 0
        pool = PoolSpec(
            stage="roll",
            spec=spec,
            places=[None] * num_workers,
            method="generate",
            min_workers=min_workers,
            has_weights=True,
        )
        self._coordinator = Coordinator(
            transport, [pool], admission=InOrder(lag), health=health, on_rolled=self._rolled, tell=tell
        )
        self._runtime = Runtime(self._coordinator, is_ahead=lag > 0)
        self._health = health
        self._min_workers = min_workers

    # --- any engine ----------------------------------------------------------------------------------------------

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        """One rollout per request under the newest weights, in the order of the requests.

        Raises:
            RolloutError: a batch ended every worker that it was given to.
            ClusterError: too few workers are left, or nothing moves.
        """
        self._num_calls += 1
        units = [
            self._unit(GroupKey(stream="now", step=self._num_calls, slot=slot), self._version, batch)
            for slot, batch in enumerate(self._batches(requests, sampler, seed))
        ]
        made = _made(self._runtime.finish(units))
        return [made[r.uid] for r in requests]

    def load_weights(self, policy: HasWeights, version: int) -> None:
        """Roll out with the policy's present weights from now on; earlier versions stay where they are needed."""
        self._version = version
        if self._carrier is None:
            self._publish(version, None, LIVE)
            return
        state = policy.trainable_state()
        if self._keeps_states:  # `old` may be scored under them later: a copy, for the policy's tensors go on changing
            self._states[version] = {name: tensor.clone() for name, tensor in state.items()}
        self._publish(version, self._carrier.send(state, version), digest_of(state))

    def close(self) -> None:
        """End the workers, and what they ran on when nobody else uses it."""
        self._runtime.close()
        self._on_close()

    # --- training ------------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Wait for the least number of workers.

        Raises:
            CoupledError: what the workers raise when they start, or that they do not start in time.
        """
        pool = self._coordinator.pools["roll"]

        def is_over(coordinator: Coordinator) -> bool:
            num_possible = sum(worker.error is None for worker in pool.workers)
            return pool.num_ready >= self._min_workers or num_possible < self._min_workers

        self._runtime.wait_for(is_over, self._health.start_seconds)
        if pool.num_ready >= self._min_workers:
            return
        error = next((w.error for w in pool.workers if w.error is not None), None)
        if isinstance(error, CoupledError):
            raise error
        raise ClusterError(
            f"cluster.min_workers is {self._min_workers}, and {pool.num_ready} of {len(pool.workers)} rollout workers "
            f"started within {self._health.start_seconds:.0f} s: {self._coordinator.oldest()}{self._room()}"
        ) from error

    def load_state(self, state: dict[str, Tensor], version: int) -> None:
        """As `load_weights`, for weights of a checkpoint."""
        assert self._carrier is not None, "live weights have one version"
        self._keeps_states = True  # a step that was under way when the run was interrupted needs them
        self._states[version] = state
        self._publish(version, self._carrier.send(state, version), digest_of(state))

    def begin(
        self,
        requests_of: Callable[[int], list[Request]],
        sampler: Callable[[], Sampler],
        *,
        seed: int,
        num_trained: int,
        num_steps: int,
        versions: dict[int, int] | None = None,
        on_rolled: Callable[[list[Rollout]], None] = lambda made: None,
    ) -> None:
        """Go on after `num_trained` steps. `versions`, from a checkpoint: step under way → its weights.

        `sampler` is asked anew for every step that begins, for a run may fall back to exact rollouts. `on_rolled` gets
        the rollouts of each training batch once, as soon as they are there; it must return at once.
        """
        self._on_rolled = on_rolled
        self._make = lambda step: self._batches(requests_of(step), sampler(), seed)
        self._last = num_steps
        self._runtime.ask(lambda c: c.begin(num_trained, versions or {}, self._units_of, num_steps))

    def rollouts(self, step: int) -> dict[str, Rollout]:
        """The rollouts of a training step by uid; those of quarantined batches are not among them.

        Raises:
            RolloutError: not one is left.
        """
        self._runtime.ask(lambda c: c.issue(self._units_of, self._last))
        entries = self._runtime.collect(self._runtime.ask(lambda c: c.ledger.keys_of(step)))
        return _made(entries, is_all_needed=False)

    def trained(self, step: int) -> None:
        """Step `step` is trained and its weights are loaded: later steps may begin."""
        self._runtime.ask(lambda c: c.trained(step))
        self._runtime.ask(lambda c: c.issue(self._units_of, self._last))
        self._runtime.ask(lambda c: c.dispatch())

    def state_of(self, version: int) -> dict[str, Tensor]:
        """The weights of a version that is still needed."""
        return self._states[version]

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint keeps of the coordinator."""
        return self._runtime.ask(lambda c: c.snapshot())

    def fall_back(self) -> None:
        """No more rollouts ahead of training, from the next step that is begun."""
        self._runtime.ask(lambda c: c.admission.fall_back())

    def oldest(self) -> str:
        """What is waited for, and who has it."""
        return self._runtime.ask(lambda c: c.oldest())

    def take_counters(self) -> Counters:
        """What happened since the last time."""
        return self._runtime.ask(lambda c: c.take_counters())

    @property
    def num_trained(self) -> int:
        """Training steps behind the present weights."""
        return self._coordinator.num_trained

    @property
    def lag(self) -> int:
        """Steps that rollouts may be ahead."""
        return self._coordinator.admission.lag

    def _publish(self, version: int, handle: Any, digest: str) -> None:
        weights = Weights(version=version, handle=handle, digest=digest)
        kept = self._runtime.ask(lambda c: c.publish(weights))
        self._sent.append(version)
        for old in [v for v in self._sent if v not in kept]:
            self._sent.remove(old)
            self._states.pop(old, None)
            if self._carrier is not None:
                self._carrier.drop(old)

    def _rolled(self, unit: Unit, made: list[Rollout]) -> None:
        if unit.key.stream == TRAINING:
            self._on_rolled(made)

    def _units_of(self, step: int, version: int) -> Sequence[Unit]:
        return [
            self._unit(GroupKey(step=step, slot=slot), version, batch) for slot, batch in enumerate(self._make(step))
        ]

    def _unit(self, key: GroupKey, version: int, batch: Batch) -> Unit:
        return Unit(key=key, version=version, work=batch)

    def _batches(self, requests: list[Request], sampler: Sampler, seed: int) -> list[Batch]:
        size = self._batch_size
        chunks = [requests] if size is None else request_chunks(requests, size)
        return [Batch(requests=chunk, sampler=sampler, seed=seed) for chunk in chunks]


def inline_engine(policy: Policy, batch_size: int, tell: EventSink = lambda event, **facts: None) -> ClusterEngine:
    """Rollouts in this process, on the trainer's live weights."""
    spec = WorkerSpec(make=LiveWorker, arguments=(policy,))
    return ClusterEngine(InlineTransport(), spec, None, batch_size=batch_size, tell=tell)


def rank_group_engine(rank_group: RankGroup, tell: EventSink = lambda event, **facts: None) -> ClusterEngine:
    """Rollouts by the trainer's ranks: one call for all requests, which the ranks cut and share out themselves."""
    spec = WorkerSpec(make=LiveRankGroup, arguments=(rank_group,))
    return ClusterEngine(InlineTransport(), spec, None, batch_size=None, tell=tell)


def _made(entries: Sequence[Entry], *, is_all_needed: bool = True) -> dict[str, Rollout]:
    lost = [entry for entry in entries if entry.state is State.QUARANTINED]
    if lost and (is_all_needed or len(lost) == len(entries)):
        requests = [request for entry in lost for request in entry.unit.work.requests]
        raise RolloutError(
            f"{len(requests)} completions (first {requests[0].uid}) could not be made: {lost[0].reason}. Look at the "
            "memory the workers have; lower rollout.batch_size"
        )
    return {rollout.uid: rollout for entry in entries if entry not in lost for rollout in entry.payload}
