"""Conclusions from a run as the host saw it. Pure; of all that a program writes only its values count."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from coupled.sandbox.conversation import LOCKED, Finished
from coupled.sandbox.jail import codec
from coupled.sandbox.types import CallResult, Job, Limits, Outcome, Raised

MAX_RUN_PARTS = 4_000_000
"""Brackets and commas in all replies of one run: a few hundred MiB of values at the worst."""
_MAX_COMPARED = codec.MAX_DOCUMENT + 1024
"""Bytes of a reply that comes as its digest when it is larger: a document, or the texts of an exception as JSON."""
_CPU_TOLERANCE = 0.5
"""The kernel enforces the limit by counting ticks: on a busy machine a program was killed at 87 % of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The result of one run of a program."""

    outcome: Outcome
    results: tuple[CallResult, ...] = ()
    detail: str = ""


class Breach(ValueError):
    """A program wrote something other than the requested replies."""


class Budget:
    """The number of values that all replies of one run may hold: a value takes up to thirty times its text."""

    def __init__(self) -> None:
        self._left = MAX_RUN_PARTS

    def take(self, frame: bytes) -> None:
        """Count a frame before it is parsed. Raises Breach when the run has had its share."""
        self._left -= codec.num_parts(frame)
        if self._left < 0:
            raise Breach("the replies together have too many values")


def encode_job(job: Job) -> bytes:
    """Return the bytes that the program's process reads: source, setup and the inputs of every call."""
    calls = [
        [
            call.function,
            codec.encode_tree(call.args),
            codec.encode_tree(dict(call.kwargs)),
            call.may_digest,
            call.keep_floats,
            call.items,
        ]
        for call in job.calls
    ]
    mode = "stdio" if job.stdin_cases else "calls"
    return json.dumps({"mode": mode, "source": job.source, "setup": job.setup, "calls": calls}).encode()


def read_calls(run: Finished, job: Job) -> Reading:
    """Conclude from a run in `calls` mode. A reply counts when it is well formed and the next one due."""
    if not run.stream or run.stream[0] != LOCKED:
        return not_started(run)
    try:
        frames = _frames(run.stream)
        load = next(frames, None)
        if load is None:
            return Reading(outcome=silence(run, job.limits), detail="ended while it was loaded")
        failure = load_failure(load)
        if failure is not None:
            if next(frames, None) is not None:
                raise Breach("a frame after the program failed to load")
            return Reading(outcome=Outcome.LOAD_ERROR, detail=f"{failure.type}: {failure.text}")
        budget = Budget()
        results = tuple(_reply(frame, index, job, budget) for index, frame in enumerate(frames))
    except (Breach, codec.CodecError) as error:
        return Reading(outcome=Outcome.PROTOCOL, detail=str(error))
    if len(results) == len(job.calls):
        return Reading(outcome=Outcome.OK, results=results)
    return Reading(
        outcome=silence(run, job.limits), results=results, detail=f"answered {len(results)} calls, {_end(run)}"
    )


def read_stdio(run: Finished, job: Job) -> Reading:
    """Conclude from one run in stdin mode: its standard output counts when it ended with status 0."""
    if not run.stream or run.stream[0] != LOCKED:
        return not_started(run)
    if len(run.stream) > 1:
        return Reading(outcome=Outcome.PROTOCOL, detail="wrote to a descriptor that is not its own")
    if run.exit == 0 and not run.was_ended:
        text = run.stdout.decode("utf-8", errors="replace")
        return Reading(outcome=Outcome.OK, results=(CallResult(value=text),))
    outcome = silence(run, job.limits)
    return Reading(outcome=Outcome.CRASH if outcome is Outcome.INCOMPLETE else outcome, detail=f"exit {run.exit}")


def not_started(run: Finished) -> Reading:
    """Return what it means that the first byte did not come: the sandbox is at fault, not the program."""
    text = run.stream.decode("utf-8", errors="replace")[-2000:]
    return Reading(outcome=Outcome.SANDBOX_ERROR, detail=f"not locked down, exit {run.exit}: {text}")


def silence(run: Finished, limits: Limits) -> Outcome:
    """Return why a program stopped replying. It had started, so nothing here is the sandbox's fault."""
    if run.wrote_too_much:
        return Outcome.OUTPUT_LIMIT
    if run.ran_out_of_time:
        # Its threads can make its first one wait, for as long as they run. The zygote subtracts that, so that only a
        # busy machine can cause the rest.
        is_overloaded = run.queued_seconds > limits.wall_seconds / 2
        return Outcome.OVERLOADED if is_overloaded else Outcome.TIMEOUT
    if run.exit is None:
        return Outcome.VIOLATION
    if run.exit >= 0:
        return Outcome.INCOMPLETE
    if run.exit != -signal.SIGKILL:
        return Outcome.VIOLATION if run.exit == -signal.SIGSYS else Outcome.CRASH
    # Decided by the time and not by the sender of the signal: the host may have signalled a program just killed.
    if run.cpu_seconds >= limits.cpu_seconds * _CPU_TOLERANCE:
        return Outcome.TIMEOUT
    return Outcome.INCOMPLETE if run.was_ended else Outcome.KILLED


def _end(run: Finished) -> str:
    if run.exit is None:
        return "its zygote went with it"
    return f"signal {-run.exit}" if run.exit < 0 else f"exit {run.exit}"


def _frames(stream: bytes) -> Iterator[bytes]:
    """Yield the whole frames after the first byte; one cut short at the end is a reply that never came."""
    start = 1
    while start + 4 <= len(stream):
        end = start + 4 + int.from_bytes(stream[start : start + 4])
        if end > len(stream):
            return
        yield stream[start + 4 : end]
        start = end


def load_failure(frame: bytes) -> Raised | None:
    """Return why the program did not load, None when it did; Breach when the frame is about something else."""
    tree = codec.parse(frame)
    if type(tree) is not dict or list(tree) != ["load"]:
        raise Breach("the first frame is not about loading")
    return None if tree["load"] is None else _raised(tree["load"])


def _reply(frame: bytes, index: int, job: Job, budget: Budget) -> CallResult:
    if index >= len(job.calls):
        raise Breach(f"more than {len(job.calls)} replies")
    call = job.calls[index]
    if call.may_digest and not call.keep_floats and len(frame) > _MAX_COMPARED:
        raise Breach("a digest was due for a value this large")
    budget.take(frame)
    tree = codec.parse(frame)
    if type(tree) is not dict or list(tree) not in (["n", "v"], ["n", "x"], ["n", "d"]):
        raise Breach("a reply has a number and a value, a digest or an exception")
    if type(tree["n"]) is not int or tree["n"] != index:
        raise Breach(f"reply {index} was due")
    if "x" in tree:
        return CallResult(raised=_raised(tree["x"]))
    if "d" in tree:
        if not call.may_digest or type(tree["d"]) is not str or len(tree["d"]) != 64:
            raise Breach("a digest was not requested, or is none")
        return CallResult(value=codec.Digest(tree["d"]))
    return CallResult(value=codec.decode_tree(tree["v"]))


def _raised(tree: object) -> Raised:
    if type(tree) is not list or len(tree) != 2 or any(type(part) is not str for part in tree):
        raise Breach("an exception is a type and a text")
    return Raised(type=tree[0][:500], text=tree[1][:500])
