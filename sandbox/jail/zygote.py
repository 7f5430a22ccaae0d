"""The zygote: a clean, warm interpreter that forks one process per program and never sees a program's bytes.

Started by `worker` as `python -P -s -S -B zygote.py CONTROL_FD SETTINGS` with an empty environment; SETTINGS is
the JSON of {"tier", "base", "uid", "packages", "preload"}. Messages on the control socket are JSON, one per
packet. The host sends `{"op": "run", "serial", "limits", "profile"}` with the program's descriptors, and
`{"op": "kill", "serial"}`; the zygote answers a hello once and then one report per program. When the host goes
away the control socket closes, and the zygote ends together with what it runs.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_MAX_MESSAGE = 16_384
_FDS_SPACE = socket.CMSG_LEN(3 * struct.calcsize("i"))
_NOT_LOCKED_DOWN = 70
_MAX_SWEEPS = 1000
"""Sweeps for processes that a program left running: a chain of processes that fork faster survives them."""

# What programs usually import, so that their import statements cost nothing; the rest is read from the disk.
_decode = json.JSONDecoder().raw_decode
_NUM_REHEARSALS = 20
"""The interpreter adapts a function to what it works on after some calls, up to a dozen."""
_REHEARSAL = {  # as `outcome.encode_job` writes one
    "mode": "calls",
    "source": "import math\nfrom typing import List\n\ndef f(x: int) -> List[int]:\n    return [n for n in range(x)]\n",
    "setup": "",
    "calls": [["f", {"t": [3]}, {"d": []}, False, False, ""], ["f", {"t": [4]}, {"d": []}, True, False, ""]],
}
_HEADER = """
    typing math cmath re heapq itertools collections collections.abc functools random string datetime json
    bisect operator copy fractions decimal statistics dataclasses enum abc io textwrap time array
"""


def main(control_fd: int, settings: dict[str, Any]) -> None:
    """Prepare, send the hello, then serve until the host goes away."""
    held_back: list[Callable[[], object]] = []
    with _holding_back(held_back):
        parts = {name: _load(name) for name in ("confine", "child", "codec", "landlock", "seccomp")}
    confine = parts["confine"]
    control = socket.socket(fileno=confine.service(control_fd))
    os.close(control_fd)
    try:
        with _holding_back(held_back):
            for name in _HEADER.split():
                importlib.import_module(name)
            base, packages = settings["base"], settings["packages"]
            here = confine.enter(settings["tier"], base, settings["uid"], packages, parts["landlock"])
            if here.packages:
                sys.path.append(here.packages)
            for name in settings["preload"]:
                importlib.import_module(name)
            gc.collect()  # before the rehearsal: it gives back what was laid by for the next
            _rehearse(parts["child"], parts["codec"])
            # Once for all programs: nothing draws a number between here and there. A package may load its generator
            # only now.
            parts["child"].fix_randomness()
        if "threading" in sys.modules and sys.modules["threading"].active_count() > 1:
            for hook in held_back:  # a package has started threads, and no program has them
                if hook.__module__ == "threading":
                    os.register_at_fork(after_in_child=hook)
        confine.clear_scratch(here)
        confine.seal(here, parts["seccomp"])
    except Exception as error:  # the border: any failure is reported to the host, which refuses to start
        control.send(json.dumps({"error": _described(error)}).encode())
        raise
    hello = {
        "uid": here.uid,
        "namespaces": sorted(here.namespaces),
        "has_proc": here.has_proc,
        "shown": here.shown,
        "notes": here.notes,
    }
    control.send(json.dumps(hello).encode())
    gc.freeze()  # a collection in a program must not touch, and so copy, the pages it shares with us
    try:
        while (request := _receive(control)) is not None:
            message, fds = request
            if message["op"] == "run":
                _run(control, here, message, fds, parts, held_back)
    finally:
        if here.tier == "process":
            confine.remove_tree(base)
        elif here.tier == "landlock":
            for name in (*(f"packages/{os.path.basename(path)}" for path in packages),):
                os.unlink(f"{base}/{name}")
            for name in ("packages", "work", "") if packages else ("work", ""):
                os.rmdir(os.path.join(base, name))


@contextlib.contextmanager
def _holding_back(held_back: list[Callable[[], object]]) -> Iterator[None]:
    """Keep what is imported meanwhile from doing in every program what is needed after a program's own fork alone.

    `random` would draw a new seed, which is then fixed again, and `threading` looks for threads that are gone, of
    which the zygote has none. Their hooks go to `held_back`, for programs that may fork.
    """
    register = os.register_at_fork

    def register_or_hold(**hooks: Any) -> None:
        hook = hooks.get("after_in_child")
        if list(hooks) == ["after_in_child"] and getattr(hook, "__module__", "") in ("random", "threading"):
            held_back.append(hooks["after_in_child"])
        else:
            register(**hooks)

    os.register_at_fork = register_or_hold
    try:
        yield
    finally:
        os.register_at_fork = register


def _rehearse(child: Any, codec: Any) -> None:
    """Run a program of ours a few times, so that what an interpreter learns on the way is learnt once.

    What a program's process is the first to write, it copies, a page at a time: that is most of what it costs.
    """
    host, program = socket.socketpair()
    with host, program:
        for _ in range(_NUM_REHEARSALS):
            child._write_frame(host.fileno(), json.dumps(_REHEARSAL).encode())
            child.serve(program.fileno(), codec)
            host.recv(_MAX_MESSAGE)
    del sys.modules["solution"]


def _described(error: Exception) -> str:
    """One line where the kernel or an import refused; the traceback of any other error."""
    if isinstance(error, (OSError, ImportError)):
        return f"{type(error).__name__}: {error}"
    return traceback.format_exc()[-4000:]


def _run(
    control: socket.socket,
    here: Any,
    request: dict[str, Any],
    fds: list[int],
    parts: dict[str, Any],
    held_back: list[Callable[[], object]],
) -> None:
    confine = parts["confine"]
    may_fork = here.tier == "process" or request["profile"] != "strict"
    confine.before_fork(here)
    pid = os.fork()
    if pid == 0:
        status = _NOT_LOCKED_DOWN
        try:
            try:
                confine.lock_down(here, request["limits"], request["profile"], fds, parts["landlock"])
                for hook in held_back if may_fork else ():
                    os.register_at_fork(after_in_child=hook)
            except BaseException:
                # Received descriptors take the lowest numbers, so this is the result socket at any point.
                os.write(confine.RESULT_FD, traceback.format_exc().encode())
                raise
            output = sys.stdout
            status = parts["child"].serve(confine.RESULT_FD, parts["codec"])
            output.flush()  # what was printed is kept for the report; all replies are out by now
        finally:
            os._exit(status)
    for fd in fds:
        os.close(fd)
    queued, ran = _wait(control, here, pid, request["serial"], confine)
    _, status, usage = os.wait4(pid, 0)
    if here.tier == "process":
        sweep(here, confine)
        confine.clear_scratch(here)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    # Its own processes may have kept it waiting, and their time is not counted: then no other process is to blame.
    queued_seconds = 0.0 if may_fork else kept_waiting(queued, ran, cpu_seconds)
    control.send(
        f'{{"serial": {request["serial"]}, "exit": {os.waitstatus_to_exitcode(status)}, "cpu_seconds": {cpu_seconds}, '
        f'"memory_kb": {usage.ru_maxrss}, "queued_seconds": {queued_seconds}}}'.encode()
    )


def sweep(here: Any, confine: Any) -> None:
    """End what a program has left running."""
    for _ in range(_MAX_SWEEPS):
        orphans = confine.living_children(here)
        if not orphans:
            return
        for orphan in orphans:
            _kill(orphan)
            os.waitpid(orphan, 0)


def kept_waiting(queued: float, ran: float, cpu_seconds: float) -> float:
    """Return for how many seconds other processes kept a program from a processor; it has one process.

    `queued` and `ran`: how long its first thread was runnable and how long it had a processor; `cpu_seconds`: all
    threads. The others may have kept the first one waiting, for as long as they ran and no longer.
    """
    return max(0.0, queued - max(0.0, cpu_seconds - ran))


def _wait(control: socket.socket, here: Any, pid: int, serial: int, confine: Any) -> tuple[float, float]:
    """Return when the process ended, killing it when the host orders it or is gone; see `confine.waited`."""
    waited = (0.0, 0.0)
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(control, select.POLLIN)
    try:
        while True:
            for fd, _ in poll.poll():
                if fd == pidfd:
                    return waited
            request = _receive(control)
            if request is None:
                poll.unregister(control)
                _kill(pid)
            elif request[0] == {"op": "kill", "serial": serial}:
                waited = confine.waited(here, pidfd, pid)
                _kill(pid)
    finally:
        os.close(pidfd)


def _kill(pid: int) -> None:
    """Kill a process and its group; it may have left its group, or the group may be gone."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _receive(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    # Not `recv_fds` and `loads`: what those two do besides is a good part of what a program costs its zygote.
    data, received, _, _ = control.recvmsg(_MAX_MESSAGE, _FDS_SPACE)
    fds = [fd for _, _, numbers in received for (fd,) in struct.iter_unpack("i", numbers)]
    return (_decode(data.decode())[0], fds) if data else None


def _load(name: str) -> Any:
    """Load a neighbour by path: in this interpreter the package does not exist."""
    spec = importlib.util.spec_from_file_location(f"coupled_sandbox_{name}", os.path.join(_HERE, f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is missing beside {__file__}: reinstall the package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
