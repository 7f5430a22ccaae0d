"""Workers in Ray actors. Ray places them, moves objects and reports which are alive; the ledger decides about retries.

`max_restarts` and `max_task_retries` are 0: otherwise Ray would silently run a call twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from coupled.rl.cluster.processes import Target
from coupled.rl.cluster.ray import alive_nodes, scheduling_of
from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import WorkerLost, WorkFailed

GET_SECONDS = 60.0
"""Timeout for the transfer of a finished call's result."""


class RayTransport:
    """Actors of a Ray instance. `ray` is the module that `open_ray` returns; the caller closes it.

    A place is the id of a node, or a reserved `Bundle`. A worker whose node is gone starts on a node without other
    workers, such as the new node of a host that has rejoined, or else where Ray chooses.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._nodes: dict[Any, str] = {}

    def spawn(self, spec: WorkerSpec, place: Any) -> Any:
        options: dict[str, Any] = {
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": spec.concurrency,
        }
        place = self._free_node(place) if isinstance(place, str) else place
        if place is not None:
            options["scheduling_strategy"] = scheduling_of(place)
        worker = self._ray.remote(**options)(Target).remote(spec.make, spec.arguments)
        if isinstance(place, str):
            self._nodes[worker] = place
        return worker

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        return worker.call.remote(method, *arguments)

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        if not calls:
            time.sleep(max(0.0, timeout))
            return []
        calls = list(calls)
        done, _ = self._ray.wait(calls, num_returns=1, timeout=max(0.0, timeout))
        if done and len(calls) > 1:
            all_done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
            done = all_done or done
        return list(done)

    def result(self, call: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(call, timeout=GET_SECONDS)
        except errors.RayTaskError as error:
            raise WorkFailed(error.cause) from error
        except errors.RayError as error:
            raise WorkerLost(f"{type(error).__name__}: {error}") from error

    def kill(self, worker: Any) -> None:
        self._nodes.pop(worker, None)
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(worker)

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        """The Ray instance belongs to the caller and stays open."""

    def _free_node(self, wanted: str) -> str | None:
        alive = alive_nodes(self._ray)
        if wanted in alive:
            return wanted
        return next((node for node in alive if node not in self._nodes.values()), None)
