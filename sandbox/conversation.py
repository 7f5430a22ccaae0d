"""One program seen from the host: sends it what it reads, collects what it writes, and notes how it ended.

`run_program` hands over a whole job and waits for the end. A `Conversation` exchanges frames while the program runs.
Neither waits longer than the wall time of the program's limits.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from dataclasses import dataclass

from coupled.sandbox.types import Limits, Usage
from coupled.sandbox.zygote_process import ProgramEnd, ZygoteProcess

LOCKED = 0x55
"""First byte on the result socket: the lock-down is done and no byte of the program has been read."""
STDOUT_KEPT = 4096
"""Bytes kept of what a program that answers calls prints."""
_NUM_DRAINED = 16
"""Parts of a full pipe dropped at once: a program that fills it as fast must not keep the host from the clock."""
_PAUSE_SECONDS = 0.001
"""After a read that found nothing although there was something: a program that takes it back must not keep the host
busy."""
_HEAD = 4096
"""Bytes kept of a conversation's beginning: the zygote's account of a failed lock-down."""


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
    """Time for which it was runnable without a processor; measured only when the wall time ran out."""
    ran_out_of_time: bool = False
    wrote_too_much: bool = False
    was_ended: bool = False
    """True: the host ordered the kill, so a SIGKILL in `exit` may be the host's."""

    @property
    def usage(self) -> Usage:
        return Usage(cpu_seconds=self.cpu_seconds, wall_seconds=self.wall_seconds, memory_mb=self.memory_mb)

    @property
    def shown_stdout(self) -> str:
        """The beginning of what was printed, for a report."""
        return self.stdout[:STDOUT_KEPT].decode("utf-8", errors="replace")


def run_program(zygote: ZygoteProcess, body: bytes, limits: Limits, stdin: bytes | None, profile: str) -> Finished:
    """Run one program whose job is `body`; with `stdin` all of its standard output is collected.

    Raises WorkerDied when the zygote is gone before the program could start.
    """
    ours, stdout = zygote.start_program(limits, profile, stdin)
    try:
        return _attend(zygote, ours, stdout, struct.pack(">I", len(body)) + body, limits, stdin is not None)
    finally:
        ours.close()
        os.close(stdout)
        zygote.leave()


def _attend(
    zygote: ZygoteProcess, ours: socket.socket, stdout: int, body: bytes, limits: Limits, is_stdio: bool
) -> Finished:
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
    end = zygote.report(at_once=too_much or late, deadline=deadline, waits=is_stdio)
    if not is_stdio:
        _keep(collected[stdout], _read_some(stdout, STDOUT_KEPT) or b"")
    return _finished(
        end,
        stream=bytes(collected[ours.fileno()]),
        stdout=bytes(collected[stdout]),
        wall_seconds=time.monotonic() - start,
        is_late=time.monotonic() >= deadline,
        wrote_too_much=too_much,
    )


class Conversation:
    """The exchange of frames with a program while it runs. `finish` must be called, whatever happens.

    A frame is a 4-byte big-endian length and that many bytes. No wait outlasts the wall time of the limits.
    """

    def __init__(self, zygote: ZygoteProcess, ours: socket.socket, output: int, limits: Limits) -> None:
        self._zygote = zygote
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
        """Send one frame. A program that does not read it keeps the host until its time is up, no longer."""
        unsent = memoryview(struct.pack(">I", len(body)) + body)
        self._poll.register(self._ours, select.POLLOUT)
        while unsent and time.monotonic() < self._deadline:
            unsent = unsent[_send_some(self._ours, unsent) :]
            if unsent:
                self._poll.poll(max(0.0, self._deadline - time.monotonic()) * 1000 + 1)
                self._drain()

    def is_locked_down(self) -> bool:
        """Wait for the first byte: True when it confirms that no byte of the program was read before."""
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
            end = self._zygote.report(at_once=late or self._wrote_too_much, deadline=self._deadline, waits=False)
            self._drain()
        finally:
            self.abandon()
        return _finished(
            end,
            stream=self._head,
            stdout=bytes(self._stdout),
            wall_seconds=time.monotonic() - self._start,
            is_late=late,
            wrote_too_much=self._wrote_too_much,
        )

    def abandon(self) -> None:
        """Close the connection without waiting for the report, and end the program if it runs."""
        self._ours.close()
        os.close(self._output)
        self._zygote.leave()

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
                # Closed at the other end: polling it again would always return at once.
                with contextlib.suppress(KeyError):
                    self._poll.unregister(self._output)
                return
            _keep(self._stdout, part)


def _finished(
    end: ProgramEnd, *, stream: bytes, stdout: bytes, wall_seconds: float, is_late: bool, wrote_too_much: bool
) -> Finished:
    return Finished(
        stream=stream,
        stdout=stdout,
        exit=end.exit,
        cpu_seconds=end.cpu_seconds,
        wall_seconds=wall_seconds,
        memory_mb=end.memory_mb,
        queued_seconds=end.queued_seconds,
        ran_out_of_time=is_late and end.was_killed and not wrote_too_much,
        wrote_too_much=wrote_too_much,
        was_ended=end.was_killed,
    )


def _keep(kept: bytearray, part: bytes) -> None:
    kept += part[: STDOUT_KEPT - len(kept)]


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
