"""Conclusions of the host from literal streams: nothing here starts a process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coupled.sandbox import Call, Job, Limits, Outcome, outcome
from coupled.sandbox.conversation import Finished
from coupled.sandbox.jail.codec import decode
from coupled.sandbox.outcome import read_calls, read_stdio

JOB = Job(
    uid="j", source="", calls=(Call(function="f"), Call(function="f")), limits=Limits(cpu_seconds=2, wall_seconds=6)
)
LOADED: dict[str, Any] = {"load": None}
FIRST, SECOND = {"n": 0, "v": 8}, {"n": 1, "v": {"t": [1]}}


def stream(*frames: Any) -> bytes:
    bodies = [json.dumps(frame).encode() for frame in frames]
    return b"\x55" + b"".join(len(body).to_bytes(4) + body for body in bodies)


def finished(data: bytes, **fields: Any) -> Finished:
    given: dict[str, Any] = {"stream": data, "exit": 0} | fields
    return Finished(**given)


@pytest.mark.parametrize("exit_status", [0, 70, -9, -11, None])
def test_answering_every_call_is_ok_whatever_the_exit_status(exit_status: int | None) -> None:
    reading = read_calls(finished(stream(LOADED, FIRST, SECOND), exit=exit_status), JOB)
    assert reading.outcome is Outcome.OK
    assert [result.value for result in reading.results] == [8, (1,)]


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (finished(b""), Outcome.SANDBOX_ERROR),
        (finished(b"Traceback", exit=70), Outcome.SANDBOX_ERROR),
        (finished(stream(), exit=70), Outcome.INCOMPLETE),
        (finished(stream(), exit=0), Outcome.INCOMPLETE),
        (finished(stream(LOADED, FIRST), exit=0), Outcome.INCOMPLETE),
        (finished(stream(LOADED, FIRST), exit=-9, was_ended=True), Outcome.INCOMPLETE),
        (finished(stream(LOADED, FIRST), exit=-9, cpu_seconds=1.7), Outcome.TIMEOUT),
        (finished(stream(LOADED, FIRST), exit=-9, cpu_seconds=0.4), Outcome.KILLED),
        (finished(stream(LOADED, FIRST), exit=-9, cpu_seconds=1.95, was_ended=True), Outcome.TIMEOUT),
        (finished(stream(LOADED, FIRST), exit=-11), Outcome.CRASH),
        (finished(stream(LOADED, FIRST), exit=-11, was_ended=True), Outcome.CRASH),
        (finished(stream(LOADED, FIRST), exit=-31), Outcome.VIOLATION),
        (finished(stream(LOADED, FIRST), exit=None), Outcome.VIOLATION),
        (finished(stream(LOADED), exit=-9, was_ended=True, wrote_too_much=True), Outcome.OUTPUT_LIMIT),
        (finished(stream(LOADED), exit=-9, was_ended=True, ran_out_of_time=True), Outcome.TIMEOUT),
        (finished(stream(LOADED), exit=-9, was_ended=True, ran_out_of_time=True, queued_seconds=2.9), Outcome.TIMEOUT),
        (
            finished(stream(LOADED), exit=-9, was_ended=True, ran_out_of_time=True, queued_seconds=3.1),
            Outcome.OVERLOADED,
        ),
        (finished(stream({"load": ["ValueError", "no"]})), Outcome.LOAD_ERROR),
        (finished(stream({"load": ["ValueError", "no"]}, FIRST)), Outcome.PROTOCOL),
        (finished(stream({"load": None, "x": 1}, FIRST)), Outcome.PROTOCOL),
        (finished(stream({"load": "no"})), Outcome.PROTOCOL),
        (finished(stream(FIRST, SECOND)), Outcome.PROTOCOL),
        (finished(stream(LOADED, SECOND, FIRST)), Outcome.PROTOCOL),
        (finished(stream(LOADED, FIRST, FIRST)), Outcome.PROTOCOL),
        (finished(stream(LOADED, FIRST, SECOND, {"n": 2, "v": 0})), Outcome.PROTOCOL),
        (finished(stream(LOADED, {"n": False, "v": 8})), Outcome.PROTOCOL),
        (finished(stream(LOADED, {"n": 0, "v": 8, "passed": True})), Outcome.PROTOCOL),
        (finished(stream(LOADED, {"v": 8, "n": 0})), Outcome.PROTOCOL),
        (finished(stream(LOADED, {"n": 0, "x": ["E"]})), Outcome.PROTOCOL),
        (finished(stream(LOADED, {"n": 0, "v": {"evil": 1}})), Outcome.PROTOCOL),
        (finished(stream(LOADED, [0, 8])), Outcome.PROTOCOL),
        (finished(b"\x55\0\0\0\5hello"), Outcome.PROTOCOL),
        (finished(stream(LOADED, {"n": 0, "v": {"h": ["object", 0]}})), Outcome.PROTOCOL),
        (finished(stream(LOADED, {"n": 0, "v": {"h": ["Decimal", "1"]}})), Outcome.PROTOCOL),
    ],
)
def test_anything_else_is_named_for_what_it_is(run: Finished, outcome: Outcome) -> None:
    assert read_calls(run, JOB).outcome is outcome


def test_replies_before_an_early_end_count_and_those_of_a_tamperer_do_not() -> None:
    assert len(read_calls(finished(stream(LOADED, FIRST), exit=-11), JOB).results) == 1
    assert len(read_calls(finished(stream(LOADED, FIRST)[:-1], exit=-11), JOB).results) == 0
    assert read_calls(finished(stream(LOADED, FIRST, FIRST)), JOB).results == ()


def test_all_replies_together_have_a_budget_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these could be decoded; all of them together would fill the host's memory."""
    monkeypatch.setattr(outcome, "MAX_RUN_PARTS", 100_000)
    calls = (Call(function="f"),) * 12
    job = Job(uid="j", source="", calls=calls)
    frames = [b'{"n":%d,"v":[%s0]}' % (index, b"[]," * 5_000) for index in range(12)]
    data = b"".join(len(frame).to_bytes(4) + frame for frame in [b'{"load":null}', *frames])
    reading = read_calls(finished(b"\x55" + data), job)
    assert (reading.outcome, reading.results) == (Outcome.PROTOCOL, ())
    assert "too many values" in reading.detail
    assert len(decode(b"[%s0]" % (b"[]," * 5_000))) == 5_001  # type: ignore[arg-type]
    few = b"".join(len(frame).to_bytes(4) + frame for frame in [b'{"load":null}', *frames[:5]])
    assert len(read_calls(finished(b"\x55" + few), job).results) == 5


def test_a_value_that_was_to_come_as_a_digest_is_refused() -> None:
    large = stream(LOADED, {"n": 0, "v": "a" * 70_000})
    for options, expected in (
        ({}, Outcome.OK),
        ({"may_digest": True}, Outcome.PROTOCOL),
        ({"may_digest": True, "keep_floats": True}, Outcome.OK),
    ):
        job = Job(uid="j", source="", calls=(Call(function="f", **options),))
        assert read_calls(finished(large), job).outcome is expected


def test_only_two_outcomes_are_infrastructure() -> None:
    assert {outcome for outcome in Outcome if outcome.is_infrastructure} == {Outcome.SANDBOX_ERROR, Outcome.OVERLOADED}


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (finished(b"\x55", stdout=b"1\n"), Outcome.OK),
        (finished(b"\x55", stdout=b"1\n", exit=1), Outcome.CRASH),
        (finished(b"\x55", stdout=b"1\n", exit=-11), Outcome.CRASH),
        (finished(b"\x55", stdout=b"1\n", exit=0, was_ended=True, ran_out_of_time=True), Outcome.TIMEOUT),
        (finished(b"\x55ok", stdout=b"1\n"), Outcome.PROTOCOL),
        (finished(b"", stdout=b"1\n"), Outcome.SANDBOX_ERROR),
    ],
)
def test_standard_output_counts_only_after_exit_status_0(run: Finished, outcome: Outcome) -> None:
    reading = read_stdio(run, JOB)
    assert reading.outcome is outcome
    assert [result.value for result in reading.results] == (["1\n"] if outcome is Outcome.OK else [])
