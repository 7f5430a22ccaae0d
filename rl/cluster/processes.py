"""Workers in processes of this host: the coordinator's second real transport, for hosts without Ray.

A worker is a fresh interpreter at the other end of a socket pair. Two threads per worker keep the pipe moving, so that
a worker that is stopped in the middle of a message blocks no other.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from coupled.rl.cluster.transport import WorkerSpec
from coupled.rl.cluster.types import WorkerLost, WorkFailed

PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from coupled.rl.cluster.processes import serve
serve(int(sys.argv[1]))
"""
"""Program of a worker process, which finds modules on the paths of its driver."""


@dataclass(slots=True, eq=False)
class _Call:
    worker: _Process
    is_done: bool = False
    value: Any = None
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class _Process:
    process: subprocess.Popen[bytes]
    outbox: queue.SimpleQueue[Any]
    calls: dict[int, _Call] = field(default_factory=dict)
    is_lost: bool = False
    lock: Any = field(default_factory=threading.Lock)


class LocalTransport:
    """Processes on this host. Their output is written to `log`, or discarded."""

    def __init__(self, log: Path | None = None) -> None:
        self._log = log
        self._done: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._workers: list[_Process] = []
        self._num_calls = 0

    def spawn(self, spec: WorkerSpec, place: Any) -> Any:
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.enter_context(theirs)
            output: Any = subprocess.DEVNULL
            if self._log is not None:
                output = stack.enter_context(self._log.open("ab"))
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # only the driver receives Ctrl-C; it ends the workers when it stops
            )
        connection = Connection(ours.detach())
        worker = _Process(process, queue.SimpleQueue())
        worker.outbox.put((spec.make, spec.arguments))
        writer = threading.Thread(target=self._write, args=(worker, connection), daemon=True)
        writer.start()
        threading.Thread(target=self._read, args=(worker, connection, writer), daemon=True).start()
        self._workers.append(worker)
        return worker

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        call = _Call(worker)
        with worker.lock:
            if worker.is_lost:
                self._finish(call, error=WorkerLost("its process had ended"))
                return call
            self._num_calls += 1
            worker.calls[self._num_calls] = call
            worker.outbox.put((self._num_calls, method, arguments))
        return call

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        done = []
        with contextlib.suppress(queue.Empty):
            done.append(self._done.get(timeout=max(0.0, timeout)))
            while True:
                done.append(self._done.get_nowait())
        return done

    def result(self, call: Any) -> Any:
        if call.error is not None:
            raise call.error
        return call.value

    def kill(self, worker: Any) -> None:
        worker.process.kill()
        self._lose(worker)

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.outbox.put(None)
        self._workers = []

    def _write(self, worker: _Process, connection: Connection) -> None:
        while (message := worker.outbox.get()) is not None:
            try:
                connection.send(message)
            except OSError:  # the reader reports a process that is gone
                return
            except Exception as error:  # an argument that cannot be pickled is an error of the caller
                with worker.lock:
                    call = worker.calls.pop(message[0], None)
                if call is None:
                    raise
                self._finish(call, error=WorkFailed(error))

    def _read(self, worker: _Process, connection: Connection, writer: threading.Thread) -> None:
        with connection:
            while True:
                try:
                    number, value, error = connection.recv()
                except (EOFError, OSError):
                    break
                except Exception as problem:  # a reply that cannot be unpickled here
                    number, value, error = -1, None, problem
                with worker.lock:
                    call = worker.calls.pop(number, None)
                if call is not None:
                    self._finish(call, value, None if error is None else WorkFailed(error))
                elif error is not None:
                    break
            worker.process.kill()
            worker.process.wait()
            self._lose(worker)
            writer.join()  # before the connection is closed under it

    def _lose(self, worker: _Process) -> None:
        with worker.lock:
            worker.is_lost = True
            lost, worker.calls = list(worker.calls.values()), {}
        worker.outbox.put(None)
        for call in lost:
            self._finish(call, error=WorkerLost(f"its process ended (status {worker.process.poll()})"))

    def _finish(self, call: _Call, value: Any = None, error: Exception | None = None) -> None:
        call.is_done, call.value, call.error = True, value, error
        self._done.put(call)


class Target:
    """The worker's object, made on its first call, so that an error in making it is returned like any other."""

    def __init__(self, make: Any, arguments: tuple[Any, ...]) -> None:
        self._make, self._arguments = make, arguments
        self._object: Any = None

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object."""
        if self._object is None:
            self._object = self._make(*self._arguments)
        return getattr(self._object, method)(*arguments)


def serve(descriptor: int) -> None:
    """Main loop of a worker process: runs calls from the socket, one after the other, until it is closed."""
    with Connection(descriptor) as connection:
        target = Target(*connection.recv())
        while True:
            try:
                number, method, arguments = connection.recv()
            except EOFError:
                return
            value, problem = None, None
            try:
                value = target.call(method, *arguments)
            except Exception as error:  # boundary of a worker: any error is returned to the caller
                problem = error
            try:
                connection.send((number, value, problem))
            except (TypeError, ValueError, AttributeError) as error:  # send a description of what cannot be sent
                connection.send((number, None, RuntimeError(f"{problem or value!r:.300} cannot be sent: {error}")))
