"""What a worker says after its work was made elsewhere: it costs nothing, least of all the worker."""

from __future__ import annotations

import random
from typing import Any

from coupled.rl.cluster.coordinator import Coordinator, Weights
from coupled.rl.cluster.pool import PoolSpec, WorkerState
from coupled.rl.cluster.simulate import Faults, SimTransport
from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import GroupKey, Health, Unit

SLOW_LOAD = 15.0
"""Past the deadline of ten seconds, before the worker is given up at twenty."""


class Roller:
    """Loads and rolls out whatever it is told."""

    def hello(self) -> dict[str, Any]:
        return {}

    def load(self, version: int, handle: str) -> str:
        return handle

    def generate(self, work: str) -> str:
        return work


def pump(coordinator: Coordinator, until: float) -> None:
    """Move the clock to a time."""
    transport = coordinator.transport
    while transport.now() < until:
        coordinator.handle(transport.wait(list(coordinator.calls), min(0.5, until - transport.now())))
        coordinator.tick()


def publish(coordinator: Coordinator, version: int) -> None:
    coordinator.publish(Weights(version=version, handle=f"digest {version}", digest=f"digest {version}"))


def unit(step: int, version: int) -> Unit:
    return Unit(key=GroupKey(stream="now", step=step, slot=0), version=version, work="work")


def test_a_worker_that_loads_weights_which_nobody_wants_any_more_is_kept_and_loads_the_next() -> None:
    loads = iter([SLOW_LOAD])

    def seconds(method: str, arguments: tuple[Any, ...], rng: random.Random) -> float:
        return next(loads, 1.0) if method == "load" else 1.0

    told: list[tuple[str, Any]] = []
    pool = PoolSpec(
        stage="roll", spec=WorkerSpec(make=Roller), places=[None, None], method="generate", has_weights=True
    )
    coordinator = Coordinator(
        SimTransport(0, Faults(), seconds),
        [pool],
        health=Health(least_seconds=10.0, first_seconds=10.0),
        emit=lambda event, **facts: told.append((event, facts.get("worker"))),
    )
    slow, quick = coordinator.pools["roll"].workers
    publish(coordinator, 0)
    pump(coordinator, 2.0)
    first = unit(1, 0)
    coordinator.submit([first])
    pump(coordinator, 14.0)
    assert ("hedged", None) in told
    assert [entry.payload for entry in coordinator.take([first.key])] == ["work"]
    assert slow.state is WorkerState.SUSPECT
    coordinator.begin(1, {}, lambda step, version: [], 1)
    publish(coordinator, 1)
    pump(coordinator, 19.0)
    assert slow.state is WorkerState.READY
    assert slow.version == -1, "what it holds was never compared with what was sent"
    both = [unit(2, 1), unit(3, 1)]
    coordinator.submit(both)
    pump(coordinator, 25.0)
    assert all(entry.payload == "work" for entry in coordinator.take([each.key for each in both]))
    assert (slow.holder, quick.holder) == ("roll-0#1", "roll-1#1"), "nobody was lost"
    assert slow.version == quick.version == 1
