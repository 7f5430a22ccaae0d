"""Runs a coordinator in real time: the waiting caller pumps it, or a thread when rollouts run ahead of training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from coupled.rl.cluster.coordinator import Coordinator
from coupled.rl.cluster.ledger import Entry
from coupled.rl.cluster.types import GroupKey, Unit

BEAT_SECONDS = 0.2
"""Longest interval between two checks of deadlines and new work."""
T = TypeVar("T")


class Runtime:
    """Owns the lock around a coordinator, which is not thread-safe."""

    def __init__(self, coordinator: Coordinator, *, is_ahead: bool = False) -> None:
        self._coordinator = coordinator
        self._changed = threading.Condition(threading.RLock())
        self._error: BaseException | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None
        if is_ahead:
            self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
            self._thread.start()

    def ask(self, question: Callable[[Coordinator], T]) -> T:
        """Call a function with the coordinator, under the lock, and return its result."""
        with self._changed:
            return question(self._coordinator)

    def wait_for(self, is_there: Callable[[Coordinator], bool], timeout: float = float("inf")) -> bool:
        """Pump until a condition holds; False when it does not within `timeout` seconds.

        Raises:
            ClusterError: too few workers are left, or none makes progress.
        """
        transport = self._coordinator.transport
        until = transport.now() + timeout
        while True:
            with self._changed:
                if is_there(self._coordinator):
                    return True
                if self._error is not None:
                    raise self._error
                if self._is_closed:
                    raise RuntimeError("closed workers return no results: wait before close()")
                if transport.now() >= until:
                    return False
                if self._thread is not None:
                    self._changed.wait(BEAT_SECONDS)
                    continue
            self._pump()

    def finish(self, units: Iterable[Unit]) -> list[Entry]:
        """Compute units outside of training, at once; returns their entries in order, also of quarantined ones."""
        units = list(units)
        keys = [unit.key for unit in units]
        self.ask(lambda coordinator: coordinator.submit(units))
        try:
            return self.collect(keys)
        except BaseException:
            # The caller does not collect these units later, so the ones in progress are dropped.
            self.ask(
                lambda coordinator: coordinator.ledger.forget([k for k in keys if k in coordinator.ledger.entries])
            )
            raise

    def collect(self, keys: list[GroupKey]) -> list[Entry]:
        """Wait for units, and remove them from the ledger."""
        self.wait_for(lambda coordinator: coordinator.ledger.is_done(keys))
        return self.ask(lambda coordinator: coordinator.take(keys))

    def close(self) -> None:
        """End the workers. Harmless when repeated."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=10 * BEAT_SECONDS)
        with self._changed:
            self._coordinator.close()

    def _pump(self) -> None:
        coordinator = self._coordinator
        with self._changed:
            calls: list[Any] = list(coordinator.calls)
            timeout = min(BEAT_SECONDS, coordinator.next_deadline() - coordinator.transport.now())
        done = coordinator.transport.wait(calls, max(0.0, timeout))
        with self._changed:
            if self._is_closed:
                return
            coordinator.handle(done)
            coordinator.tick()
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._pump()
            except BaseException as error:  # raised in the waiting thread, which can end the run
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
