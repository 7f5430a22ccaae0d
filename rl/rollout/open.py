"""Opens the rollout engine that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coupled.rl.cluster.placement import ResourceRequest, no_room
from coupled.rl.cluster.transport import Carrier, Transport, WorkerSpec
from coupled.rl.cluster.types import HEALTH, NO_EVENTS, EventSink
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import Denoise, InlineEngine, StepEngine
from coupled.rl.rollout.workers import ClusterEngine, FileCarrier, ObjectCarrier, RolloutWorker

REMEDY = (
    "Free resources, add hosts, or lower cluster.min_workers or cluster.gpus_per_worker; then continue with resume=auto"
)


def open_engine(recipe: Recipe, denoise: Denoise, folder: Path, emit: EventSink = NO_EVENTS) -> StepEngine:
    """The engine of `rollout.workers`, ready for work. Workers outside this process log into `folder`.

    Args:
        denoise: the trainer's `generate`, the rollouts of `rollout.workers: inline`.

    Raises:
        CoupledError: fewer than `cluster.min_workers` start, or there is no cluster at the recipe's address.
    """
    if recipe.rollout.workers == "inline":
        # Several ranks cut the requests of a step themselves, each the same way, and divide the batches.
        batch_size = recipe.rollout.batch_size if recipe.cluster.trainer_ranks == 1 else None
        return InlineEngine(denoise, batch_size, emit)
    return _open_cluster_engine(recipe, folder, emit)


def _open_cluster_engine(recipe: Recipe, folder: Path, emit: EventSink) -> ClusterEngine:
    rollout, cluster = recipe.rollout, recipe.cluster
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
        emit=emit,
        on_close=on_close,
        room=room,
    )
    try:
        engine.wait_ready()
    except BaseException:
        engine.close()
        raise
    return engine
