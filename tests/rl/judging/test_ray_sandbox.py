"""Supervisors in Ray actors: order, batches, and that nothing is lost when one of them goes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coupled.rl.cluster.coordinator import Coordinator
from coupled.rl.cluster.pool import PoolSpec
from coupled.rl.cluster.ray import alive_nodes, close_ray, open_ray
from coupled.rl.cluster.runtime import Runtime
from coupled.rl.cluster.simulate import Faults, SimTransport
from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import INFRA_BUDGET, ClusterError
from coupled.rl.judging import ray_sandbox
from coupled.rl.judging.ray_sandbox import RayExecutor
from coupled.rl.recipe.read import load_recipe
from coupled.rl.recipe.schema import Recipe
from coupled.sandbox import Call, Isolation, Job, Limits, Outcome, SandboxUnavailable

ISOLATION = Isolation(
    tier="landlock",
    user="uid 1",
    has_network=False,
    filesystem="host",
    processes="none can be started",
    has_filter=True,
)
QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, ("num_threads=1", "sandbox.num_workers=1", "sandbox.workers=ray", *overrides))


def job(uid: str, body: str = "return x * 2", x: int = 21) -> Job:
    source = f"import time\ndef f(x): {body}"
    limits = Limits(cpu_seconds=1, wall_seconds=30.0)
    return Job(uid=uid, source=source, calls=(Call(function="f", args=(x,)),), limits=limits)


def actors(executor: RayExecutor) -> list[object]:
    return [worker.handle for worker in executor._coordinator.pools["score"].workers]


def both_are_back(executor: RayExecutor) -> None:
    assert executor._runtime is not None
    assert executor._runtime.wait_for(lambda c: c.pools["score"].num_ready == 2, 120.0)


@pytest.fixture(scope="module")
def events() -> list[dict[str, object]]:
    """What the executor's coordinator tells."""
    return []


@pytest.fixture(scope="module")
def executor(events: list[dict[str, object]]) -> Iterator[RayExecutor]:
    """Two supervisors, both on the one node that a test machine has."""
    chosen = recipe()

    def emit(event: str, **facts: object) -> None:
        events.append({"event": event} | facts)

    ray = open_ray(chosen)
    try:
        with RayExecutor(chosen, nodes=alive_nodes(ray) * 2, emit=emit) as executor:
            yield executor
    finally:
        close_ray()


def test_groups_travel_together_and_small_ones_share_a_batch() -> None:
    jobs = [job(uid) for uid in "aaaaabbbbbccdd"]
    cut = [[each.uid for each in batch] for batch in ray_sandbox._batches(jobs, num_workers=2)]
    assert cut == [list("aaaaa"), list("bbbbb"), list("ccdd")]
    assert ray_sandbox._batches([], num_workers=2) == []


@pytest.mark.ray
def test_executions_come_in_order_and_the_tier_is_that_of_the_nodes(executor: RayExecutor) -> None:
    jobs = [job(str(n // 3), x=n) for n in range(20)]
    executions = executor.run(jobs)
    assert [execution.results[0].value for execution in executions] == [2 * n for n in range(20)]
    assert [execution.uid for execution in executions] == [each.uid for each in jobs]
    assert {execution.tier for execution in executions} == {executor.isolation().tier}
    assert executor.run([]) == []


@pytest.mark.ray
def test_a_supervisor_killed_in_the_middle_of_a_batch_loses_nothing(executor: RayExecutor) -> None:
    first = actors(executor)
    jobs = [job(str(n // 4), "time.sleep(0.2); return x", x=n) for n in range(24)]
    killer = threading.Timer(0.6, lambda: [executor._ray.kill(actor) for actor in first])
    killer.start()
    executions = executor.run(jobs)
    killer.join()
    assert [execution.outcome for execution in executions] == [Outcome.OK] * 24
    assert [execution.results[0].value for execution in executions] == list(range(24))
    assert not set(first) & set(actors(executor)), "both were replaced"
    assert {execution.tier for execution in executions} == {executor.isolation().tier}
    other = {"namespaces": "landlock", "landlock": "namespaces"}[executor.isolation().tier]
    with pytest.raises(SandboxUnavailable, match="this node now provides tier"):
        executor._check({"isolation": replace(executor.isolation(), tier=other)})


@pytest.mark.ray
def test_a_supervisor_that_does_not_answer_is_replaced(executor: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_sandbox, "_patience", lambda jobs: 2.0 if jobs[0].uid == "slow" else 60.0)
    first = actors(executor)
    slow, quick = executor.run([job("slow", "time.sleep(25); return x"), job("quick")])
    assert slow.outcome is Outcome.SANDBOX_ERROR
    assert slow.outcome.is_infrastructure
    assert "it ended 3 workers" in slow.detail
    assert "no answer in" in slow.detail
    assert quick.outcome is Outcome.OK
    assert set(first) != set(actors(executor))


@pytest.mark.ray
def test_infrastructure_is_tried_on_another_supervisor_and_stays_infrastructure(
    executor: RayExecutor, events: list[dict[str, object]]
) -> None:
    broken = job("broken")
    object.__setattr__(broken.limits, "max_files", -7)  # no limit of the kernel's: the lock-down fails
    both_are_back(executor)
    events.clear()
    (execution,) = executor.run([broken])
    assert execution.outcome is Outcome.SANDBOX_ERROR
    sent = [event["worker"] for event in events if event["event"] == "start"]
    assert len(sent) == INFRA_BUDGET
    assert all(one != other for one, other in itertools.pairwise(sent))


@pytest.mark.ray
def test_a_node_that_cannot_give_the_tier_is_refused_with_a_remedy(executor: RayExecutor) -> None:
    nowhere = recipe("sandbox.tier=remote", "sandbox.url=http://127.0.0.1:9")
    with pytest.raises(SandboxUnavailable, match=r"(?s)refused.*remedy: run `coupled doctor` on that node"):
        RayExecutor(nowhere)
    assert executor.run([job("a")])[0].outcome is Outcome.OK, "the instance they share is still there"


@pytest.mark.ray
def test_a_lost_answer_is_made_again(executor: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = executor._ray.exceptions
    losses = [
        exceptions.ObjectLostError("00" * 28, None, "call"),
        exceptions.OwnerDiedError("00" * 28, None, "call"),
        exceptions.OutOfMemoryError("no memory"),
    ]
    get = executor._ray.get
    due: list[Exception] = []

    def losing(ref: object, **options: object) -> object:
        found = get(ref, **options)
        if due and isinstance(found, list):
            raise due.pop()
        return found

    monkeypatch.setattr(executor._ray, "get", losing)
    for loss in losses:
        due.append(loss)
        assert [e.results[0].value for e in executor.run([job("a", x=1)])] == [2]
        assert due == []


@pytest.mark.ray
def test_a_mistake_of_ours_inside_a_supervisor_is_not_taken_for_a_loss(executor: RayExecutor) -> None:
    mistaken = job("mistaken")
    object.__setattr__(mistaken, "calls", (5,))
    both_are_back(executor)
    first = actors(executor)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'function'"):
        executor.run([mistaken])
    assert actors(executor) == first
    assert executor.run([job("a")])[0].outcome is Outcome.OK


@pytest.mark.ray
def test_a_supervisor_that_does_not_come_back_at_once_is_waited_for(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = iter(range(3))

    def refuse(isolation: object) -> None:
        if next(refusals, None) is not None:
            raise SandboxUnavailable("no")

    pool = executor._coordinator.pools["score"]
    monkeypatch.setattr(pool, "spec", replace(pool.spec, check=refuse))
    for actor in actors(executor):
        executor._ray.kill(actor)
    (execution,) = executor.run([job("a")])
    assert execution.outcome is Outcome.OK


def test_nodes_that_give_different_tiers_are_refused() -> None:
    found = [("this", ISOLATION), ("that", replace(ISOLATION, tier="namespaces"))]
    with pytest.raises(
        SandboxUnavailable, match=r"(?s)same tier; the nodes provide .*landlock.*remedy: .*sandbox.tier=landl"
    ):
        ray_sandbox._common(found)
    assert ray_sandbox._common(found[:1]) is ISOLATION


class Greeter:
    """A supervisor that only says what it has."""

    def hello(self) -> dict[str, object]:
        return {"isolation": ISOLATION}


def greeted(transport: SimTransport, num_nodes: int) -> RayExecutor:
    """An executor that has waited for its nodes, in virtual time."""
    executor = object.__new__(RayExecutor)
    places = [f"node {n}" for n in range(num_nodes)]
    pool = PoolSpec(stage="score", spec=WorkerSpec(make=Greeter), places=places, method="run")
    executor._coordinator = Coordinator(transport, [pool], health=ray_sandbox.HEALTH)
    executor._greet_all(Runtime(executor._coordinator))
    return executor


class PartOfNodes(SimTransport):
    """Workers on the first node answer; those on others fall silent, or their node is lost."""

    def __init__(self, *, is_told: bool, num_good: int = 1) -> None:
        super().__init__(0, Faults())
        self._is_told, self._num_good = is_told, num_good

    def spawn(self, spec: WorkerSpec, place: object) -> Any:
        worker = super().spawn(spec, place)
        if int(str(place).removeprefix("node ")) >= self._num_good:
            worker.is_hung = not self._is_told
            worker.is_dead = self._is_told
        return worker


@pytest.mark.parametrize("is_told", [True, False])
def test_a_node_that_is_lost_or_silent_when_supervisors_start_does_not_hold_the_run_up(is_told: bool) -> None:
    transport = PartOfNodes(is_told=is_told)
    executor = greeted(transport, 3)
    assert executor.isolation() == ISOLATION
    assert transport.now() <= ray_sandbox.LATE_SECONDS + 5
    with pytest.raises(ClusterError, match="on any of 2 nodes") as caught:
        greeted(PartOfNodes(is_told=is_told, num_good=0), 2)
    assert caught.value.exit_code == 75


@pytest.mark.ray
def test_who_does_not_know_the_token_is_not_heard(executor: RayExecutor) -> None:
    address = executor._ray.get_runtime_context().gcs_address
    asks = (
        f"from ray._raylet import GcsClient; print(len(GcsClient(address={address!r}).get_all_node_info(timeout=20)))"
    )
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    for environment, is_heard in ((dict(os.environ), True), (stranger | {"RAY_AUTH_MODE": "disabled"}, False)):
        asked = subprocess.run(
            [sys.executable, "-c", asks], env=environment, capture_output=True, text=True, timeout=120
        )
        assert (asked.returncode == 0) is is_heard, asked.stderr
        assert asked.stdout == ("1\n" if is_heard else "")
