"""Three Ray nodes on one machine: one is lost with what it had, and comes back; ranks are lost with theirs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.toys import make_recipe
from pydantic import ValidationError

from coupled.rl.cluster import ray as ray_cluster
from coupled.rl.cluster.coordinator import Coordinator
from coupled.rl.cluster.pool import PoolSpec
from coupled.rl.cluster.ray import alive_nodes, close_ray, open_ray
from coupled.rl.cluster.ray_transport import RayTransport
from coupled.rl.cluster.runtime import Runtime
from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import HEALTH, ClusterError, GroupKey, Health, Unit
from coupled.rl.commands import doctor
from coupled.rl.errors import RankLostError, RecipeError
from coupled.rl.model.open import open_policy
from coupled.rl.model.weights import digest_of, trainable_state
from coupled.rl.recipe.cluster import Cluster
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.open import open_engine
from coupled.rl.trainer import ray_ranks
from coupled.rl.trainer.open import open_rl_learner
from coupled.rl.trainer.rank_group import RankGroup
from coupled.rl.trainer.ray_ranks import RayRankHandle
from coupled.rl.trainer.rl_learner import RLLearner

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


DRIVER = """
import sys
from pathlib import Path
from coupled.rl.model.open import open_policy
from coupled.rl.trainer.open import open_rl_learner
from coupled.rl.recipe.schema import Recipe
recipe = Recipe.model_validate_json(sys.argv[1])
ranks = open_rl_learner(recipe, open_policy(recipe.model, 0), Path(sys.argv[2]))
ranks._announce("trainable_state")
print("the others are inside a collective", flush=True)
sys.stdin.read()
"""


def test_ranks_on_other_nodes_are_lost_with_them_and_end_with_the_first(
    nodes: Any, tiny_folder: Any, tmp_path: Path
) -> None:
    nodes.add_node(num_cpus=1)
    recipe = recipe_of_ranks(nodes.address, tiny_folder())
    log = tmp_path / "killed" / "logs" / "rank_1.log"
    command = [sys.executable, "-c", DRIVER, recipe.model_dump_json(), str(tmp_path / "killed")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == b"the others are inside a collective\n"
            pid = int(log.read_text().split("process ")[1].split()[0])
            assert os.path.exists(f"/proc/{pid}")
        finally:
            driver.kill()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}"), "an actor ends with its owner"

    rank_group = open_rl_learner(recipe, open_policy(recipe.model, 0), tmp_path)
    assert isinstance(rank_group, RankGroup)
    try:
        assert isinstance(rank_group._handles[0], RayRankHandle)
        state = rank_group.trainable_state()
        nodes.remove_node(node_of_rank(nodes, 1), allow_graceful=False)
        with pytest.raises(RankLostError, match="rank 1 of the trainer ended with the loss of its process or host"):
            ask_until_it_fails(rank_group)
        assert digest_of(state) == digest_of(trainable_state(open_policy(recipe.model, 0)))
    finally:
        rank_group.close()


def node_of_rank(nodes: Any, rank: int) -> Any:
    import ray

    groups = ray.util.placement_group_table().values()
    (places,) = [group["bundles_to_node_id"] for group in groups if group["state"] == "CREATED"]
    assert places[0] == ray.get_runtime_context().get_node_id(), "the first rank's place is where the run itself is"
    return next(node for node in nodes.worker_nodes if node.node_id == places[rank])


def ask_until_it_fails(rank_group: RankGroup) -> None:
    """The actors of a node that is gone answer for a moment longer."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rank_group.trainable_state()


def test_what_there_is_no_room_for_is_told_with_a_table_in_time(
    nodes: Any, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(HEALTH, "fast", Health(start_seconds=1.0))
    monkeypatch.setattr(ray_ranks, "QUIET_SECONDS", 0.5)
    recipe = recipe_of_ranks(nodes.address, tiny_folder(), trainer_ranks=40, health="fast")
    policy = open_policy(recipe.model, 0)
    started = time.monotonic()
    with pytest.raises(
        ClusterError, match=r"(?s)could not place 40 trainer ranks within 1 s: .*too few.*requested: 40 .*here\)"
    ):
        open_rl_learner(recipe, policy, tmp_path)
    assert time.monotonic() - started < 30
    assert "waiting up to 1 s for capacity. requested: 40 trainer ranks of 1 CPU each" in capsys.readouterr().err
    rollout = recipe.rollout.model_copy(update={"workers": "ray"})
    recipe = recipe_of_ranks(nodes.address, tiny_folder(), trainer_ranks=1, trainer_workers="process", health="fast")
    cluster = recipe.cluster.model_copy(update={"gpus_per_worker": 0.5})
    recipe = recipe.model_copy(update={"rollout": rollout, "cluster": cluster})
    with pytest.raises(
        ClusterError, match=r"(?s)0 of 2 rollout workers.*requested: 1 rollout workers of 1 CPU, 0\.5 GPU "
    ):
        open_engine(recipe, RLLearner(recipe, policy).generate, tmp_path)


def test_the_doctor_has_a_line_for_each_host(nodes: Any) -> None:
    found = doctor._cluster(nodes.address)
    assert len(found) >= 1
    assert sum("(here)" in finding.name for finding in found) == 1
    assert all(re.match(r"CPUs \d free of \d; memory, GiB .*; object store, GiB", f.detail) for f in found)
    (unreachable,) = doctor._cluster("127.0.0.1:1")
    assert not unreachable.is_good
    assert "no Ray cluster answers at" in unreachable.detail


def recipe_of_ranks(address: str, checkpoint: Path, **cluster: object) -> Recipe:
    values = {"address": address, "trainer_ranks": 2, "trainer_workers": "ray"} | cluster
    model, rollout = {"path": str(checkpoint)}, {"canvas": 6, "denoising_steps": 6}
    return make_recipe(model=model, rollout=rollout, num_threads=1, cluster=values)


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
