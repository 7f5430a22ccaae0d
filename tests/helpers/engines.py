"""A cluster engine whose workers are objects of this process: the coordinator without processes or faults."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.model.policy import Policy
from coupled.rl.rollout.workers import ClusterEngine, FileCarrier, RolloutWorker


@dataclass(slots=True, eq=False)
class _Done:
    value: Any


class InlineTransport:
    """Workers that are objects of this process, and calls that are over when they return: no process, no fault.

    An error of a call goes straight to the caller.
    """

    def spawn(self, spec: WorkerSpec, place: Any) -> Any:
        return spec.make(*spec.arguments)

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        return _Done(getattr(worker, method)(*arguments))

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        return calls

    def result(self, call: Any) -> Any:
        return call.value

    def kill(self, worker: Any) -> None:
        """Does nothing."""

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        """Does nothing."""


def cluster_engine(policy: Policy, folder: Path, *, lag: int = 0, batch_size: int = 4) -> ClusterEngine:
    """A cluster engine of one worker with a copy of the policy. No thread pumps it, whatever its lag."""

    def make() -> RolloutWorker:
        worker = RolloutWorker.__new__(RolloutWorker)
        worker._policy, worker._version = deepcopy(policy), -1
        return worker

    spec = WorkerSpec(make=make)
    engine = ClusterEngine(InlineTransport(), spec, FileCarrier(folder / "weights"), batch_size=batch_size)
    engine._coordinator.admission.lag = engine._full_lag = lag
    engine._keeps_states = lag > 0
    return engine
