"""From what the host saw of a run to an `Execution`. Pure; nothing the program says counts but its values."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from coupled.sandbox import codec
from coupled.sandbox.types import CallResult, Job, Outcome, Raised
from coupled.sandbox.worker import LOCKED, Finished

_CPU_TOLERANCE = 0.5
"""The kernel enforces the limit by counting ticks: on a busy machine a program was killed at 87 % of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one run of a program comes to."""

    outcome: Outcome
    results: tuple[CallResult, ...] = ()
    detail: str = ""


class _Breach(ValueError):
    """The stream is not the sequence of frames that was asked for."""


def encode_job(job: Job) -> bytes:
    """Return the bytes that the program's process reads: source, setup and the inputs of every call."""
    calls = [
        [call.function, codec.parse(codec.encode(call.args)), codec.parse(codec.encode(dict(call.kwargs)))]
        for call in job.calls
    ]
    mode = "stdio" if job.stdin_cases else "calls"
    return json.dumps({"mode": mode, "source": job.source, "setup": job.setup, "calls": calls}).encode()


def read_calls(run: Finished, job: Job) -> Reading:
    """Conclude from a run in `calls` mode. A reply counts when it is well formed and the next one due."""
    if not run.stream or run.stream[0] != LOCKED:
        return _not_started(run)
    try:
        frames = _frames(run.stream[1:])
        load = next(frames, None)
        if load is None:
            return Reading(outcome=_silence(run, job), detail="ended while it was loaded")
        failure = _load_failure(load)
        if failure is not None:
            if next(frames, None) is not None:
                raise _Breach("a frame after the program failed to load")
            return Reading(outcome=Outcome.LOAD_ERROR, detail=f"{failure.type}: {failure.text}")
        results = tuple(_reply(frame, index, job) for index, frame in enumerate(frames))
    except (_Breach, codec.CodecError) as error:
        return Reading(outcome=Outcome.PROTOCOL, detail=str(error))
    if len(results) == len(job.calls):
        return Reading(outcome=Outcome.OK, results=results)
    return Reading(outcome=_silence(run, job), results=results, detail=f"answered {len(results)} calls")


def read_stdio(run: Finished, job: Job) -> Reading:
    """Conclude from one run in stdin mode: its standard output counts when it ended with status 0."""
    if not run.stream or run.stream[0] != LOCKED:
        return _not_started(run)
    if len(run.stream) > 1:
        return Reading(outcome=Outcome.PROTOCOL, detail="wrote to a descriptor that is not its own")
    if run.exit == 0 and not run.was_ended:
        text = run.stdout.decode("utf-8", errors="replace")
        return Reading(outcome=Outcome.OK, results=(CallResult(value=text),))
    outcome = _silence(run, job)
    return Reading(outcome=Outcome.CRASH if outcome is Outcome.INCOMPLETE else outcome, detail=f"exit {run.exit}")


def _not_started(run: Finished) -> Reading:
    said = run.stream.decode("utf-8", errors="replace")[-2000:]
    return Reading(outcome=Outcome.SANDBOX_ERROR, detail=f"not locked down, exit {run.exit}: {said}")


def _silence(run: Finished, job: Job) -> Outcome:
    """Return why a program stopped replying. It had started, so nothing here is the sandbox's fault."""
    if run.wrote_too_much:
        return Outcome.OUTPUT_LIMIT
    if run.ran_out_of_time:
        # A single locked-down process cannot make itself wait for a processor: only a busy machine can.
        is_overloaded = run.queued_seconds > job.limits.wall_seconds / 2
        return Outcome.OVERLOADED if is_overloaded else Outcome.TIMEOUT
    if run.exit is None:
        return Outcome.VIOLATION
    if run.exit >= 0:
        return Outcome.INCOMPLETE
    if run.exit != -signal.SIGKILL:
        return Outcome.VIOLATION if run.exit == -signal.SIGSYS else Outcome.CRASH
    # Asked of the time and not of who sent the signal: the host may have sent one to a program just killed.
    if run.cpu_seconds >= job.limits.cpu_seconds * _CPU_TOLERANCE:
        return Outcome.TIMEOUT
    return Outcome.INCOMPLETE if run.was_ended else Outcome.KILLED


def _frames(stream: bytes) -> Iterator[bytes]:
    """Yield the whole frames; one cut short at the end is a reply that never came."""
    start = 0
    while start + 4 <= len(stream):
        end = start + 4 + int.from_bytes(stream[start : start + 4])
        if end > len(stream):
            return
        yield stream[start + 4 : end]
        start = end


def _load_failure(frame: bytes) -> Raised | None:
    tree = codec.parse(frame)
    if type(tree) is not dict or list(tree) != ["load"]:
        raise _Breach("the first frame is not about loading")
    return None if tree["load"] is None else _raised(tree["load"])


def _reply(frame: bytes, index: int, job: Job) -> CallResult:
    tree = codec.parse(frame)
    if index >= len(job.calls):
        raise _Breach(f"more than {len(job.calls)} replies")
    if type(tree) is not dict or list(tree) not in (["n", "v"], ["n", "x"]):
        raise _Breach("a reply has a number and either a value or an exception")
    if type(tree["n"]) is not int or tree["n"] != index:
        raise _Breach(f"reply {index} was due")
    if "x" in tree:
        return CallResult(raised=_raised(tree["x"]))
    return CallResult(value=codec.decode_tree(tree["v"]))


def _raised(tree: object) -> Raised:
    if type(tree) is not list or len(tree) != 2 or any(type(part) is not str for part in tree):
        raise _Breach("an exception is a type and a text")
    return Raised(type=tree[0][:500], text=tree[1][:500])
