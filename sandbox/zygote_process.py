"""One zygote process seen from the host: starts it, hands it programs one at a time, and collects its reports."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupled.sandbox.diagnosis import remedy
from coupled.sandbox.types import Limits, SandboxUnavailable

PYTHON = sys.executable
"""The interpreter that programs run in."""
START_SECONDS = 30.0
_ZYGOTE = Path(__file__).parent / "jail" / "zygote.py"
_LINGER_SECONDS = 0.02
"""Time for a program that has closed its result socket to end on its own."""
_REPORT_SECONDS = 30.0
"""Timeout of the report on a program that the zygote was ordered to kill; then the zygote itself is stopped."""
_UIDS = range(62_000, 64_000)
"""Users that programs become when the host is root; other software on the machine should not use them."""
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    # One thread of a linear-algebra library; one arena of the allocator, or each thread reserves 64 MiB of its own.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}


class WorkerDied(RuntimeError):
    """The zygote is gone although no program of ours ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramEnd:
    """The zygote's report on a program. Example: `ProgramEnd(exit=0, cpu_seconds=0.02, memory_mb=11.5)`."""

    exit: int | None = None
    """Status, or minus the signal that ended it; None when the zygote died, or was stopped, instead of reporting."""
    cpu_seconds: float = 0.0
    memory_mb: float = 0.0
    queued_seconds: float = 0.0
    """Seconds for which it was runnable without a processor; measured only when the host ordered the kill."""
    was_killed: bool = False
    """True: the host ordered the kill, so a SIGKILL in `exit` may be the host's."""


class ZygoteProcess:
    """Owns one zygote, its control socket and its folder. Runs one program at a time; is not started twice.

    Raises SandboxUnavailable, with a remedy, when the zygote refuses to start or stays silent.
    """

    def __init__(self, tier: str, uid: int, packages: Sequence[str], preload: Sequence[str]) -> None:
        self._tier = tier
        self._serial = 0
        self._is_running = False
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._base = ""
        try:
            self.hello = self._start(uid, packages, preload)
            """The confinement that took effect: uid, namespaces, has_proc, shown, notes."""
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int | None:
        """Process id; None after `stop`."""
        return None if self._process is None else self._process.pid

    @property
    def is_idle(self) -> bool:
        """True while the zygote lives and no program is unreported."""
        return self._process is not None and self._process.poll() is None and not self._is_running

    def start_program(self, limits: Limits, profile: str, stdin: bytes | None = None) -> tuple[socket.socket, int]:
        """Start one program and return the host's ends of its result socket and output pipe, both non-blocking.

        `report` or `leave` must follow. Raises WorkerDied when the zygote does not listen.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            result, handed = socket.socketpair()
            ours.callback(result.close)
            # Our copies of the program's ends must go: the sockets close when its process has closed its own.
            theirs.callback(handed.close)
            output, write_end = os.pipe()
            ours.callback(os.close, output)
            theirs.callback(os.close, write_end)
            fds = [handed.fileno(), write_end]
            if stdin is not None:
                fds.append(_sealed_file(stdin))
                theirs.callback(os.close, fds[-1])
            result.setblocking(False)
            os.set_blocking(output, False)
            # A byte sent out of band would make poll report that there is something to read, and the read find nothing.
            result.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            self._serial += 1
            request = {"op": "run", "serial": self._serial, "limits": dataclasses.asdict(limits), "profile": profile}
            self._is_running = True
            try:
                self._order(request, fds)
            except OSError as error:
                raise WorkerDied(f"the zygote does not listen: {error}") from error
            ours.pop_all()
        return result, output

    def report(self, *, at_once: bool, deadline: float, waits: bool) -> ProgramEnd:
        """Return how the program ended, after killing it if it does not end by itself.

        The program may end until `deadline` if it `waits`, else for a moment, and not at all if `at_once`. A zygote
        that does not report is stopped. In tier `process` a program can do this to its zygote, and the end has no
        `exit`; in the other tiers none can, so the machine is at fault: WorkerDied.
        """
        patience = 0.0 if at_once else max(0.0, deadline - time.monotonic()) if waits else _LINGER_SECONDS
        report = self._receive_report(patience)
        if report is not None:
            return _end(report, was_killed=False)
        with contextlib.suppress(OSError):
            self._order({"op": "kill", "serial": self._serial}, [])
        ordered = time.monotonic()
        report = self._receive_report(_REPORT_SECONDS)
        if report is None:
            is_silent = time.monotonic() - ordered >= _REPORT_SECONDS
            self.stop()
            if is_silent and self._tier != "process":
                raise WorkerDied(f"the zygote did not report within {_REPORT_SECONDS} s that its program was killed")
            return ProgramEnd(was_killed=True)
        return _end(report, was_killed=True)

    def leave(self) -> None:
        """Stop the zygote if an exception came between its program and the report: the next one gets its own."""
        if self._is_running:
            self.stop()

    def stop(self) -> None:
        """End the zygote and whatever it runs; harmless when repeated."""
        self._is_running = False
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            # With its socket closed the zygote ends what it runs, cleans up and goes; killing it is the
            # fallback.
            try:
                self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._remove_base()

    def forget(self) -> None:
        """In a forked copy of the host: drop the socket, so that the zygote still notices its host's end."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.returncode = 0  # not our child here: nothing to wait for, nothing to warn of
        self._control = self._process = None
        self._base = ""

    def _start(self, uid: int, packages: Sequence[str], preload: Sequence[str]) -> dict[str, Any]:
        self._base = tempfile.mkdtemp(prefix="coupled-sandbox-")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {"tier": self._tier, "base": self._base, "uid": uid, "packages": packages, "preload": preload}
        with theirs:
            # As -I, but heeding PYTHONHASHSEED: set order must not change a verdict from worker to worker. No
            # PDEATHSIG: it would fire when the thread that starts the zygote ends, not when the host does.
            self._process = subprocess.Popen(
                [PYTHON, "-P", "-s", "-S", "-B", str(_ZYGOTE), str(theirs.fileno()), json.dumps(settings)],
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        hello = self._receive(START_SECONDS)
        if hello is None or "error" in hello:
            status = self._process.poll()
            reason = hello["error"] if hello else f"no message within {START_SECONDS} s, exit status {status}"
            raise SandboxUnavailable(
                f"tier {self._tier!r} could not start: {reason}\nremedy: {remedy(self._tier, reason)}"
            )
        if self._tier == "namespaces":
            self._remove_base()  # nothing hangs on it any more, and nothing is left if we are killed
        return hello

    def _receive_report(self, seconds: float) -> dict[str, Any] | None:
        """Return the report of the program that runs; one of a program before it is dropped."""
        deadline = time.monotonic() + seconds
        while (report := self._receive(max(0.0, deadline - time.monotonic()))) is not None:
            if report["serial"] == self._serial:
                self._is_running = False
                return report
        return None

    def _order(self, request: dict[str, Any], fds: list[int]) -> None:
        if self._control is None:
            raise BrokenPipeError("it was stopped")
        socket.send_fds(self._control, [json.dumps(request).encode()], fds)

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message, or None when none comes in time or the zygote is gone."""
        if self._control is None:
            return None
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        try:
            data = self._control.recv(16_384)
        except OSError:
            return None
        message: dict[str, Any] | None = json.loads(data) if data else None
        return message

    def _remove_base(self) -> None:
        if self._base:
            shutil.rmtree(self._base, ignore_errors=True)
        self._base = ""


def _end(report: dict[str, Any], *, was_killed: bool) -> ProgramEnd:
    return ProgramEnd(
        exit=report["exit"],
        cpu_seconds=report["cpu_seconds"],
        memory_mb=report["memory_kb"] / 1024,
        queued_seconds=report["queued_seconds"],
        was_killed=was_killed,
    )


def find_packages(names: Sequence[str]) -> list[str]:
    """Return the paths that make up the packages, their bundled libraries included.

    Raises SandboxUnavailable for a name that this interpreter cannot import, ValueError for one with a dot.
    """
    paths: list[str] = []
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"preload takes names of whole packages, such as 'numpy'; received {name!r}")
        spec = importlib.util.find_spec(name)
        if spec is None or not (spec.submodule_search_locations or spec.has_location):
            raise SandboxUnavailable(
                f"preload names packages that {PYTHON} can import; it has no {name!r}\nremedy: pip install {name}"
            )
        path = os.path.realpath([*(spec.submodule_search_locations or ()), spec.origin or ""][0])
        libraries = os.path.join(os.path.dirname(path), f"{name}.libs")
        paths += [path, libraries] if os.path.isdir(libraries) else [path]
    return paths


def claim_uid() -> tuple[int, socket.socket]:
    """Return a user no other worker on this machine uses now, and what keeps it ours while it is open.

    Threads are counted per user, so two programs of one user could use up each other's.
    """
    start = os.getpid() * 16
    for offset in range(len(_UIDS)):
        uid = _UIDS[(start + offset) % len(_UIDS)]
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0coupled-sandbox-uid-{uid}")
        except OSError:
            claim.close()
        else:
            return uid, claim
    raise SandboxUnavailable(f"every user of {_UIDS} is taken by a worker of this machine: close some executors")


def _sealed_file(content: bytes) -> int:
    """Return a descriptor that reads `content` and cannot be used to write."""
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
