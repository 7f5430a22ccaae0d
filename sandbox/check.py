"""The self-check: does the sandbox hold on this very machine?"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import NamedTuple

from coupled.sandbox.executor import Executor
from coupled.sandbox.types import Call, Execution, Job, Limits, Outcome

_LIMITS = Limits(cpu_seconds=1, wall_seconds=30.0, memory_mb=128, file_kb=1024, output_kb=256)

_LOOP = "def probe():\n    while True: pass"
_HOG = "def probe():\n    data = []\n    while True: data.append(bytearray(1 << 20))"
# Bounded, so that a machine where it is not held survives the check.
_FORK_BOMB = """
import os, time
def probe():
    started = 0
    for _ in range(64):
        try:
            pid = os.fork()
        except OSError:
            continue
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
    return started
"""
# os.write and not file.write: an unflushed file swallows the error, and "refused" would look like "worked".
_WRITER = """
import os
def probe():
    fd = os.open("big", os.O_CREAT | os.O_WRONLY, 0o600)
    total = 0
    try:
        while total < 1 << 26:
            total += os.write(fd, bytes(1 << 16))
    except OSError as error:
        return total
    return total
"""
_CONNECT = """
import socket
def probe(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError as error:
        return f"refused: {error}"
    return "connected"
"""
_EXIT = "import os\ndef probe(): os._exit(0)"
_HONEST = "def probe(): return sum(range(5))"


class Check(NamedTuple):
    """One probe. Example: `Check("infinite loop", True, "timeout")`."""

    name: str
    held: bool
    detail: str


def self_check(executor: Executor) -> list[Check]:
    """Run an honest program, six hostile ones and the honest one again; return what held.

    The network probe connects to a listener that this function opens on 127.0.0.1; that it is not held on a
    machine without namespaces is a finding, not an error. Takes two to three seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        probes: list[tuple[str, str, tuple[object, ...], Callable[[Execution], bool]]] = [
            ("honest program", _HONEST, (), _is_ten),
            ("infinite loop", _LOOP, (), lambda run: run.outcome is Outcome.TIMEOUT),
            ("memory hog", _HOG, (), _ran_out_of_memory),
            ("fork bomb", _FORK_BOMB, (), lambda run: _value(run) == "0"),
            ("huge file", _WRITER, (), lambda run: _value(run) == str(_LIMITS.file_kb << 10)),
            ("network", _CONNECT, (port,), lambda run: _value(run).startswith("refused")),
            ("exit with status 0", _EXIT, (), lambda run: run.outcome is Outcome.INCOMPLETE),
            ("honest program afterwards", _HONEST, (), _is_ten),
        ]
        jobs = [
            Job(uid=name, source=source, calls=(Call(function="probe", args=args),), limits=_LIMITS)
            for name, source, args, _ in probes
        ]
        runs = executor.run(jobs)
    return [Check(name, holds(run), _detail(run)) for (name, _, _, holds), run in zip(probes, runs, strict=True)]


def _value(run: Execution) -> str:
    """Return the only reply as text; empty when there is none."""
    return str(run.results[0].value) if run.outcome is Outcome.OK and run.results[0].raised is None else ""


def _is_ten(run: Execution) -> bool:
    return _value(run) == "10"


def _ran_out_of_memory(run: Execution) -> bool:
    raised = run.results[0].raised if run.results else None
    return raised is not None and raised.type == "MemoryError"


def _detail(run: Execution) -> str:
    reply = run.results[0] if run.results else None
    said = "" if reply is None else f", raised {reply.raised.type}" if reply.raised else f", gave {reply.value!r}"
    return f"{run.outcome}{said}"[:200]
