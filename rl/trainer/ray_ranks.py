"""Trainer ranks in Ray actors: on this host or others, each in a place that is reserved beforehand.

All places are reserved at once, including one for the first rank, although that is the run's own process: Ray then
gives its GPU to no other job. The `RankGroup` handles the loss of a rank, as for ranks in processes.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from coupled.rl.cluster.placement import ResourceRequest, no_room, placement_table
from coupled.rl.cluster.ray import (
    Bundle,
    Reservation,
    address_here,
    close_ray,
    index_of_gpu,
    open_ray,
    own_gpus,
    rooms,
    use_interface_towards,
)
from coupled.rl.cluster.ray_transport import RayTransport
from coupled.rl.cluster.transport import Transport, WorkerSpec
from coupled.rl.cluster.types import HEALTH, ClusterError, WorkerLost, WorkFailed
from coupled.rl.errors import RecipeError
from coupled.rl.model.open import pick_device
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.schema import AnyRecipe
from coupled.rl.trainer.rank_failures import report_of
from coupled.rl.trainer.rank_group import RankGroup
from coupled.rl.trainer.rank_process import serve_rank
from coupled.rl.trainer.rank_protocol import LOCAL_HOST, RankExit

QUIET_SECONDS = 10.0
"""Print a notice when placement takes longer than this."""
GPU_SECONDS = 60.0
"""Limit on the time of the actor that reports its GPU."""
REMEDY = "Free resources (see `ray status`), add hosts, or lower cluster.trainer_ranks; then continue with resume=auto"


class RemoteRank:
    """One rank, inside an actor. Its output goes to the run folder, as for a rank in a process."""

    def __init__(self, recipe: AnyRecipe, rank: int, host: str, port: int, folder: Path, token: str) -> None:
        self._recipe, self._rank, self._host, self._port = recipe, rank, host, port
        self._folder, self._token = folder, token

    def serve_rank(self) -> None:
        """Run as the rank until the first one closes.

        Raises:
            RecipeError: the run folder is not the first rank's.
        """
        require_token(self._folder, self._token)
        print_to(log_of(self._folder, self._rank))
        print(f"rank {self._rank} is process {os.getpid()} on host {socket.gethostname()}")
        use_interface_towards(self._host)
        try:
            # An actor sees no GPU but its own.
            serve_rank(self._recipe, rank=self._rank, host=self._host, port=self._port, device=0)
        except BaseException:
            traceback.print_exc()
            raise


class GpuReporter:
    """Actor that runs briefly in the place of the first rank, which is the run's own process, to find its GPU."""

    def gpus(self) -> list[str]:
        """GPUs of the place."""
        return own_gpus()


class RayRankHandle:
    """A rank in an actor, which Ray ends when this process does."""

    def __init__(
        self, transport: Transport, spec: WorkerSpec, place: Bundle, *, rank: int, host: str, log: Path
    ) -> None:
        self.rank, self.host, self.log = rank, host, str(log)
        self._transport = transport
        self._actor = transport.spawn(spec, place)
        self._call = transport.call(self._actor, "serve_rank")
        self._end: RankExit | None = None

    def ended(self) -> RankExit | None:
        if self._end is None and self._transport.wait([self._call], 0.0):
            self._end = self._how()
        return self._end

    def kill(self) -> None:
        self._transport.kill(self._actor)

    def _how(self) -> RankExit:
        try:
            self._transport.result(self._call)
        except WorkFailed as error:
            return RankExit(how=f"an error on host {self.host}", is_lost=False, report=report_of(error.cause))
        except WorkerLost as error:
            kind = str(error).partition(":")[0]
            return RankExit(how=f"the loss of its process or host {self.host} ({kind})", is_lost=True)
        return RankExit(how="status 0", is_lost=False)


def open_ray_rank_group(recipe: AnyRecipe, policy: Policy, folder: Path) -> RankGroup:
    """The ranks of a trainer, the first of them this process and the others actors.

    Raises:
        RecipeError: a Ray of this host alone lacks capacity for the ranks.
        ClusterError: the cluster lacks capacity within the time limit.
        RankError: a rank did not come up.
    """
    device = pick_device(recipe.model.device)
    # `auto` is resolved here: all ranks use the kind of device of the first.
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": device})})
    folder = folder.resolve()
    opened = ExitStack()
    try:
        ray = open_ray(recipe, folder)
        opened.callback(close_ray)
        transport, here = RayTransport(ray), address_here(ray)
        host = LOCAL_HOST if recipe.cluster.address is None else here
        places = reserve(ray, recipe, opened.callback)
        use_interface_towards(host)
        if device == "cuda":
            use_reserved_gpu(policy, transport, places[0])
        token = write_token(folder)
        gpus = float(device == "cuda")

        def start(rank: int, port: int) -> RayRankHandle:
            arguments = (recipe, rank, host, port, folder, token)
            spec = WorkerSpec(make=RemoteRank, arguments=arguments, num_gpus=gpus)
            place = places[rank]
            at = host if place.host == here else place.host
            return RayRankHandle(transport, spec, place, rank=rank, host=at, log=log_of(folder, rank))

        return RankGroup(recipe, policy, start, host=host, on_close=opened.close)
    except BaseException:
        opened.close()
        raise


def reserve(ray: Any, recipe: AnyRecipe, on_close: Callable[[Callable[[], None]], Any]) -> list[Bundle]:
    """A place for each rank; `on_close` receives the function that releases them."""
    needs = WorkerSpec(make=RemoteRank, num_gpus=float(recipe.model.device == "cuda")).needs
    ask = ResourceRequest(num=recipe.cluster.trainer_ranks, what="trainer ranks", needs=needs, has_one_here=True)
    if recipe.cluster.address is None and not ask.is_possible(rooms(ray)):
        raise RecipeError(
            f"cluster.trainer_ranks={ask.num} does not fit on this host, and there is no other: "
            f"{no_room(ask, rooms(ray), 'Lower it, or name a cluster with cluster.address')}"
        )
    reservation = Reservation(ray, needs, ask.num)
    on_close(reservation.release)
    seconds = HEALTH[recipe.cluster.health].start_seconds
    if places := reservation.wait(min(QUIET_SECONDS, seconds)):
        return places
    table = placement_table(ask, rooms(ray))
    print(f"waiting up to {seconds:.0f} s for capacity. {table}", file=sys.stderr, flush=True)
    if places := reservation.wait(max(0.0, seconds - QUIET_SECONDS)):
        return places
    raise ClusterError(
        f"could not place {ask.num} trainer ranks within {seconds:.0f} s: {no_room(ask, rooms(ray), REMEDY)}"
    )


def use_reserved_gpu(policy: Policy, transport: Transport, place: Bundle) -> None:
    """Train on the GPU that is reserved for this process, and on none that Ray may give away."""
    reporter = transport.spawn(WorkerSpec(make=GpuReporter, num_gpus=1.0), place)
    call = transport.call(reporter, "gpus")
    deadline = time.monotonic() + GPU_SECONDS
    try:
        while not transport.wait([call], max(0.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                raise ClusterError(f"no actor has started on this host in {GPU_SECONDS:.0f} s; check `ray status`")
        (gpu,) = transport.result(call)
    finally:
        transport.kill(reporter)
    index = index_of_gpu(gpu, torch.cuda.device_count())
    torch.cuda.set_device(index)
    policy.model.to(torch.device("cuda", index))
    torch.cuda.empty_cache()  # of the GPU that it was on, which Ray may give to another rank


def write_token(folder: Path) -> str:
    """Write a token to the run folder by which the other ranks recognise it."""
    token = secrets.token_hex(8)
    place = token_of(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(token)
    return token


def require_token(folder: Path, token: str) -> None:
    """Refuse a folder that only has the same name: checkpoints are written and read by all ranks.

    Raises:
        RecipeError: the token is not in it.
    """
    place = token_of(folder)
    if not place.is_file() or place.read_text() != token:
        raise RecipeError(
            f"every host of the trainer must see the run folder, and {socket.gethostname()} does not see {folder}; set "
            "output_dir to a disk that all of them share"
        )


def token_of(folder: Path) -> Path:
    return folder / "logs" / "ranks.token"


def log_of(folder: Path, rank: int) -> Path:
    return folder / "logs" / f"rank_{rank}.log"


def print_to(log: Path) -> None:
    """Redirect all output of this process to a file, including output that libraries write past Python."""
    out = log.open("a", buffering=1)
    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    sys.stdout = sys.stderr = out
