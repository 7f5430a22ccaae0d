"""The protocols through which the coordinator reaches processes and moves weights.

No method blocks: `spawn` and `call` return at once, `wait` has a timeout, `result` is for calls that are done.
A call runs at most once, whatever happens; the ledger decides about retries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """How a worker is made: `make(*arguments)`, run in its process, returns the object whose methods are called."""

    make: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    num_gpus: float = 0.0
    """GPUs that Ray reserves for each worker."""
    num_cpus: float = 1.0
    concurrency: int = 1
    """Calls that a worker runs at the same time."""

    @property
    def needs(self) -> dict[str, float]:
        """Resources that Ray reserves for a worker, by Ray's names."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})


class Transport(Protocol):
    """Processes and messages. `worker` and `call` are opaque handles of the transport."""

    def spawn(self, spec: WorkerSpec, place: Any) -> Any:
        """Begin to start a worker, at a place if the transport has places; its calls report a failed start."""
        ...

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Begin a call; `result` returns its value or raises its error."""
        ...

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        """Return the finished calls; none after `timeout` seconds."""
        ...

    def result(self, call: Any) -> Any:
        """Return the value of a finished call. Raises WorkerLost, or WorkFailed with the error of the method."""
        ...

    def kill(self, worker: Any) -> None:
        """End a worker, running, stopped or dead; its calls are lost."""
        ...

    def now(self) -> float:
        """Seconds on a monotonic clock."""
        ...

    def close(self) -> None:
        """End every worker that was started."""
        ...


class Carrier(Protocol):
    """Moves weights: makes a handle that a worker's `load` accepts, and releases it."""

    def send(self, state: Mapping[str, Any], version: int) -> Any:
        """Store the weights, name → tensor, where workers can load them, and return the handle."""
        ...

    def drop(self, version: int) -> None:
        """Release a version that no unit needs any more."""
        ...
