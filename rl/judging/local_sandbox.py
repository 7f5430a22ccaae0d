"""The sandbox of this host, with the recipe's settings."""

from __future__ import annotations

from coupled.rl.recipe.judging import Sandbox
from coupled.sandbox import (
    Executor,
    RemoteExecutor,
    open_executor,
)


def open_local_sandbox(sandbox: Sandbox) -> Executor:
    """Executor of this process: jails on this machine, or connections to a server.

    Raises:
        SandboxUnavailable: this host cannot provide the tier, or there is no server at the address.
    """
    if sandbox.tier == "remote":
        assert sandbox.url is not None, "the recipe requires a url with tier remote"
        return RemoteExecutor(sandbox.url, num_workers=sandbox.num_workers)
    return open_executor(tier=sandbox.tier, num_workers=sandbox.num_workers)
