"""Workers in processes: killed, stopped and failing, under the coordinator that the simulator tests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.stand_ins import StandIn

from coupled.rl.cluster.coordinator import Coordinator
from coupled.rl.cluster.ledger import Entry
from coupled.rl.cluster.pool import PoolSpec
from coupled.rl.cluster.processes import LocalTransport
from coupled.rl.cluster.runtime import Runtime
from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import GroupKey, Health, State, Unit

HEALTH = Health(least_seconds=1.0, first_seconds=1.5, start_seconds=60.0)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    transport = LocalTransport(tmp_path / "workers.log")
    pool = PoolSpec(stage="roll", spec=WorkerSpec(make=StandIn), places=[None, None], method="work")
    runtime = Runtime(Coordinator(transport, [pool], health=HEALTH))
    yield runtime
    runtime.close()


def units(*works: object, stream: str = "now") -> list[Unit]:
    return [Unit(key=GroupKey(stream=stream, step=1, slot=slot), work=work) for slot, work in enumerate(works)]


def payloads(entries: list[Entry]) -> list[object]:
    return [entry.payload for entry in entries]


def pids(runtime: Runtime) -> list[int]:
    workers = runtime.ask(lambda c: c.pools["roll"].workers)
    assert runtime.wait_for(lambda c: all(w.hello is not None for w in workers), 60.0)
    return [worker.hello for worker in workers]


def test_units_are_done_in_two_processes_and_come_back_in_order(runtime: Runtime) -> None:
    ours = pids(runtime)
    assert len({*ours, os.getpid()}) == 3
    entries = runtime.finish(units(*[("sleep", 0.05, n) for n in range(8)]))
    assert payloads(entries) == list(range(8))
    assert runtime.ask(lambda c: c.ledger.entries) == {}


def test_a_killed_and_a_stopped_process_cost_time_and_nothing_else(runtime: Runtime) -> None:
    first, second = pids(runtime)
    wanted = units(*[("sleep", 0.4, n) for n in range(6)])
    runtime.ask(lambda c: c.submit(wanted))
    os.kill(first, signal.SIGKILL)
    os.kill(second, signal.SIGSTOP)
    entries = runtime.collect([unit.key for unit in wanted])
    assert payloads(entries) == list(range(6))
    counters = runtime.ask(lambda c: c.take_counters())
    assert counters.num_redispatched >= 1
    assert runtime.wait_for(lambda c: c.ledger.counters.num_lost_workers + counters.num_lost_workers == 2, 30.0)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{second}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{second}"), "a stopped process is ended, not left behind"


def test_work_that_ends_three_processes_is_quarantined_and_the_rest_is_done(runtime: Runtime) -> None:
    poison, good = runtime.finish(units(("die",), ("sleep", 0.0, "good")))
    assert poison.state is State.QUARANTINED
    assert "it ended 3 workers" in poison.reason
    assert good.payload == "good"


def test_an_error_of_the_work_is_tried_twice_and_then_raised_as_it_was(runtime: Runtime) -> None:
    with pytest.raises(ZeroDivisionError, match="of my own"):
        runtime.finish(units(("raise", "of my own"), ("sleep", 0.0, 1)))
    assert runtime.ask(lambda c: c.ledger.counters.num_redispatched) == 1
    assert payloads(runtime.finish(units(("sleep", 0.0, 2), stream="later"))) == [2], "the workers go on"


def test_what_cannot_be_sent_is_told_whichever_way_it_goes(runtime: Runtime) -> None:
    with pytest.raises(RuntimeError, match="cannot be sent"):
        runtime.finish(units(("unpicklable",)))
    with pytest.raises(TypeError, match="cannot pickle"):
        runtime.finish(units(("sleep", 0.0, threading.Lock()), stream="there"))


def test_a_message_larger_than_a_pipe_to_a_stopped_process_blocks_nobody(runtime: Runtime) -> None:
    first, _ = pids(runtime)
    os.kill(first, signal.SIGSTOP)
    big = b"x" * 1_000_000
    started = time.monotonic()
    assert payloads(runtime.finish(units(("size", big), ("size", big)))) == [len(big)] * 2
    assert time.monotonic() - started < 20
