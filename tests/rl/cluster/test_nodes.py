"""Three Ray nodes on one machine: one is lost with what it had, and comes back."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from coupled.rl import ray_cluster
from coupled.rl.cluster.coordinator import Coordinator
from coupled.rl.cluster.pool import PoolSpec
from coupled.rl.cluster.ray_actors import RayTransport
from coupled.rl.cluster.runtime import Runtime
from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import GroupKey, Health, Unit
from coupled.rl.errors import RecipeError
from coupled.rl.ray_cluster import alive_nodes, close_ray, open_ray
from coupled.rl.recipe import Cluster, Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_UNITS = 24


class Sleeper:
    """A stand-in for a rollout worker."""

    def hello(self) -> dict[str, Any]:
        import ray

        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def work(self, number: int) -> int:
        time.sleep(0.5)
        return number


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head and two more nodes, as `ray start` would make them on three hosts."""
    ray_cluster._require_token()
    from ray import cloudpickle
    from ray.cluster_utils import Cluster as Nodes

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes cannot import this file
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield nodes
    finally:
        nodes.shutdown()


def test_a_lost_node_costs_time_and_one_that_comes_back_is_used(nodes: Any, make_recipe_at: Any) -> None:
    others = [nodes.add_node(num_cpus=1) for _ in range(2)]
    ray = open_ray(make_recipe_at(nodes.address))
    try:
        assert len(alive_nodes(ray)) == 3
        health = Health(least_seconds=20.0, first_seconds=60.0, start_seconds=60.0)
        pool = PoolSpec(stage="roll", spec=WorkerSpec(make=Sleeper), places=[None] * 3, method="work")
        runtime = Runtime(Coordinator(RayTransport(ray), [pool], health=health))
        assert runtime.wait_for(lambda c: c.pools["roll"].num_ready == 3, 120.0)
        units = [Unit(key=GroupKey(stream="now", step=1, slot=n), work=n) for n in range(NUM_UNITS)]
        runtime.ask(lambda c: c.submit(units))
        assert runtime.wait_for(lambda c: any(entry.is_done for entry in c.ledger.entries.values()), 60.0)
        nodes.remove_node(others[0], allow_graceful=False)
        entries = runtime.collect([unit.key for unit in units])
        assert [entry.payload for entry in entries] == list(range(NUM_UNITS)), "nothing is lost, nothing is twice"
        counters = runtime.ask(lambda c: c.take_counters())
        assert counters.num_lost_workers >= 1
        assert counters.num_redispatched >= 1
        nodes.add_node(num_cpus=1)
        assert runtime.wait_for(lambda c: c.pools["roll"].num_ready == 3, 180.0), "its place is filled again"
        again = [Unit(key=GroupKey(stream="now", step=2, slot=n), work=n) for n in range(6)]
        assert [entry.payload for entry in runtime.finish(again)] == list(range(6))
        runtime.close()
    finally:
        close_ray()


def test_there_is_one_worker_on_each_node_that_is_named_and_a_node_that_joins_takes_the_place_of_a_lost_one(
    nodes: Any, make_recipe_at: Any
) -> None:
    ray = open_ray(make_recipe_at(nodes.address))
    try:
        wanted = [node.node_id for node in nodes.list_all_nodes()]
        spec = WorkerSpec(make=Sleeper, num_cpus=0.0)
        pool = PoolSpec(stage="roll", spec=spec, places=wanted, method="work")
        health = Health(start_seconds=60.0, first_seconds=60.0)
        runtime = Runtime(Coordinator(RayTransport(ray), [pool], health=health))

        def places() -> list[str]:
            assert runtime.wait_for(lambda c: c.pools["roll"].num_ready == len(wanted), 180.0)
            return runtime.ask(lambda c: [worker.hello["node"] for worker in c.pools["roll"].workers])

        assert len(wanted) >= 2
        assert places() == wanted
        joined = nodes.add_node(num_cpus=1)
        lost = next(node for node in nodes.worker_nodes if node.node_id in wanted)
        nodes.remove_node(lost, allow_graceful=False)
        units = [Unit(key=GroupKey(stream="now", step=1, slot=n), work=n) for n in range(2 * len(wanted))]
        runtime.finish(units)
        assert places() == [joined.node_id if node == lost.node_id else node for node in wanted]
        runtime.close()
    finally:
        close_ray()


@pytest.fixture
def make_recipe_at() -> Any:
    def make(address: str) -> Recipe:
        model, data = {"path": "none"}, {"path": "none"}
        values = {"stage": "rl", "model": model, "data": data, "cluster": {"address": address}}
        return Recipe.model_validate(values)

    return make


def test_joining_without_saying_how_to_authenticate_is_refused(
    make_recipe_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(RecipeError, match="RAY_AUTH_MODE"):
        open_ray(make_recipe_at("127.0.0.1:1"))
    with pytest.raises(ValidationError, match="address"):
        Cluster.model_validate({"address": "ray://head:10001"})
