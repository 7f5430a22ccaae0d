"""The Ray of this process, its own or a cluster that runs, shared by rollout actors and sandbox supervisors. The only
file that imports ray."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

from coupled.rl.errors import CoupledError, RecipeError
from coupled.rl.recipe import Recipe

_lock = threading.Lock()
_num_users = 0


def open_ray(recipe: Recipe, log_dir: Path | None = None) -> Any:
    """Start Ray, or join the instance that this process has started, and return the module `ray`.

    With `cluster.address` the cluster that runs there is joined. A bare `ray.init()` would join whatever it finds on
    the host. Each call wants its `close_ray`.

    Raises:
        CoupledError: there is no cluster at the address, or it wants a token that is not known here.
    """
    if recipe.cluster.address is None:
        _require_token()  # before the import, which reads the mode
    elif "RAY_AUTH_MODE" not in os.environ:
        raise RecipeError(
            "a Ray cluster is joined with RAY_AUTH_MODE set to what it is on every host of it, 'token' or 'disabled'; "
            "it is not set here. Ray guesses otherwise, and differently on the head: export it before `ray start` and "
            "before `coupled train`"
        )
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


def alive_nodes(ray: Any) -> list[str]:
    """Return the ids of the nodes that take actors."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def on_node(node: str) -> Any:
    """Return the scheduling that takes this node and no other: what Ray calls a soft affinity, it often ignores."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


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


def _start_quietly(ray: Any, recipe: Recipe) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    threads = str(recipe.num_threads or 1)
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "configure_logging": True,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}},
    }
    if recipe.cluster.address is not None:
        try:
            ray.init(address=recipe.cluster.address, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise CoupledError(
                f"no Ray cluster answers at cluster.address={recipe.cluster.address} ({error}). Is it the head's "
                "ip:port, and are RAY_AUTH_MODE and the token those of the head?"
            ) from error
        return
    ray.init(
        address="local",
        num_cpus=max(recipe.rollout.num_workers, os.cpu_count() or 1),
        include_dashboard=recipe.cluster.dashboard,
        _node_ip_address="127.0.0.1",
        **common,
    )


def _redirect_dumps(path: Path) -> None:
    """Ray prints dumps of dead processes on stdout whatever its log level says; send them to the run folder."""
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private import worker

        def to_file(data: Any, *_: Any, **__: Any) -> None:
            with path.open("a") as out:
                out.write(f"{data}\n")

        worker.print_to_stdstream = to_file
