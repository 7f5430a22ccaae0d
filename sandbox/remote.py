"""Tier `remote`: programs run on a server with SandboxFusion's HTTP interface; values come back.

A request carries one program. For calls that is a runner (`jail/remote_runner.py` with `codec.py` and `child.py`): it
limits its own processor time and memory, loads the program and prints one reply per call behind a marker drawn
for that request. For stdin it is the same runner around the program as `__main__`. The comparison stays on this
host, so nothing the program prints can be better than the right answer.

What the tier covers is what the server covers. Ours: the expected values never leave the host; limits of
processor time and memory; seeds; a server that answers wrongly is detected by canaries. **Not** ours: file
system, network, other programs and the kernel of the server, whose default configuration isolates nothing. The
runner shares a process with the program, which can therefore read the marker and write replies itself (the best
of them is the right answer), and can read the inputs of calls still to come. A program that can harm the server
can make requests fail, and such failures count as infrastructure; wall time lost to a busy server counts as the
program's, because only the server could distinguish it.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import math
import re
import secrets
import signal
import struct
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from coupled.sandbox.conversation import LOCKED, Finished
from coupled.sandbox.executor import run_job
from coupled.sandbox.pool import REMOTE, Pool
from coupled.sandbox.types import Call, Execution, Isolation, Job, Limits, Outcome, SandboxUnavailable
from coupled.sandbox.worker import Worker
from coupled.sandbox.zygote_process import WorkerDied

_JAIL = Path(__file__).parent / "jail"
_BACKOFF_SECONDS = 0.5
"""Before a request is sent again; doubled each time."""
_GRACE_SECONDS = 30.0
"""Time for a program's answer beyond its wall limit: the server starts an interpreter and queues."""
_MAX_ANSWER = 64 << 20
_REMEDY = (
    "remedy: sandbox.url is the base address of a SandboxFusion server, such as http://localhost:8080, that this host "
    "can reach; start one from its container image, or choose another sandbox.tier"
)
_TRIAL = "import platform\ndef probe(x): return [platform.python_version(), x * 7]"
_TRIAL_STDIN = "print(int(input()) * 7)"


class _NoAnswer(Exception):
    """The server did not run the program, or did not report the result."""


class _TooMuch(Exception):
    """The answer is larger than any that is read, which only the program's output can bring about."""


class RemoteExecutor(Pool["_Connection"]):
    """Runs programs on a SandboxFusion-compatible server, `num_workers` at a time. A context manager.

    May be used by several threads. Raises SandboxUnavailable when there is no such server at `url`, ValueError
    for an address that is none.
    """

    def __init__(self, url: str, *, num_workers: int = 1) -> None:
        super().__init__(num_workers, lambda: _Connection(url), _run_job)
        self._isolation = _isolation(url, self._try_out(url))

    def isolation(self) -> Isolation:
        """Return what is known to hold: next to nothing, since the server does not report how it isolates."""
        return self._isolation

    def _try_out(self, url: str) -> str:
        """Prove that calls and stdin work there; return the version of its Python."""
        calls = Job(uid="trial", source=_TRIAL, calls=(Call(function="probe", args=(6,)),))
        stdin = Job(uid="trial", source=_TRIAL_STDIN, stdin_cases=("6\n",))
        values: list[Any] = []
        for job in (calls, stdin):
            execution = _run_job(self._workers[0], job)
            values += [result.value for result in execution.results] or [None]
            is_right = values[-1] == "42\n" if job is stdin else type(values[0]) is list and values[0][1:] == [42]
            if execution.outcome is not Outcome.OK or not is_right:
                self.close()
                raise SandboxUnavailable(
                    f"a SandboxFusion server must run a trial program; {url} gave {execution.outcome}, "
                    f"{values[-1]!r}: {execution.detail}\n{_REMEDY}"
                )
        return str(values[0][0])[:40]


class _Connection:
    """One connection, kept open between requests. Stands in for a local `Worker`: `run_job` drives either."""

    tier = REMOTE
    incarnation = 0
    """A server is not ours to restart: it stays the same one."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"an address is http://HOST[:PORT][/PATH] or https://...; received {url!r}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._http = kind(parts.hostname, parts.port, timeout=_GRACE_SECONDS)
        self._path = parts.path.rstrip("/").removesuffix("/run_code") + "/run_code"
        self._num_failures = 0

    def run(self, body: bytes, limits: Limits, stdin: bytes | None = None, profile: str = "strict") -> Finished:
        """Run one program whose job is `body`; what a profile forbids is the server's to forbid.

        Raises WorkerDied when the server does not report the result.
        """
        marker = secrets.token_hex(16)
        program = runner(body.decode(), limits, marker, has_stdin=stdin is not None)
        request = {
            "code": program,
            "language": "python",
            "run_timeout": limits.wall_seconds,
            "compile_timeout": limits.wall_seconds,
        }
        if stdin is not None:
            request["stdin"] = stdin.decode("utf-8", errors="replace")
        start = time.monotonic()
        try:
            answer = self._post(json.dumps(request).encode(), limits.wall_seconds + _GRACE_SECONDS)
            finished = _finished(answer, marker, limits, has_stdin=stdin is not None)
        except _TooMuch:
            # The program's doing, so its outcome: as infrastructure it would be a way out of a bad reward.
            self._http.close()
            killed = -signal.SIGKILL
            finished = Finished(stream=bytes([LOCKED]), exit=killed, was_ended=True, wrote_too_much=True)
        except _NoAnswer as error:
            self._num_failures += 1
            raise WorkerDied(str(error)) from error
        self._num_failures = 0
        return dataclasses.replace(finished, wall_seconds=finished.wall_seconds or time.monotonic() - start)

    def restart(self) -> None:
        """Before another try: drop the connection and wait, longer after each failure in a row."""
        self.close()
        time.sleep(_BACKOFF_SECONDS * 2 ** min(max(self._num_failures - 1, 0), 4))

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._http.close()

    def _post(self, body: bytes, seconds: float) -> Mapping[str, Any]:
        is_reused = self._http.sock is not None
        try:
            status, data = self._exchange(body, seconds)
        except (ConnectionError, http.client.BadStatusLine) as error:
            self._http.close()
            if not is_reused:
                raise _NoAnswer(f"no answer from {self._address}: {error!r}") from error
            # The server may close a connection that was idle: that is no failure yet.
            try:
                status, data = self._exchange(body, seconds)
            except (OSError, http.client.HTTPException) as again:
                self._http.close()
                raise _NoAnswer(f"no answer from {self._address}: {again!r}") from again
        except (OSError, http.client.HTTPException) as error:
            self._http.close()
            raise _NoAnswer(f"no answer from {self._address}: {error!r}") from error
        if status != 200:
            raise _NoAnswer(f"POST {self._address} gave status {status}: {data[:200]!r}")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _NoAnswer(f"POST {self._address} gave no JSON: {data[:200]!r}") from error
        if not isinstance(answer, dict) or answer.get("status") not in ("Success", "Failed", "SandboxError"):
            raise _NoAnswer(f"POST {self._address} gave no answer of SandboxFusion's: {data[:200]!r}")
        return answer

    def _exchange(self, body: bytes, seconds: float) -> tuple[int, bytes]:
        self._http.timeout = seconds
        if self._http.sock is not None:
            self._http.sock.settimeout(seconds)
        self._http.request("POST", self._path, body, {"Content-Type": "application/json"})
        answer = self._http.getresponse()
        data = answer.read(_MAX_ANSWER + 1)
        if len(data) > _MAX_ANSWER and answer.status == 200:
            raise _TooMuch
        return answer.status, data

    @property
    def _address(self) -> str:
        return f"{self._http.host}:{self._http.port}{self._path}"


def _run_job(connection: _Connection, job: Job) -> Execution:
    return run_job(cast(Worker, connection), job)


def runner(job: str, limits: Limits, marker: str, *, has_stdin: bool) -> str:
    """Return the program that a request carries: the runner, what it loads, the job and its limits."""
    given = {
        "marker": marker,
        "has_stdin": has_stdin,
        "job": job,
        "cpu_seconds": limits.cpu_seconds,
        "memory_mb": limits.memory_mb,
        "file_kb": limits.file_kb,
        "sources": {name: (_JAIL / f"{name}.py").read_text("utf-8") for name in ("codec", "child")},
    }
    code = (_JAIL / "remote_runner.py").read_text("utf-8")
    return code.replace("GIVEN: Any = None", f"GIVEN: Any = {given!a}", 1)


def _finished(answer: Mapping[str, Any], marker: str, limits: Limits, *, has_stdin: bool) -> Finished:
    """Translate the answer of the server to a local run; _NoAnswer when it did not run the program."""
    result = answer.get("run_result")
    if answer["status"] == "SandboxError" or not isinstance(result, dict) or result.get("status") == "Error":
        raise _NoAnswer(f"the server could not run the program: {str(answer.get('message'))[:300]}")
    stdout, stderr = (str(result.get(name) or "") for name in ("stdout", "stderr"))
    is_late = result.get("status") == "TimeLimitExceeded"
    budget = limits.output_kb << 10
    is_too_much = len(stdout) > budget
    stdout, stderr = stdout[:budget], stderr[:budget]
    channel, printed = (stderr, stdout) if has_stdin else (stdout, stderr)
    stream = _stream(channel, marker)
    if not stream:
        raise _NoAnswer(f"the runner did not start: {(stderr or stdout)[-300:]!r}")
    exit_status = _exit_status(result.get("return_code"))
    is_out_of_time = exit_status == -signal.SIGXCPU
    seconds = result.get("execution_time")
    is_seconds = isinstance(seconds, int | float) and math.isfinite(seconds) and seconds >= 0
    return Finished(
        stream=stream,
        stdout=printed.encode("utf-8", errors="replace"),
        exit=-signal.SIGKILL if is_out_of_time or is_late else exit_status,
        cpu_seconds=float(limits.cpu_seconds) if is_out_of_time else 0.0,
        wall_seconds=float(seconds) if is_seconds and seconds is not None else 0.0,
        ran_out_of_time=is_late,
        was_ended=is_late or is_too_much,
        wrote_too_much=is_too_much,
    )


def _stream(channel: str, marker: str) -> bytes:
    """Return the byte LOCKED and the frames as a local program would have written them; empty: it never began."""
    lines = [
        line[len(marker) + 1 :] for line in re.findall(r"[^\n]*\n|[^\n]+", channel) if line.startswith(f"{marker} ")
    ]
    if not lines or lines[0].rstrip("\n") != chr(LOCKED):
        return b""
    # A line without an end was cut short: a reply that never came.
    frames = [line[:-1].encode("utf-8", errors="replace") for line in lines[1:] if line.endswith("\n")]
    return bytes([LOCKED]) + b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


def _exit_status(code: object) -> int:
    """Return the status, or minus a signal; a shell in between reports 128 + signal."""
    if not isinstance(code, int):
        return 1
    return 128 - code if 128 < code < 128 + signal.NSIG else code


def _isolation(url: str, version: str) -> Isolation:
    return Isolation(
        tier=REMOTE,
        user="as the server chooses",
        has_network=True,
        filesystem="the server's",
        processes="ended by the server",
        has_filter=False,
        notes=(
            f"{url} runs programs with Python {version}, isolated as its operator configured it",
            "a program shares its process with the runner: it can read the inputs of all calls, never an answer",
        ),
    )
