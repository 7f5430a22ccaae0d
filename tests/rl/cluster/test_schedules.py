"""Ten thousand random schedules of faults, and that each safeguard of the coordinator is needed for them to pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import schedules
from helpers.schedules import check_all

from coupled.rl.cluster import coordinator, ledger, pool, simulate
from coupled.rl.cluster.admission import InOrder
from coupled.rl.cluster.coordinator import Coordinator
from coupled.rl.cluster.ledger import Attempt, Ledger
from coupled.rl.cluster.simulate import SimTransport
from coupled.rl.cluster.types import Health

TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("num_schedules", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_random_schedules_lose_nothing_repeat_nothing_and_end(num_schedules: int) -> None:
    """Kill, hang, slow, lost and repeated answers, absent hosts, poison, crashes of the driver: seeds name them.

    In a process of its own, because checking every type of every call would take ten times as long.
    """
    program = [sys.executable, "-m", "helpers.schedules", str(num_schedules)]
    done = subprocess.run(program, cwd=TESTS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{num_schedules} schedules")


def test_types_hold_in_random_schedules() -> None:
    check_all(range(200))


def always_first(self: Ledger, attempt: Attempt) -> bool:
    self.end(attempt)
    attempt.job.is_done = True
    return True


def cursor_for_mark(self: Coordinator) -> dict[str, Any]:
    return {"num_trained": self._next_step - 1, "lag": self.admission.lag, "versions": {}}


def keep_the_newest(self: Coordinator, weights: coordinator.Weights) -> list[int]:
    self._weights = {weights.version: weights}
    return [weights.version]


def retry_by_itself(self: SimTransport, call: simulate._Call) -> None:
    if not call.worker.is_dead and not call.worker.is_hung:
        self.executions.append((call, call.method))
    ANSWER(self, call)


def only_hedge(self: Coordinator, call: coordinator._Call, now: float) -> None:
    call.deadline = now + 10.0
    if call.attempt is not None:
        self.ledger.hedge(call.attempt.job)


def forget_the_attempts(self: Ledger, attempt: Attempt, failure: object, error: BaseException) -> None:
    """A worker is lost, and what it had is not put back."""


def wait_for_ever(self: pool.WorkerPool, job: object) -> float:
    return float("inf")


ANSWER = SimTransport._answer
FOREVER = Health(
    least_seconds=5.0, first_seconds=20.0, start_seconds=float("inf"), stall_seconds=5000.0, restarts_per_hour=10**6
)
MUTATIONS: dict[str, tuple[object, str, object]] = {
    "the weights of any step are good enough": (InOrder, "version_for", lambda self, step: max(0, step - 2 - self.lag)),
    "a step begins before its weights are there": (InOrder, "allow", lambda self, num_trained, step: True),
    "a late duplicate counts": (Ledger, "_is_first", always_first),
    "a sample that could not be scored gets 0": (Ledger, "masked", staticmethod(lambda reason: 0.0)),
    "the checkpoint keeps the cursor, not the low-water mark": (Coordinator, "snapshot", cursor_for_mark),
    "the transport tries again by itself": (SimTransport, "_answer", retry_by_itself),
    "older weights are dropped while they are needed": (Coordinator, "publish", keep_the_newest),
    "an attempt has no deadline": (pool.WorkerPool, "patience", wait_for_ever),
    "a start has no deadline": (schedules, "HEALTH", FOREVER),
    "a suspect worker is never ended": (Coordinator, "_overdue", only_hedge),
    "what a lost worker had is forgotten": (Ledger, "fail", forget_the_attempts),
    "poison is tried for ever": (ledger, "STRIKES", 10**9),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_without_this_safeguard_some_schedule_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, instead = MUTATIONS[name]
    monkeypatch.setattr(where, what, instead)
    # What a broken coordinator does is not to be foreseen: an assertion, an unknown version, a call for ever.
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check_all(range(400))
