"""Trainer ranks in Ray actors: they do what ranks in processes do, and when one is lost the run ends with its name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import MakePolicy, make_batch, make_recipe, make_requests

from coupled.rl.cluster.ray import close_ray, index_of_gpu, interface_towards, open_ray, rooms
from coupled.rl.cluster.types import HEALTH, Health
from coupled.rl.errors import RankError, RankLostError, RecipeError
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.model.open import open_policy
from coupled.rl.model.weights import digest_of, save_policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.workers import ObjectCarrier, RolloutWorker
from coupled.rl.trainer import ray_ranks
from coupled.rl.trainer.open import open_rl_learner
from coupled.rl.trainer.rank_group import RankGroup

SAMPLER = Sampler(canvas=6, denoising_steps=6, temperature=1.0)


@pytest.fixture(scope="module")
def checkpoint(tiny_policy: MakePolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_policy(tiny_policy(), folder)
    return folder


def recipe_of(checkpoint: Path, **cluster: object) -> Recipe:
    return make_recipe(
        model={"path": str(checkpoint)},
        optimizer={"learning_rate": 1e-3, "micro_batch_size": 2, "final_fraction": 1.0},
        rollout={"canvas": 6, "denoising_steps": 6, "batch_size": 2},
        num_threads=1,
        cluster={"trainer_ranks": 2, "trainer_workers": "ray"} | cluster,
    )


@pytest.fixture(scope="module")
def ray(checkpoint: Path) -> Iterator[Any]:
    """Started once; each rank group is one more user of it."""
    yield open_ray(recipe_of(checkpoint))
    close_ray()


def opened(recipe: Recipe, folder: Path) -> RankGroup:
    rank_group = open_rl_learner(recipe, open_policy(recipe.model, recipe.seed), folder)
    assert isinstance(rank_group, RankGroup)
    return rank_group


def one_step(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """An update of all weights, which the ranks hold shares of, and rollouts under what it gives."""
    rank_group = opened(recipe, folder)
    try:
        batch = make_batch(seed=1)
        draw = draw_masks(batch, recipe.estimator, (0, "mask", 1, 0))
        done = rank_group.update(1, batch, draw, rank_group.anchor(batch, draw, is_first=True))
        made = rank_group.generate(make_requests(6), SAMPLER, seed=0, weight_version=1)
        return {
            "sums": done.sums,
            "norm": done.grad_norm,
            "weights": digest_of(rank_group.trainable_state()),
            "rollouts": [(r.uid, r.canvas_ids.tolist(), r.commit_logp.tolist()) for r in made],
        }
    finally:
        rank_group.close()


def pid_in(log: Path) -> int:
    return int(log.read_text().split("process ")[1].split()[0])


def is_gone(pid: int, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.1)
    return not os.path.exists(f"/proc/{pid}")


@pytest.mark.ray
@pytest.mark.slow
def test_ranks_in_actors_do_what_ranks_in_processes_do_bit_for_bit(ray: Any, checkpoint: Path, tmp_path: Path) -> None:
    free = rooms(ray)[0].free
    found = one_step(recipe_of(checkpoint), tmp_path / "ray")
    assert found == one_step(recipe_of(checkpoint, trainer_workers="process"), tmp_path / "process")
    assert is_gone(pid_in(tmp_path / "ray" / "logs" / "rank_1.log"))
    deadline = time.monotonic() + 30
    while rooms(ray)[0].free["CPU"] < free["CPU"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert rooms(ray)[0].free["CPU"] == free["CPU"], "what was reserved is given back"


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_actor_is_named_and_one_that_fails_says_why(ray: Any, checkpoint: Path, tmp_path: Path) -> None:
    rank_group = opened(recipe_of(checkpoint), tmp_path)
    try:
        state = rank_group.trainable_state()
        os.kill(pid_in(tmp_path / "logs" / "rank_1.log"), signal.SIGKILL)
        named = r"rank 1 of the trainer ended with the loss of its process or host .*_state'.*rank_1\.log\. Continue"
        with pytest.raises(RankLostError, match=named) as lost:
            rank_group.trainable_state()
        assert lost.value.exit_code == 75
    finally:
        rank_group.close()
    sent = ObjectCarrier(ray).send(state, 1)
    worker = RolloutWorker(recipe_of(checkpoint))
    assert worker.load(1, ray.get(sent, timeout=60)) == digest_of(state), "what the shares add up to"

    def elsewhere(folder: Path) -> str:
        return "what another host's folder of this name has"

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray_ranks, "write_token", elsewhere)
        with pytest.raises(
            RankError, match=r"ended with an error on host .*RecipeError: every host .* see the run fol"
        ):
            opened(recipe_of(checkpoint), tmp_path)


@pytest.mark.ray
def test_a_host_that_is_too_small_and_alone_is_told_at_once(
    ray: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    with pytest.raises(
        RecipeError, match=r"(?s)trainer_ranks=500 does not fit on this host.*requested: 500 .*\(here\).*Lower"
    ):
        opened(recipe_of(checkpoint, trainer_ranks=500), tmp_path)
    assert time.monotonic() - started < 10
    assert not (tmp_path / "logs").exists()


def test_the_interface_is_the_one_that_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from coupled.rl.cluster import ray as ray_cluster

    assert interface_towards("127.0.0.1") == "lo"
    for chosen in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(chosen, raising=False)
    monkeypatch.setattr(ray_cluster, "_interface", None)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    ray_cluster.use_interface_towards("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "ib0")
    monkeypatch.setattr(ray_cluster, "interface_towards", lambda address: "eth7")
    ray_cluster.use_interface_towards("10.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "ib0")


def test_the_reserved_gpu_is_found_among_those_that_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert index_of_gpu("2", 4) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 2")
    assert index_of_gpu("2", 2) == 1
    with pytest.raises(RecipeError, match=r"GPU 0 of this host .* sees only 3, 2.*CUDA_VISIBLE_DEVICES"):
        index_of_gpu("0", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_weights_of_any_type_arrive_as_they_were(dtype: torch.dtype) -> None:
    class Store:
        """Puts nothing anywhere, but as Ray does: what is read back cannot be written to."""

        def put(self, item: Any) -> Any:
            for sent in item.values():
                sent.data.flags.writeable = False
            return item

    stream = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=stream)
    state = {"matrix": values.to(dtype), "turned": values.t().to(dtype), "number": values[0, 0].to(dtype)}
    handle = ObjectCarrier(Store()).send(state, 1)
    arrived = {name: sent.tensor() for name, sent in handle.items()}
    assert digest_of(arrived) == digest_of(state)
    assert arrived["matrix"].dtype == dtype


def test_health_says_how_long_to_wait_for_room() -> None:
    assert all(isinstance(each, Health) and each.start_seconds > ray_ranks.QUIET_SECONDS for each in HEALTH.values())
