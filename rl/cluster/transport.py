"""The protocols through which the coordinator reaches processes and moves weights.

No method waits for long: `spawn` and `call` return at once, `wait` has a timeout, `result` is for calls that are done.
A call runs at most once, whatever happens; the ledger decides to try again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """How to make a worker: `make(*arguments)` there gives the object whose methods are called."""

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
        """Begin to start a worker, at a place if the transport knows places; its calls report failures."""
        ...

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Begin a call; `result` gives its result or error."""
        ...

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        """The calls that are done; none after `timeout` seconds."""
        ...

    def result(self, call: Any) -> Any:
        """The value that a call returned. Raises WorkerLost, or WorkFailed with the error of the method."""
        ...

    def kill(self, worker: Any) -> None:
        """End a worker, running, stopped or dead; its calls are lost."""
        ...

    def now(self) -> float:
        """Seconds of a clock that never goes back."""
        ...

    def close(self) -> None:
        """End every worker that was started."""
        ...


class Carrier(Protocol):
    """How weights travel: makes a handle that a worker's `load` understands, and releases it."""

    def send(self, state: Mapping[str, Any], version: int) -> Any:
        """Put the weights, name → tensor, where workers find them."""
        ...

    def drop(self, version: int) -> None:
        """Release a version that no unit needs any more."""
        ...
