"""One zygote seen from the host: starts it, has it run programs one at a time, and ends what overstays."""

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
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupled.sandbox.diagnosis import remedy
from coupled.sandbox.types import Isolation, Limits, SandboxUnavailable, Usage

LOCKED = 0x55
"""First byte on the result socket: the lock-down is done and no byte of the program has been read."""

_ZYGOTE = Path(__file__).parent / "jail" / "zygote.py"
_START_SECONDS = 30.0
_LINGER_SECONDS = 0.02
"""How long a program that has closed its result socket may take to end on its own."""
_REPORT_SECONDS = 30.0
"""How long a zygote may take to report a program it was told to kill; then it is stopped itself."""
_NUM_DRAINED = 16
"""Parts of a full pipe dropped at once: a program that fills it as fast must not keep us from the clock."""
_PAUSE_SECONDS = 0.001
"""After a read that found nothing although there was something: whoever takes it back must not keep us busy."""
_TRIAL = "import sched"
"""A module of the standard library that the zygote does not load beforehand."""
_UIDS = range(62_000, 64_000)
"""Users that programs of a host's root become; nobody else's, we hope."""
PYTHON = sys.executable
"""The interpreter that programs run in."""
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
_HEAD = 4096
"""Bytes kept of a conversation's beginning: what a zygote says of a failed lock-down."""
STDOUT_KEPT = 4096
"""Bytes kept of what a program that answers calls prints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One run of a program as the host saw it, before anything is concluded from it."""

    stream: bytes
    """Everything the program's process wrote to the result socket."""
    stdout: bytes = b""
    """All of standard output where there was a stdin, else the beginning of standard output and error."""
    exit: int | None
    """Status, or minus the signal that ended it; None when the zygote died, or was stopped, instead of reporting."""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    memory_mb: float = 0.0
    queued_seconds: float = 0.0
    """How long it was runnable without a processor; measured only when the wall time ran out."""
    ran_out_of_time: bool = False
    wrote_too_much: bool = False
    was_ended: bool = False
    """True: the host asked for it to be killed, so a SIGKILL in `exit` may be the host's."""

    @property
    def usage(self) -> Usage:
        return Usage(cpu_seconds=self.cpu_seconds, wall_seconds=self.wall_seconds, memory_mb=self.memory_mb)

    @property
    def shown_stdout(self) -> str:
        """The beginning of what was printed, for a report."""
        return self.stdout[:STDOUT_KEPT].decode("utf-8", errors="replace")


class WorkerDied(RuntimeError):
    """The zygote is gone although no program of ours ran."""


class Worker:
    """Owns one zygote process of a tier. Not for use by two threads at once; `run` brings a dead zygote back."""

    def __init__(self, tier: str, preload: Sequence[str] = ()) -> None:
        self.tier = tier
        self._preload = tuple(preload)
        self._packages = find_packages(preload)
        self._claim: socket.socket | None
        self._uid, self._claim = _claim_uid() if os.geteuid() == 0 else (os.getuid(), None)
        self._serial = 0
        self._is_running = False
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._control: socket.socket | None = None
        self._base = ""
        self._companion: Worker | None = None
        self.incarnation = 0
        try:
            self.isolation: Isolation = self._start()
        except BaseException:
            self.close()
            raise

    def companion(self) -> Worker:
        """Return the worker beside this one, for the tests of the program that runs here; both are ready then.

        Raises SandboxUnavailable when one cannot be started.
        """
        self._make_ready("strict")
        if self._companion is None:
            self._companion = Worker(self.tier, self._preload)
        self._companion._make_ready("strict")
        return self._companion

    def converse(self, body: bytes, limits: Limits, profile: str = "strict") -> Conversation:
        """Start one program whose job is `body` and speak with it frame by frame. Raises as `run` does."""
        self._make_ready(profile)
        ours, output = self._hand_over(limits, profile)
        conversation = Conversation(self, ours, output, limits)
        try:
            conversation.send(body)
        except BaseException:
            conversation.abandon()
            raise
        return conversation

    def run(self, body: bytes, limits: Limits, stdin: bytes | None = None, profile: str = "strict") -> Finished:
        """Run one program whose job is `body`; with `stdin` all of its standard output is collected.

        Raises WorkerDied when the zygote is gone before the program could start, SandboxUnavailable when it
        cannot be started again, or has no such profile.
        """
        self._make_ready(profile)
        return self._run(body, limits, stdin, profile)

    def _run(self, body: bytes, limits: Limits, stdin: bytes | None, profile: str) -> Finished:
        ours, stdout = self._hand_over(limits, profile, stdin)
        try:
            return self._attend(ours, stdout, struct.pack(">I", len(body)) + body, limits, stdin is not None)
        finally:
            ours.close()
            os.close(stdout)
            self._leave()

    def _make_ready(self, profile: str) -> None:
        if profile != "strict" and self.tier != "namespaces":
            raise SandboxUnavailable(
                f"profile {profile!r} is available in tier 'namespaces' only; this is {self.tier!r}"
            )
        if self._process is None or self._process.poll() is not None or self._is_running:
            self.restart()

    def _leave(self) -> None:
        """End what still runs here, because an exception came between it and its report: the next gets its own."""
        if self._is_running:
            self._stop()

    def _hand_over(self, limits: Limits, profile: str, stdin: bytes | None = None) -> tuple[socket.socket, int]:
        """Start one program and return our end of its result socket and of what it prints, neither blocking."""
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
            # A byte sent out of band would make poll say that there is something to read, and the read say no.
            result.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            self._serial += 1
            request = {"op": "run", "serial": self._serial, "limits": dataclasses.asdict(limits), "profile": profile}
            self._is_running = True
            try:
                self._ask(request, fds)
            except OSError as error:
                raise WorkerDied(f"the zygote does not listen: {error}") from error
            ours.pop_all()
        return result, output

    def _attend(self, ours: socket.socket, stdout: int, body: bytes, limits: Limits, is_stdio: bool) -> Finished:
        """Feed the job, collect what comes back, and see to it that the program ends."""
        start = time.monotonic()
        deadline = start + limits.wall_seconds
        collected = {ours.fileno(): bytearray(), stdout: bytearray()}
        open_fds = {ours.fileno(), stdout}
        # A program that answers calls is done when it has closed its result socket, whatever else it holds open.
        needed = set(open_fds) if is_stdio else {ours.fileno()}
        unsent = memoryview(body)
        unsent = unsent[_send_some(ours, unsent) :]
        budget = limits.output_kb << 10
        too_much = late = False
        poll = select.poll()
        for fd in open_fds:
            poll.register(fd, select.POLLIN | (select.POLLOUT if unsent and fd == ours.fileno() else 0))
        while open_fds & needed and not too_much and not late:
            for fd, events in poll.poll(max(0.0, deadline - time.monotonic()) * 1000 + 1):
                if events & select.POLLOUT:
                    unsent = unsent[_send_some(ours, unsent) :]
                    if not unsent:
                        poll.modify(fd, select.POLLIN)
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    part = _read_some(fd, budget + 1)
                    if part is None:
                        time.sleep(_PAUSE_SECONDS)
                        continue
                    if fd in needed:
                        collected[fd] += part
                        budget -= len(part)
                        too_much = budget < 0
                    else:
                        _keep(collected[fd], part)
                    if not part:
                        open_fds.discard(fd)
                        poll.unregister(fd)
            late = time.monotonic() >= deadline
        report, was_ended = self._report(at_once=too_much or late, deadline=deadline, waits=is_stdio)
        if not is_stdio:
            _keep(collected[stdout], _read_some(stdout, STDOUT_KEPT) or b"")
        return Finished(
            stream=bytes(collected[ours.fileno()]),
            stdout=bytes(collected[stdout]),
            exit=None if report is None else report["exit"],
            cpu_seconds=0.0 if report is None else report["cpu_seconds"],
            memory_mb=0.0 if report is None else report["memory_kb"] / 1024,
            queued_seconds=0.0 if report is None else report["queued_seconds"],
            wall_seconds=time.monotonic() - start,
            ran_out_of_time=time.monotonic() >= deadline and was_ended and not too_much,
            wrote_too_much=too_much,
            was_ended=was_ended,
        )

    def _report(self, *, at_once: bool, deadline: float, waits: bool) -> tuple[dict[str, Any] | None, bool]:
        """Return the zygote's report and whether the program had to be killed for it.

        No report: the zygote has died. One that is silent is stopped; a program that can do this to its zygote
        (tier `process`) is told the same, and where none can (the others) the machine is at fault: WorkerDied.
        """
        patience = 0.0 if at_once else max(0.0, deadline - time.monotonic()) if waits else _LINGER_SECONDS
        report = self._receive_report(patience)
        if report is not None:
            return report, False
        with contextlib.suppress(OSError):
            self._ask({"op": "kill", "serial": self._serial}, [])
        asked = time.monotonic()
        report = self._receive_report(_REPORT_SECONDS)
        if report is None:
            is_silent = time.monotonic() - asked >= _REPORT_SECONDS
            self._stop()
            if is_silent and self.tier != "process":
                raise WorkerDied(f"the zygote did not say within {_REPORT_SECONDS} s that its program was killed")
        return report, True

    def _receive_report(self, seconds: float) -> dict[str, Any] | None:
        """Return the report of the program that runs; one of a program before it is dropped."""
        deadline = time.monotonic() + seconds
        while (report := self._receive(max(0.0, deadline - time.monotonic()))) is not None:
            if report["serial"] == self._serial:
                self._is_running = False
                return report
        return None

    def _ask(self, request: dict[str, Any], fds: list[int]) -> None:
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

    def restart(self) -> None:
        """End the zygote, if it lives, and start another; SandboxUnavailable when that fails."""
        self._stop()
        if self._companion is not None:
            self._companion._stop()  # and started again when it is needed
        self.isolation = self._start()

    def close(self) -> None:
        """End the zygote and whatever it runs, for good; harmless when repeated."""
        self._is_closed = True
        self._stop()
        if self._claim is not None:
            self._claim.close()
        if self._companion is not None:
            self._companion.close()

    def forget(self) -> None:
        """In a forked copy of the host: drop the sockets, so that the zygote still notices its host's end."""
        if self._companion is not None:
            self._companion.forget()
        for sock in (self._control, self._claim):
            if sock is not None:
                sock.close()
        if self._process is not None:
            self._process.returncode = 0  # not our child here: nothing to wait for, nothing to warn of
        self._control = self._process = None
        self._base = ""

    def _start(self) -> Isolation:
        if self._is_closed:
            raise RuntimeError("a worker that was closed starts no more: make another")
        self.incarnation += 1
        self._base = tempfile.mkdtemp(prefix="coupled-sandbox-")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "tier": self.tier,
            "base": self._base,
            "uid": self._uid,
            "packages": self._packages,
            "preload": self._preload,
        }
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
        hello = self._receive(_START_SECONDS)
        if hello is None or "error" in hello:
            status = self._process.poll()
            self._stop()
            said = hello["error"] if hello else f"it said nothing within {_START_SECONDS} s, exit status {status}"
            raise SandboxUnavailable(f"tier {self.tier!r} could not start: {said}\nremedy: {remedy(self.tier, said)}")
        if self.tier == "namespaces":
            self._remove_base()  # nothing hangs on it any more, and nothing is left if we are killed
        self._try_out(hello)
        return _isolation(self.tier, hello)

    def _try_out(self, hello: dict[str, Any]) -> None:
        """Prove that a program is locked down and can import what the zygote has not loaded."""
        job = {"mode": "calls", "source": _TRIAL, "setup": "", "calls": []}
        try:
            # Not `run`, which would bring a zygote that dies at once back for ever.
            run = self._run(json.dumps(job).encode(), Limits(wall_seconds=_START_SECONDS), None, "strict")
        except WorkerDied as error:
            self._stop()
            raise SandboxUnavailable(
                f"tier {self.tier!r} could not start: {error}\nremedy: {remedy(self.tier, str(error))}"
            ) from error
        said = run.stream[:1].hex() + run.stream[5:].decode(errors="replace")
        if run.stream[:1] != bytes([LOCKED]) or json.loads(run.stream[5:] or b"0") != {"load": None}:
            self._stop()
            raise SandboxUnavailable(
                f"tier {self.tier!r}: a program must be locked down as uid {hello['uid']} and read the standard "
                f"library; the trial ({_TRIAL!r}) gave {said[-1500:]!r}, exit {run.exit}; {'; '.join(hello['notes'])}\n"
                f"remedy: as root grant CAP_SETUID and CAP_SETGID and use an interpreter everybody may read "
                f"(this one: {PYTHON}), or run as a normal user"
            )

    def _stop(self) -> None:
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

    def _remove_base(self) -> None:
        if self._base:
            shutil.rmtree(self._base, ignore_errors=True)
        self._base = ""


class Conversation:
    """A program that is spoken with while it runs. `finish` must be called, whatever happens.

    A frame is a 4-byte big-endian length and that many bytes. No wait outlasts the wall time of the limits.
    """

    def __init__(self, worker: Worker, ours: socket.socket, output: int, limits: Limits) -> None:
        self._worker = worker
        self._ours = ours
        self._output = output
        self._stdout = bytearray()
        self._start = time.monotonic()
        self._deadline = self._start + limits.wall_seconds
        self._budget = limits.output_kb << 10
        self._received = bytearray()
        self._head = b""
        self._wrote_too_much = False
        self._poll = select.poll()
        self._poll.register(output, select.POLLIN)

    def send(self, body: bytes) -> None:
        """Send one frame. A program that does not read it keeps us until its time is up, no longer."""
        unsent = memoryview(struct.pack(">I", len(body)) + body)
        self._poll.register(self._ours, select.POLLOUT)
        while unsent and time.monotonic() < self._deadline:
            unsent = unsent[_send_some(self._ours, unsent) :]
            if unsent:
                self._poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000 + 1)
                self._drain()

    def is_locked_down(self) -> bool:
        """Wait for the first byte: True when it says that no byte of the program was read before."""
        self._wait_for(1)
        first = bytes(self._received[:1])
        del self._received[:1]
        return first == bytes([LOCKED])

    def receive(self) -> bytes | None:
        """Return the next frame; None when none will come: it ended, its time is up, or it wrote too much."""
        if not self._wait_for(4):
            return None
        size = int.from_bytes(self._received[:4])
        # A frame announced beyond the budget cannot come: waiting for it would only cost time.
        self._wrote_too_much |= size > self._budget + len(self._received)
        if self._wrote_too_much or not self._wait_for(4 + size):
            return None
        frame = bytes(self._received[4 : 4 + size])
        del self._received[: 4 + size]
        return frame

    def finish(self) -> Finished:
        """Let the program end, or end it, and return how it went; `stream` has its first bytes only."""
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_WR)
        late = time.monotonic() >= self._deadline
        try:
            report, was_ended = self._worker._report(
                at_once=late or self._wrote_too_much, deadline=self._deadline, waits=False
            )
            self._drain()
        finally:
            self.abandon()
        return Finished(
            stream=self._head,
            stdout=bytes(self._stdout),
            exit=None if report is None else report["exit"],
            cpu_seconds=0.0 if report is None else report["cpu_seconds"],
            memory_mb=0.0 if report is None else report["memory_kb"] / 1024,
            queued_seconds=0.0 if report is None else report["queued_seconds"],
            wall_seconds=time.monotonic() - self._start,
            ran_out_of_time=late and was_ended and not self._wrote_too_much,
            wrote_too_much=self._wrote_too_much,
            was_ended=was_ended,
        )

    def abandon(self) -> None:
        """Let go of the program without asking how it went, and end it if it runs."""
        self._ours.close()
        os.close(self._output)
        self._worker._leave()

    def _wait_for(self, size: int) -> bool:
        """Read until `size` bytes are there; False when they will not come."""
        self._poll.register(self._ours, select.POLLIN)
        while len(self._received) < size:
            left = self._deadline - time.monotonic()
            if left <= 0 or self._wrote_too_much:
                return False
            ready = [fd for fd, _ in self._poll.poll(left * 1000 + 1)]
            if self._output in ready:
                self._drain()
            if self._ours.fileno() not in ready:
                continue
            part = _read_some(self._ours.fileno(), self._budget + 1)
            if part is None:
                time.sleep(_PAUSE_SECONDS)
                continue
            if not part:
                return False
            self._budget -= len(part)
            self._wrote_too_much = self._budget < 0
            self._received += part
            if len(self._head) < _HEAD:
                self._head = (self._head + part)[:_HEAD]
        return True

    def _drain(self) -> None:
        """Keep the beginning of what was printed and drop the rest: a full pipe would stop the program."""
        for _ in range(_NUM_DRAINED):
            part = _read_some(self._output, 1 << 16)
            if part is None:
                return
            if not part:
                # Closed at the other end: polling it again would return at once, for ever.
                with contextlib.suppress(KeyError):
                    self._poll.unregister(self._output)
                return
            _keep(self._stdout, part)


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


def _claim_uid() -> tuple[int, socket.socket]:
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


def _isolation(tier: str, hello: dict[str, Any]) -> Isolation:
    namespaces = hello["namespaces"]
    filesystem, processes = {
        "namespaces": (
            "private root (system libraries and the interpreter, read-only; an empty /tmp per program)",
            "own pid namespace",
        ),
        "landlock": ("host (system libraries and the interpreter can be read, nothing written)", "none can be started"),
        "process": (f"host (whatever uid {hello['uid']} may read)", "killed by the supervisor"),
    }[tier]
    return Isolation(
        tier=tier,
        user=f"uid {hello['uid']}",
        has_network=tier == "process" and "network" not in namespaces,
        filesystem=filesystem,
        processes=processes,
        has_own_ipc=tier == "landlock" or "ipc" in namespaces,
        has_filter=tier != "process",
        shown=tuple(hello["shown"]),
        notes=tuple(hello["notes"]),
    )


def _keep(kept: bytearray, part: bytes) -> None:
    kept += part[: STDOUT_KEPT - len(kept)]


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


def _send_some(sock: socket.socket, data: memoryview) -> int:
    if not data:
        return 0
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0
    except OSError:
        return len(data)  # the program is gone; its silence will be noticed


def _read_some(fd: int, most: int) -> bytes | None:
    """Return what there is, b"" at the end, None when there is nothing now: a program can take back what it wrote."""
    try:
        return os.read(fd, min(most, 1 << 20))
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:
        return b""
