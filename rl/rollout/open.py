"""Opens the rollout engine that a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coupled.rl.cluster.placement import ResourceRequest, no_room
from coupled.rl.cluster.transport import Carrier, Transport, WorkerSpec
from coupled.rl.cluster.types import HEALTH
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.workers import (
    ClusterEngine,
    EventSink,
    FileCarrier,
    ObjectCarrier,
    RolloutWorker,
    inline_engine,
    rank_group_engine,
)
from coupled.rl.trainer.rank_group import RankGroup
from coupled.rl.trainer.rl_learner import RLLearner

REMEDY = (
    "Free what is held, add hosts, or lower cluster.min_workers or cluster.gpus_per_worker; then continue with "
    "resume=auto"
)


def open_engine(
    recipe: Recipe, learner: RLLearner | RankGroup, folder: Path, tell: EventSink = lambda event, **facts: None
) -> ClusterEngine:
    """The engine that `rollout.workers` names, ready for work. Workers write what they print into `folder`.

    Raises:
        CoupledError: fewer than `cluster.min_workers` start, or there is no cluster where the recipe says.
    """
    rollout, cluster = recipe.rollout, recipe.cluster
    if rollout.workers == "inline":
        if isinstance(learner, RankGroup):
            return rank_group_engine(learner, tell)
        return inline_engine(learner.policy, rollout.batch_size, tell)
    transport: Transport
    carrier: Carrier = FileCarrier(folder / "weights")
    on_close: Callable[[], None] = lambda: None  # noqa: E731
    room: Callable[[], str] = lambda: ""  # noqa: E731
    spec = WorkerSpec(make=RolloutWorker, arguments=(recipe,), num_gpus=cluster.gpus_per_worker)
    if rollout.workers == "ray":
        from coupled.rl.cluster.ray import close_ray, open_ray, rooms
        from coupled.rl.cluster.ray_transport import RayTransport

        ray = open_ray(recipe, folder)
        transport, on_close = RayTransport(ray), close_ray
        request = ResourceRequest(num=cluster.min_workers, what="rollout workers", needs=spec.needs)
        room = lambda: f"\n{no_room(request, rooms(ray), REMEDY)}"  # noqa: E731
        carrier = ObjectCarrier(ray)
    else:
        from coupled.rl.cluster.processes import LocalTransport

        transport = LocalTransport(folder / "workers.log")
    engine = ClusterEngine(
        transport,
        spec,
        carrier,
        num_workers=rollout.num_workers,
        min_workers=cluster.min_workers,
        batch_size=rollout.batch_size,
        lag=cluster.lag,
        health=HEALTH[cluster.health],
        tell=tell,
        on_close=on_close,
        room=room,
    )
    try:
        engine.wait_ready()
    except BaseException:
        engine.close()
        raise
    return engine
