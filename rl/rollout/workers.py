"""The rollout engine on workers outside of the run's process: batches of requests as units of processes or Ray actors.

Batches and random numbers do not depend on the worker, so that rollouts are bit-identical to rollouts in one process.
Weights belong to the driver, which puts them into the object store as NumPy arrays that Ray reads without copying, or
into a file. A worker returns the digest of the weights it loaded, and gets no work unless these are the weights that
were sent.
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
from coupled.rl.cluster.transport import Carrier, Transport, WorkerSpec
from coupled.rl.cluster.types import (
    NO_EVENTS,
    PATIENT,
    TRAINING,
    ClusterError,
    Counters,
    EventSink,
    GroupKey,
    Health,
    State,
    Unit,
)
from coupled.rl.errors import CoupledError, RolloutError
from coupled.rl.model.open import open_policy, use_threads
from coupled.rl.model.weights import digest_of, load_trainable_state, trainable_state
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import EngineSnapshot, HasWeights, request_batches, roll_out
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """The argument of one call of a rollout worker."""

    requests: list[Request]
    sampler: Sampler
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SentTensor:
    """A tensor as bytes: NumPy has no bfloat16."""

    data: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> SentTensor:
        """From a tensor on the CPU, without a copy if it is contiguous."""
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
    """The object inside a worker: a policy of its own."""

    def __init__(self, recipe: Recipe) -> None:
        use_threads(recipe)
        self._policy = open_policy(recipe.model, recipe.seed)
        self._version = -1

    def hello(self) -> dict[str, Any]:
        """Host, process and device, once the model is loaded."""
        return {"host": socket.gethostname(), "pid": os.getpid(), "device": str(self._policy.device)}

    def load(self, version: int, handle: dict[str, SentTensor] | str) -> str:
        """Load the trainer's weights, arrays or a file; returns the digest of the policy's weights afterwards."""
        load_trainable_state(self._policy, received(handle))
        self._version = version
        return digest_of(trainable_state(self._policy))

    def generate(self, batch: Batch) -> list[Rollout]:
        """Denoise one batch."""
        return roll_out(self._policy, batch.requests, batch.sampler, seed=batch.seed, weight_version=self._version)


class FileCarrier:
    """Weights in files that every worker can read; a worker checks their digest when it has loaded them."""

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
        """Does nothing: the store drops an object when no handle refers to it."""


class ClusterEngine:
    """Rolls out batches on a pool of workers, up to `lag` training steps ahead of the trainer.

    Args:
        batch_size: requests per call of a worker; None: all of them.
        lag: training steps that rollouts may run ahead.
        on_close: called once the workers have ended.
        room: describes required and available resources, for the error of too few workers.
    """

    def __init__(
        self,
        transport: Transport,
        spec: WorkerSpec,
        carrier: Carrier,
        *,
        num_workers: int = 1,
        min_workers: int = 1,
        batch_size: int | None,
        lag: int = 0,
        health: Health = PATIENT,
        emit: EventSink = NO_EVENTS,
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
        self._full_lag = lag
        self._under_way: dict[int, int] = {}
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
            transport, [pool], admission=InOrder(lag), health=health, on_rolled=self._rolled, emit=emit
        )
        self._runtime = Runtime(self._coordinator, is_ahead=lag > 0)
        self._health = health
        self._min_workers = min_workers

    # --- any engine ----------------------------------------------------------------------------------------------

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        """One rollout per request under the newest weights, in the order of the requests.

        Raises:
            RolloutError: a batch ended every worker that received it.
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
        """Roll out with the policy's present weights from now on; earlier versions are kept while they are needed."""
        self._version = version
        state = policy.trainable_state()
        if self._keeps_states:  # copied, because `old` may be scored under them later and the policy's tensors change
            self._states[version] = {name: tensor.clone() for name, tensor in state.items()}
        self._publish(version, self._carrier.send(state, version), digest_of(state))

    def close(self) -> None:
        """End the workers, then release their resources (`on_close`)."""
        self._runtime.close()
        self._on_close()

    # --- training ------------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Wait for the least number of workers.

        Raises:
            CoupledError: a worker raises it when it starts, or too few start in time.
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
        """Begin the steps after `num_trained`; steps of a restored snapshot keep their weights. See `StepEngine`."""
        self._on_rolled = on_rolled
        self._make = lambda step: self._batches(requests_of(step), sampler(), seed)
        self._last = num_steps
        self._runtime.ask(lambda c: c.begin(num_trained, self._under_way, self._units_of, num_steps))

    def rollouts(self, step: int) -> dict[str, Rollout]:
        """The rollouts of a training step by uid, without quarantined batches.

        Raises:
            RolloutError: all batches of the step are quarantined.
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
        """The weights of a version that a step under way or in training needs."""
        return self._states[version]

    def snapshot(self) -> EngineSnapshot:
        """The steps under way and their weights, for a checkpoint."""
        versions: dict[int, int] = self._runtime.ask(lambda c: c.snapshot())["versions"]
        states = {version: self._states[version] for version in versions.values() if version != self._version}
        return EngineSnapshot(versions=versions, states=states, has_fallen_back=self.lag < self._full_lag)

    def restore(self, snapshot: EngineSnapshot) -> None:
        """Continue the steps under way of a checkpoint. Call before `load_weights` and `begin`."""
        if snapshot.has_fallen_back:
            self.fall_back()
        self._under_way = dict(snapshot.versions)
        for version, state in snapshot.states.items():
            self._keeps_states = True  # the interrupted steps are scored under them
            self._states[version] = state
            self._publish(version, self._carrier.send(state, version), digest_of(state))

    def fall_back(self) -> None:
        """Roll out on-policy (lag 0) from the next step that begins."""
        self._runtime.ask(lambda c: c.admission.fall_back())

    def oldest(self) -> str:
        """The oldest unfinished batch and its worker."""
        return self._runtime.ask(lambda c: c.oldest())

    def take_counters(self) -> Counters:
        """Events since the last call."""
        return self._runtime.ask(lambda c: c.take_counters())

    @property
    def num_trained(self) -> int:
        """Training steps behind the present weights."""
        return self._coordinator.num_trained

    @property
    def lag(self) -> int:
        """Training steps that rollouts may run ahead."""
        return self._coordinator.admission.lag

    def _publish(self, version: int, handle: Any, digest: str) -> None:
        weights = Weights(version=version, handle=handle, digest=digest)
        kept = self._runtime.ask(lambda c: c.publish(weights))
        self._sent.append(version)
        for old in [v for v in self._sent if v not in kept]:
            self._sent.remove(old)
            self._states.pop(old, None)
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
        batches = request_batches(requests, self._batch_size)
        return [Batch(requests=batch, sampler=sampler, seed=seed) for batch in batches]


def _made(entries: Sequence[Entry], *, is_all_needed: bool = True) -> dict[str, Rollout]:
    lost = [entry for entry in entries if entry.state is State.QUARANTINED]
    if lost and (is_all_needed or len(lost) == len(entries)):
        requests = [request for entry in lost for request in entry.unit.work.requests]
        raise RolloutError(
            f"{len(requests)} completions (first {requests[0].uid}) could not be made: {lost[0].reason}. Check the "
            "memory of the workers' hosts; lower rollout.batch_size"
        )
    return {rollout.uid: rollout for entry in entries if entry not in lost for rollout in entry.payload}
