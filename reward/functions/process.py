"""A reward function of the user in a process of its own: a hang can be ended, and a crash ends no other process.

The function is loaded once and keeps its state from call to call, until its process has to be started again. Its output
goes where this process prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from coupled.reward.functions.user import call_function, columns_of, load_function
from coupled.reward.types import RewardError, Task

PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from coupled.reward.functions.process import serve
serve(int(sys.argv[1]))
"""
"""The process finds modules where this one does."""
LOAD_SECONDS = 600.0
"""Limit for loading the user's file, which may load a model of its own."""
LEAVE_SECONDS = 5.0
"""Time that the process has to end by itself when it is closed."""


class FunctionProcess:
    """Calls `file.py:function` in another process. RewardError when it does not exist or its file fails to import."""

    def __init__(self, path: str, root: Path) -> None:
        self.label = path
        self._root = root
        self._start()

    def score(self, tasks: Sequence[Task], completions: Sequence[str], timeout_seconds: float) -> list[float | None]:
        """Return the user's score of each completion, checked.

        RewardError when the function raises, hangs, ends its process, or returns anything but one finite number or None
        for each. After the second and the third the next call starts it anew.
        """
        if self._is_over():
            self._end()
            self._start()
        offered = columns_of(tasks, completions)
        return self._answer(
            offered,
            timeout_seconds,
            f"a reward function must return within reward.timeout_seconds; {self.label} was still running after "
            f"{timeout_seconds} s on {len(completions)} completions: make it faster or raise the limit",
        )

    def close(self) -> None:
        """End the process; harmless when repeated."""
        self._end()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,  # stays open for as long as this process lives
                start_new_session=True,  # Ctrl-C is for this process, which then ends the other
            )
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._process, self._connection)
        self._answer(
            (self.label, str(self._root)),
            LOAD_SECONDS,
            f"the file of a reward function must load within {LOAD_SECONDS:.0f} s; {self.label} did not",
        )

    def _is_over(self) -> bool:
        return not self._end.alive or self._process.poll() is not None

    def _answer(self, message: Any, timeout_seconds: float, too_late: str) -> Any:
        try:
            self._connection.send(message)
            if not self._connection.poll(timeout_seconds):
                os.killpg(self._process.pid, signal.SIGKILL)
                self._end()
                raise RewardError(too_late)
            value, problem = self._connection.recv()
        except KeyboardInterrupt:  # the next call would read this call's answer
            self._end()
            raise
        except (EOFError, ConnectionError):
            self._end()
            status = self._process.returncode
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise RewardError(
                f"the reward function {self.label} ended its process with {how}; what it printed is above"
            ) from None
        if problem is not None:
            raise RewardError(problem)
        return value


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LEAVE_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # and the processes that it started
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(descriptor: int) -> None:
    """Main of the process: calls the function once for each message, until the connection closes."""
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    with Connection(descriptor) as connection:
        path, root = connection.recv()
        sys.path.append(str((Path(root) / path).expanduser().resolve().parent))  # modules beside the user's file
        try:
            function = load_function(path, Path(root))
        except RewardError as error:
            connection.send((None, str(error)))
            return
        connection.send((None, None))
        while True:
            try:
                offered = connection.recv()
            except EOFError:
                return
            scores, problem = None, None
            try:
                scores = call_function(function, offered)
            except RewardError as error:
                problem = str(error)
            except Exception as error:  # such as a signature that cannot be read
                problem = f"the reward function {path} cannot be called: {type(error).__name__}: {error}"
            connection.send((scores, problem))


def _end_with_the_other() -> None:
    """End this process when the one that started it, which holds standard input open, has ended."""
    os.read(0, 1)
    os._exit(1)
