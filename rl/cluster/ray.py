"""The Ray instance of this process, its own or a running cluster, shared by rollout actors and sandbox supervisors. The
only file that imports ray."""

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
"""Interface that was last set for gloo and NCCL."""


def open_ray(recipe: AnyRecipe, log_dir: Path | None = None) -> Any:
    """Start Ray, or join the instance that this process has started, and return the module `ray`.

    With `cluster.address` the cluster at that address is joined. A bare `ray.init()` would join any instance on the
    host. Each call needs its own `close_ray`.

    Raises:
        CoupledError: there is no cluster at the address, or it requires a token that this process does not have.
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
    """Stop the instance when its last user closes it."""
    import ray

    global _num_users
    with _lock:
        _num_users = max(0, _num_users - 1)
        if _num_users == 0:
            ray.shutdown()


def look_at_cluster(address: str) -> list[HostResources]:
    """Join a cluster, read the resources of its hosts, and leave it.

    Raises:
        CoupledError: there is none at the address, or it requires a token that this process does not have.
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
    """Address under which other hosts reach this one; 127.0.0.1 for a Ray instance on this host alone."""
    return str(ray.util.get_node_ip_address())


def rooms(ray: Any) -> list[HostResources]:
    """Resources of every host that is alive."""
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
    """A reserved place: bundle `index` of a placement group, on `host`."""

    group: Any
    index: int
    host: str


class Reservation:
    """Places for `num` processes of equal needs, on as few hosts as possible, the first on the host of this process.

    Ray assigns reserved resources to no other work, also while nothing runs there.
    """

    def __init__(self, ray: Any, needs: Mapping[str, float], num: int) -> None:
        self._ray = ray
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self._group = ray.util.placement_group(
            [dict(needs)] * num, strategy="PACK", bundle_label_selector=[here, *[{}] * (num - 1)]
        )

    def wait(self, seconds: float) -> list[Bundle]:
        """Wait for the places and return them; an empty list after `seconds`."""
        if not self._group.wait(seconds):
            return []
        hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
        found = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        return [Bundle(group=self._group, index=i, host=hosts.get(found[i], "a lost host")) for i in sorted(found)]

    def release(self) -> None:
        """Release all places; processes that run there are killed."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.util.remove_placement_group(self._group)


def scheduling_of(place: str | Bundle) -> Any:
    """Scheduling strategy that accepts this place only. Ray often ignores a soft affinity to a node."""
    from ray.util import scheduling_strategies as strategies

    if isinstance(place, Bundle):
        return strategies.PlacementGroupSchedulingStrategy(
            placement_group=place.group, placement_group_bundle_index=place.index
        )
    return strategies.NodeAffinitySchedulingStrategy(node_id=place, soft=False)


def own_gpus() -> list[str]:
    """GPUs that Ray has assigned to the calling actor, by their names in CUDA_VISIBLE_DEVICES."""
    import ray

    return [str(gpu) for gpu in ray.get_gpu_ids()]


def index_of_gpu(gpu: str, num_gpus: int) -> int:
    """Index of a host's GPU in this process, which sees `num_gpus` of them.

    Raises:
        RecipeError: this process does not see that GPU.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [str(i) for i in range(num_gpus)] if chosen is None else [name.strip() for name in chosen.split(",")]
    if gpu not in seen:
        raise RecipeError(
            f"Ray has reserved GPU {gpu} of this host for the first rank, which sees only {', '.join(seen)}; start "
            "the run with the CUDA_VISIBLE_DEVICES that `ray start` had on this host, or unset it"
        )
    return seen.index(gpu)


def use_interface_towards(address: str) -> None:
    """Make gloo and NCCL listen on the network interface that leads to `address`. Values set by the user are kept.

    By default gloo takes the address of the host's own name, often 127.0.0.1, which other hosts cannot reach.
    """
    global _interface
    name = interface_towards(address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name is not None and os.environ.get(variable) in (None, _interface):
            os.environ[variable] = name
    _interface = name


def interface_towards(address: str) -> str | None:
    """Network interface through which packets to an IPv4 address leave. Example: 127.0.0.1 → lo."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing: the kernel only chooses the route
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    return None


def _require_token() -> None:
    """Make Ray require a token: it listens on every interface and executes any code that it receives.

    Values set by the user are kept. Processes of the sandbox do not get this environment; in tier `process` they
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
        raylet.Config.initialize("")  # re-reads the mode


def _require_mode() -> None:
    if "RAY_AUTH_MODE" not in os.environ:
        raise RecipeError(
            "joining a Ray cluster requires RAY_AUTH_MODE, with the same value on every host, 'token' or 'disabled'; "
            "it is not set here. Without it Ray's default differs between the head and other hosts: export it before "
            "`ray start` and before `coupled`"
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
        if host:  # Ray itself retries for minutes when no process listens
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, **_quiet(num_threads))
    except (OSError, RuntimeError, ValueError) as error:
        raise CoupledError(
            f"no Ray cluster answers at cluster.address={address} ({error}). Check that it is the head's ip:port, "
            "and that RAY_AUTH_MODE and the token are the same as on the head"
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
    """Write dumps of dead processes, which Ray prints on stdout at any log level, to a file."""
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private import worker

        def to_file(data: Any, *_: Any, **__: Any) -> None:
            with path.open("a") as out:
                out.write(f"{data}\n")

        worker.print_to_stdstream = to_file
