"""Tests that are a program of their own, run beside the program they test. The host carries every frame between.

In a second sandbox (`relay`) the tests call the program through the host: only their own frames report what passed,
and no byte of the program reaches their process but as a value of the codec. In process (`attend`) the program
shares the interpreter with its tests and can forge their reports; the caller labels that as weak.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from coupled.sandbox.conversation import Conversation, Finished
from coupled.sandbox.jail import codec
from coupled.sandbox.outcome import Breach, Budget, Reading, load_failure, not_started, silence
from coupled.sandbox.types import CallResult, Job, Outcome, TestProgram, Usage
from coupled.sandbox.worker import Worker


class _Over(Exception):
    """The conversation came to its end."""

    def __init__(self, outcome: Outcome | None, detail: str = "") -> None:
        super().__init__(detail)
        self.outcome = outcome
        """None: the end of the program, or of its tests, decides."""
        self.detail = detail
        self.is_tests_end = False


def run_tests(worker: Worker, job: Job) -> tuple[Reading, Usage, str]:
    """Run the tests of a job on its program; the text is the beginning of what the program printed.

    Raises WorkerDied and SandboxUnavailable as `Worker.run` does.
    """
    assert job.tests is not None
    mode = "script" if job.tests.is_in_process else "serve"
    body = {"mode": mode, "source": job.source, "setup": job.setup, "classes": job.tests.classes}
    # Before the program: starting a worker takes longer than many a program may run.
    companion = None if job.tests.is_in_process else worker.companion()
    talks = [worker.converse(json.dumps(body).encode(), job.limits, job.profile)]
    results: list[CallResult] = []
    try:
        try:
            _expect_loaded(talks[0])
            if companion is not None:
                talks.append(companion.converse(_tests_body(job.tests, "tests"), job.limits))
                if not talks[1].is_locked_down():
                    raise _Over(Outcome.SANDBOX_ERROR, "the tests were not locked down")
                _relay(talks[0], talks[1], job.tests, results)
            else:
                talks[0].send(_tests_body(job.tests, "script"))
                _attend(talks[0], job.tests, results)
        except (Breach, codec.CodecError) as error:
            raise _Over(Outcome.PROTOCOL, str(error)) from None
        over = _Over(Outcome.OK)
    except _Over as end:
        over = end
    finally:
        ends: list[Finished] = []
        try:
            ends.append(talks[0].finish())
        finally:
            ends += [talk.finish() for talk in talks[1:]]
    outcome = over.outcome
    if outcome is None:
        outcome = silence(_without_each_other(ends)[-1 if over.is_tests_end else 0], job.limits)
    elif outcome is Outcome.SANDBOX_ERROR:
        return not_started(ends[-1]), _usage(ends), ""
    if outcome in (Outcome.PROTOCOL, Outcome.LOAD_ERROR):
        results = []
    return Reading(outcome=outcome, results=tuple(results), detail=over.detail), _usage(ends), ends[0].shown_stdout


def _tests_body(tests: TestProgram, mode: str) -> bytes:
    job = {"mode": mode, "source": tests.source, "parts": tests.parts, "names": tests.names, "classes": tests.classes}
    return json.dumps(job).encode()


def _expect_loaded(program: Conversation) -> None:
    if not program.is_locked_down():
        raise _Over(Outcome.SANDBOX_ERROR)
    frame = program.receive()
    if frame is None:
        raise _Over(None, "ended while it was loaded")
    failure = load_failure(frame)
    if failure is not None:
        raise _Over(Outcome.LOAD_ERROR, f"{failure.type}: {failure.text}")


def _relay(program: Conversation, tests: Conversation, spec: TestProgram, results: list[CallResult]) -> None:
    """Carry calls to the program and replies back until the tests report their end."""
    while True:
        frame = tests.receive()
        if frame is None:
            over = _Over(None, f"the tests ended after {len(results)} of {len(spec.parts)} parts")
            over.is_tests_end = True
            raise over
        message = json.loads(frame)  # the tests are ours
        if "end" in message:
            _fill(results, len(spec.parts))
            return
        if "part" in message:
            _fill(results, message["part"])
            results.append(CallResult(value=message["ok"] is True))
            continue
        program.send(frame)
        reply = program.receive()
        if reply is None:
            raise _Over(None, f"did not answer during part {len(results)}")
        tests.send(json.dumps(_checked_reply(reply, spec)).encode())


def _fill(results: list[CallResult], upto: int) -> None:
    """Mark the parts before `upto` that were skipped, because code before them failed, as failed."""
    while len(results) < upto:
        results.append(CallResult(value=False))


def _checked_reply(frame: bytes, spec: TestProgram) -> dict[str, Any]:
    """Return the program's reply, proven to have a reply's shape and values that decode."""

    def resolve(kind: str, which: object) -> object:
        if kind == "object" and not spec.classes:
            raise Breach("an object of the program, and the tests name no class of it")
        return (kind, which)

    tree = codec.parse(frame)
    if type(tree) is not dict or list(tree) not in (["v", "changed"], ["x", "changed"]):
        raise Breach("a reply has a value or an exception, and the arguments that changed")
    if "x" in tree:
        if type(tree["x"]) is not list or len(tree["x"]) != 3 or any(type(part) is not str for part in tree["x"]):
            raise Breach("an exception is a type, its builtin base and a text")
        tree["x"] = [part[:500] for part in tree["x"]]
    else:
        codec.decode_tree(tree["v"], resolve)
    changed = tree["changed"]
    if type(changed) is not list or any(type(pair) is not list or len(pair) != 2 for pair in changed):
        raise Breach("the changed arguments are pairs of a key and a value")
    for key, value in changed:
        if type(key) not in (int, str):
            raise Breach("an argument is known by number or name")
        codec.decode_tree(value, resolve)
    return tree


def _attend(program: Conversation, spec: TestProgram, results: list[CallResult]) -> None:
    """Collect the reports of tests in the program's own process: values seen on the way, then each part's result."""
    seen: list[object] = []
    budget = Budget()
    while len(results) < len(spec.parts):
        frame = program.receive()
        if frame is None:
            raise _Over(None, f"ended after {len(results)} of {len(spec.parts)} parts")
        budget.take(frame)
        tree = codec.parse(frame)
        if type(tree) is dict and list(tree) == ["site", "v"] and type(tree["site"]) is int:
            seen.append([tree["site"], codec.decode_tree(tree["v"])])
        elif type(tree) is dict and list(tree) == ["part", "ok"] and tree["part"] == len(results):
            results.append(CallResult(value=[tree["ok"] is True, seen]))
            seen = []
        else:
            raise Breach(f"a value that was seen, or the end of part {len(results)}, was due")


def _without_each_other(ends: list[Finished]) -> list[Finished]:
    """Return the same ends without the time for which the two kept each other waiting: no other process caused it."""
    cpu_seconds = sum(end.cpu_seconds for end in ends)
    return [replace(end, queued_seconds=max(0.0, end.queued_seconds - (cpu_seconds - end.cpu_seconds))) for end in ends]


def _usage(ends: list[Finished]) -> Usage:
    """Both sandboxes together; the wall time is the longer one's, which contains the other. Memory: the program's."""
    return Usage(
        cpu_seconds=sum(end.cpu_seconds for end in ends),
        wall_seconds=max(end.wall_seconds for end in ends),
        memory_mb=ends[0].memory_mb,
    )
