"""What the coordinator needs of processes, and workers inside this process.

Nothing here waits for long: `spawn` and `call` return at once, `wait` has a timeout, `result` is asked of calls that
are done. A call runs at most once, whatever happens; trying again is the ledger's decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """How to make a worker: `make(*arguments)` there gives the object whose methods are called."""

    make: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    num_gpus: float = 0.0
    """Of Ray: reserved for each worker."""
    num_cpus: float = 1.0
    concurrency: int = 1
    """Calls that a worker runs at the same time."""

    @property
    def needs(self) -> dict[str, float]:
        """What Ray reserves for a worker, by the names it has for it."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})


class Transport(Protocol):
    """Processes and messages. `worker` and `call` are whatever the transport makes of them."""

    def spawn(self, spec: WorkerSpec, place: Any) -> Any:
        """Begin to start a worker, at a place if the transport knows places; what goes wrong is told by its calls."""
        ...

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Begin a call. Results and errors are told by `result`."""
        ...

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        """Those of the calls that are done; after `timeout` seconds, none."""
        ...

    def result(self, call: Any) -> Any:
        """What a call gave. Raises WorkerLost, or WorkFailed with what the method raised."""
        ...

    def kill(self, worker: Any) -> None:
        """End a worker, running, stopped or dead; its calls are lost."""
        ...

    def now(self) -> float:
        """Seconds of a clock that never goes back."""
        ...

    def close(self) -> None:
        """End everything that was started."""
        ...


class Carrier(Protocol):
    """How weights travel: makes a handle that a worker's `load` understands, and throws it away."""

    def send(self, state: Mapping[str, Any], version: int) -> Any:
        """Put the weights, name → tensor, where workers find them."""
        ...

    def drop(self, version: int) -> None:
        """Nobody asks for this version any more."""
        ...


@dataclass(slots=True, eq=False)
class _Done:
    value: Any = field(default=None)


class InlineTransport:
    """Workers that are objects of this process, and calls that are over when they return: no process, no fault.

    An error is nobody else's to handle: it goes straight to the caller.
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
        """Nothing to end."""

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        """Nothing is held."""
