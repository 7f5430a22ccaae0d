"""The Ray of this process, its own or a cluster that runs, shared by rollout actors and sandbox supervisors. The only
file that imports ray."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupled.rl.cluster.placement import HostResources
from coupled.rl.errors import CoupledError, RecipeError
from coupled.rl.recipe.schema import AnyRecipe, Recipe

CONNECT_SECONDS = 10.0
SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of a network interface."""

_lock = threading.Lock()
_num_users = 0
_interface: str | None = None
"""What gloo and NCCL were told last."""


def open_ray(recipe: AnyRecipe, log_dir: Path | None = None) -> Any:
    """Start Ray, or join the instance that this process has started, and return the module `ray`.

    With `cluster.address` the cluster that runs there is joined. A bare `ray.init()` would join whatever it finds on
    the host. Each call wants its `close_ray`.

    Raises:
        CoupledError: there is no cluster at the address, or it wants a token that is not known here.
    """
    if recipe.cluster.address is None:
        _require_token()  # before the import, which reads the mode
    else:
        _require_mode()
    import ray

    global _num_users
    with _lock:
        if _num_users == 0:
            _start_quietly(ray, recipe)
        _num_users += 1
    if log_dir is not None:
        _redirect_dumps(log_dir / "ray.log")
    return ray


def close_ray() -> None:
    """Stop the instance when its last user goes."""
    import ray

    global _num_users
    with _lock:
        _num_users = max(0, _num_users - 1)
        if _num_users == 0:
            ray.shutdown()


def look_at_cluster(address: str) -> list[HostResources]:
    """Join a cluster for as long as it takes to see what its hosts have.

    Raises:
        CoupledError: there is none at the address, or it wants a token that is not known here.
    """
    _require_mode()
    import ray

    _join(ray, address, num_threads=1)
    try:
        return rooms(ray)
    finally:
        ray.shutdown()


def alive_nodes(ray: Any) -> list[str]:
    """Return the ids of the nodes that take actors."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def address_here(ray: Any) -> str:
    """The address by which the other hosts know this one; 127.0.0.1 of a Ray of this host alone."""
    return str(ray.util.get_node_ip_address())


def rooms(ray: Any) -> list[HostResources]:
    """What every living host has."""
    free = ray._private.state.available_resources_per_node()
    here = ray.get_runtime_context().get_node_id()
    return [
        HostResources(
            host=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            is_here=node["NodeID"] == here,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bundle:
    """A place that is reserved: number `index` of a placement group, on `host`."""

    group: Any
    index: int
    host: str


class Reservation:
    """Places for `num` processes of equal needs, on as few hosts as can be, the first on the host of this process.

    Ray gives what is reserved to nobody else, also while nothing runs there.
    """

    def __init__(self, ray: Any, needs: Mapping[str, float], num: int) -> None:
        self._ray = ray
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self._group = ray.util.placement_group(
            [dict(needs)] * num, strategy="PACK", bundle_label_selector=[here, *[{}] * (num - 1)]
        )

    def wait(self, seconds: float) -> list[Bundle]:
        """The places; none after `seconds` without them."""
        if not self._group.wait(seconds):
            return []
        hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
        found = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        return [
            Bundle(group=self._group, index=i, host=hosts.get(found[i], "a host that is gone")) for i in sorted(found)
        ]

    def release(self) -> None:
        """Give everything back; what runs there is ended."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.util.remove_placement_group(self._group)


def scheduling_of(place: str | Bundle) -> Any:
    """The scheduling that takes this place and no other: what Ray calls a soft affinity to a node, it often ignores."""
    from ray.util import scheduling_strategies as strategies

    if isinstance(place, Bundle):
        return strategies.PlacementGroupSchedulingStrategy(
            placement_group=place.group, placement_group_bundle_index=place.index
        )
    return strategies.NodeAffinitySchedulingStrategy(node_id=place, soft=False)


def own_gpus() -> list[str]:
    """The GPUs that Ray has given to the actor that asks, as they are called in CUDA_VISIBLE_DEVICES."""
    import ray

    return [str(gpu) for gpu in ray.get_gpu_ids()]


def index_of_gpu(gpu: str, num_gpus: int) -> int:
    """Under which number this process, which sees `num_gpus`, knows a GPU of its host.

    Raises:
        RecipeError: it does not see that one.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [str(i) for i in range(num_gpus)] if chosen is None else [name.strip() for name in chosen.split(",")]
    if gpu not in seen:
        raise RecipeError(
            f"Ray has reserved GPU {gpu} of this host for the first rank, which sees {', '.join(seen)} alone; start "
            "the run with the CUDA_VISIBLE_DEVICES that `ray start` had here, or without"
        )
    return seen.index(gpu)


def use_interface_towards(address: str) -> None:
    """Let gloo and NCCL listen on the network interface that leads to `address`. What the user has set stays.

    Left alone, gloo takes what the host's own name stands for, often 127.0.0.1, and other hosts look for it in vain.
    """
    global _interface
    name = interface_towards(address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name is not None and os.environ.get(variable) in (None, _interface):
            os.environ[variable] = name
    _interface = name


def interface_towards(address: str) -> str | None:
    """The network interface that packets to an IPv4 address leave by. Example: 127.0.0.1 → lo."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing: the kernel only chooses the way
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    return None


def _require_token() -> None:
    """Have Ray hear only who knows a token: it listens on every interface and runs whatever it is sent.

    What the user has set of this stays. Processes of the sandbox do not get this environment; in tier `process` they
    can read it when they run as the same user.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "ray" in sys.modules:
        from ray import _raylet  # compiled, so without types

        raylet: Any = _raylet
        raylet.Config.initialize("")  # reads the mode again


def _require_mode() -> None:
    if "RAY_AUTH_MODE" not in os.environ:
        raise RecipeError(
            "a Ray cluster is joined with RAY_AUTH_MODE set to what it is on every host of it, 'token' or 'disabled'; "
            "it is not set here. Ray guesses otherwise, and differently on the head: export it before `ray start` and "
            "before `coupled`"
        )


def _start_quietly(ray: Any, recipe: AnyRecipe) -> None:
    num_threads = recipe.num_threads or 1
    if recipe.cluster.address is not None:
        _join(ray, recipe.cluster.address, num_threads)
        return
    num_ranks = recipe.cluster.trainer_ranks if recipe.cluster.trainer_workers == "ray" else 0
    num_workers = recipe.rollout.num_workers if isinstance(recipe, Recipe) else 0
    ray.init(
        address="local",
        num_cpus=max(num_workers + num_ranks, os.cpu_count() or 1),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        **_quiet(num_threads),
    )


def _join(ray: Any, address: str, num_threads: int) -> None:
    host, _, port = address.rpartition(":")
    try:
        if host:  # Ray itself goes on trying for minutes where nobody listens
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, **_quiet(num_threads))
    except (OSError, RuntimeError, ValueError) as error:
        raise CoupledError(
            f"no Ray cluster answers at cluster.address={address} ({error}). Is it the head's ip:port, and are "
            "RAY_AUTH_MODE and the token those of the head?"
        ) from error


def _quiet(num_threads: int) -> dict[str, Any]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(num_threads)}},
    }


def _redirect_dumps(path: Path) -> None:
    """Ray prints dumps of dead processes on stdout whatever its log level says; send them to the run folder."""
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private import worker

        def to_file(data: Any, *_: Any, **__: Any) -> None:
            with path.open("a") as out:
                out.write(f"{data}\n")

        worker.print_to_stdstream = to_file
