"""Canaries: a worker that lies is detected and replaced, and its results since its last good answer are made anew."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from collections import deque
from collections.abc import Callable

import pytest
from fusion import serve

from coupled.sandbox import (
    Call,
    CallResult,
    Execution,
    Job,
    Limits,
    LocalExecutor,
    Outcome,
    RemoteExecutor,
    canary,
    open_executor,
)
from coupled.sandbox.conversation import Finished
from coupled.sandbox.jail.codec import encode
from coupled.sandbox.worker import Worker

POISON = "poison = 1\ndef f(x): return x"


def job(uid: str, source: str = "def f(x): return x * 2", x: object = 21, **limits: float) -> Job:
    given = Limits(**({"cpu_seconds": 1, "wall_seconds": 20.0} | limits))  # type: ignore[arg-type]
    return Job(uid=uid, source=source, calls=(Call(function="f", args=(x,)),), limits=given)


def lie(reply: bytes) -> bytes:
    """Make a well-formed reply with another value: 42 becomes 52."""
    return re.sub(rb'("v":[^0-9}]*-?)(\d)', lambda m: m[1] + b"%d" % ((int(m[2]) + 1) % 10), reply)


def outcomes(executions: list[Execution]) -> list[tuple[Outcome, object]]:
    return [(run.outcome, run.results[0].value if run.results else None) for run in executions]


class Liar:
    """Makes workers lie, as one would whose zygote a program took over, until they are replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bodies: list[bytes] = []
        self.poisoned: set[Worker] = set()
        self.lies_always = False
        run, restart = Worker.run, Worker.restart

        def lying(worker: Worker, body: bytes, *rest: object) -> Finished:
            self.bodies.append(body)
            finished = run(worker, body, *rest)  # type: ignore[arg-type]
            if worker in self.poisoned or self.lies_always:
                object.__setattr__(finished, "stream", lie(finished.stream))
            if b"poison" in body:
                self.poisoned.add(worker)
            return finished

        def forgiving(worker: Worker) -> None:
            self.poisoned.discard(worker)
            restart(worker)

        monkeypatch.setattr(Worker, "run", lying)
        monkeypatch.setattr(Worker, "restart", forgiving)


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> Liar:
    return Liar(monkeypatch)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="coupled.sandbox.canary")


def sources(bodies: list[bytes]) -> list[str]:
    return [json.loads(body)["source"] for body in bodies]


def test_a_lying_worker_is_replaced_and_what_it_said_is_made_anew(liar: Liar, caplog: pytest.LogCaptureFixture) -> None:
    with open_executor() as executor:
        first = executor._workers[0].incarnation
        runs = executor.run([job("a"), job("p", POISON), job("b"), job("c", x=4)])
        assert outcomes(runs) == [(Outcome.OK, 42), (Outcome.VIOLATION, None), (Outcome.OK, 42), (Outcome.OK, 8)]
        assert "spoiled 2 new workers" in runs[1].detail
        assert [run.uid for run in runs] == ["a", "p", "b", "c"]
        assert executor._workers[0].incarnation > first
        assert "wrong answer to a known program" in caplog.text
        assert outcomes(executor.run([job("d")])) == [(Outcome.OK, 42)], "the worker left behind is an honest one"


def test_without_canaries_the_lie_would_have_been_believed(liar: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "_answers", lambda *_: True)
    with open_executor() as executor:
        runs = executor.run([job("a"), job("p", POISON), job("b")])
        assert outcomes(runs) == [(Outcome.OK, 42), (Outcome.OK, 21), (Outcome.OK, 52)]


def test_a_machine_whose_new_workers_lie_too_gives_no_verdicts(liar: Liar) -> None:
    with open_executor() as executor:
        liar.lies_always = True
        runs = executor.run([job("a"), job("b")])
    assert all(run.outcome is Outcome.SANDBOX_ERROR and run.outcome.is_infrastructure for run in runs)
    assert all(run.results == () and "do not trust this machine" in run.detail for run in runs)


def test_a_canary_ends_every_batch_and_comes_after_so_many_programs(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "NUM_BETWEEN", 3)
    ours = [f"def f(x): return {n}" for n in range(7)]
    with open_executor() as executor:
        liar.bodies.clear()
        executor.run([job("", source) for source in ours])
    order = ["job" if source in ours else "canary" for source in sources(liar.bodies)]
    assert order == ["job"] * 3 + ["canary"] + ["job"] * 3 + ["canary"] + ["job", "canary"]


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("import ctypes\ndef f(x): ctypes.string_at(0)", Outcome.CRASH),
        ("import os\ndef f(x):\n    for fd in range(256):\n        try: os.write(fd, b'\\0\\0\\0\\2{}')\n"
         "        except OSError: pass", Outcome.PROTOCOL),
    ],
)  # fmt: skip
def test_a_canary_comes_at_once_after_what_smells_of_an_attack(liar: Liar, body: str, outcome: Outcome) -> None:
    with open_executor() as executor:
        liar.bodies.clear()
        runs = executor.run([job("x", body), job("y")])
    assert [run.outcome for run in runs] == [outcome, Outcome.OK]
    ours = [body, "def f(x): return x * 2"]
    assert [source in ours for source in sources(liar.bodies)] == [True, False, True, False]


def test_a_failure_of_the_sandbox_claims_nothing_and_needs_no_proof(liar: Liar) -> None:
    broken = job("broken")
    object.__setattr__(broken.limits, "max_files", -7)  # no limit of the kernel's: the lock-down fails
    with open_executor() as executor:
        liar.bodies.clear()
        assert executor.run([broken])[0].outcome is Outcome.SANDBOX_ERROR
    started = [source for source in sources(liar.bodies) if source != "import sched"]  # the trial of a new worker
    assert started == [broken.source] * 3


def test_results_of_a_worker_that_died_before_its_canary_are_made_anew(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Worker.run
    killed: list[int] = []

    def dying(worker: Worker, body: bytes, *rest: object) -> Finished:
        finished = run(worker, body, *rest)  # type: ignore[arg-type]
        if b"last" in body and not killed:
            assert worker.pid is not None
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        return finished

    monkeypatch.setattr(Worker, "run", dying)
    last = "last = 1\ndef f(x): return x * 2"
    with open_executor() as executor:
        liar.bodies.clear()
        runs = executor.run([job("a"), job("b", last)])
    assert outcomes(runs) == [(Outcome.OK, 42)] * 2
    assert sources(liar.bodies).count(last) == 2
    assert sources(liar.bodies).count(job("a").source) == 2


@pytest.mark.parametrize("like", [job("like"), Job(uid="like", source="", stdin_cases=("1",))], ids=["calls", "stdin"])
def test_canaries_are_answered_by_honest_workers_and_never_twice_the_same(executor: LocalExecutor, like: Job) -> None:
    drawn = [canary.canary(like) for _ in range(40)]
    runs = executor.run([job for job, _ in drawn])
    for (drawn_job, expected), run in zip(drawn, runs, strict=True):
        assert run.outcome is Outcome.OK, (drawn_job, run)
        assert [result.value for result in run.results] == expected, drawn_job
        assert (drawn_job.uid, drawn_job.profile) == ("like", like.profile)
    assert len({(j.source, repr(j.calls), j.stdin_cases) for j, _ in drawn}) == 40


@pytest.mark.parametrize("like", [job("like"), Job(uid="like", source="", stdin_cases=("1",))], ids=["calls", "stdin"])
def test_no_canary_is_answered_right_by_chance(like: Job) -> None:
    """Once in a hundred all answers were {}: the empty answer was believed, and so was a lie about numbers."""
    for _ in range(5000):
        drawn, expected = canary.canary(like)
        assert all(expected), drawn
        if like.calls:
            assert any(value != expected[0] for value in expected), drawn
            replies = [f'{{"n":{n},"v":{encode(value)}}}'.encode() for n, value in enumerate(expected)]
            assert all(lie(reply) != reply for reply in replies), drawn
        else:
            assert all(line.strip() for line in str(expected[0]).splitlines()), drawn


def test_a_value_of_another_type_is_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    like = job("like")
    monkeypatch.setattr(canary, "canary", lambda _: (like, [1]))
    answer: Callable[..., bool] = canary._answers
    with open_executor() as executor:
        worker = executor._workers[0]
        from coupled.sandbox.executor import run_job

        for source, is_right in (("1", True), ("True", False), ("1.0", False), ("1 / 0", False)):
            monkeypatch.setattr(canary, "canary", lambda _, s=source: (job("c", f"def f(x): return {s}"), [1]))
            assert answer(worker, like, run_job) is is_right, source


class Plain:
    """A worker without a process; `script` is the end of each canary: an outcome, or a value in place of 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *script: Outcome | int) -> None:
        self.incarnation = 0
        self.script = list(script)
        monkeypatch.setattr(canary, "canary", lambda like: (Job(uid="canary", source=""), [1]))

    def restart(self) -> None:
        self.incarnation += 1

    def run(self, job: Job) -> Execution:
        end: Outcome | int = 7 if job.uid != "canary" else self.script.pop(0) if self.script else 1
        if isinstance(end, Outcome):
            return Execution(uid=job.uid, outcome=end, tier="none")
        return Execution(uid=job.uid, outcome=Outcome.OK, results=(CallResult(value=end),), tier="none")

    def watched(self, *uids: str) -> list[tuple[Outcome, object]]:
        slots = [canary.Slot(job(uid)) for uid in uids]
        canary.run_watched(self, deque(slots), Plain.run)
        return outcomes([slot.result for slot in slots])


OK, ERROR = (Outcome.OK, 7), (Outcome.SANDBOX_ERROR, None)


@pytest.mark.parametrize("outcome", [Outcome.SANDBOX_ERROR, Outcome.OVERLOADED])
def test_a_canary_that_the_sandbox_failed_to_run_blames_nobody(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    worker = Plain(monkeypatch, outcome)
    assert worker.watched("a", "b") == [ERROR] * 2, "unproven, so without a verdict, and not a violation"
    assert worker.incarnation == 0
    # The same between two canaries: before the program, and after it.
    assert Plain(monkeypatch, 2, outcome, 1, 1).watched("a", "b") == [ERROR, OK]
    assert Plain(monkeypatch, 2, 1, outcome, 1, 1).watched("a", "b") == [ERROR, OK]


@pytest.mark.parametrize("outcome", [Outcome.TIMEOUT, Outcome.KILLED])
def test_a_canary_that_may_have_met_a_busy_machine_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    worker = Plain(monkeypatch, outcome)
    assert worker.watched("a", "b") == [OK, OK]
    assert worker.incarnation == 0
    worker = Plain(monkeypatch, outcome, outcome)
    assert worker.watched("a", "b") == [OK, OK]
    assert worker.incarnation == 1, "twice in a row: replaced"


def test_a_server_that_stops_answering_between_a_program_and_its_canary_gives_no_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coupled.sandbox.remote._BACKOFF_SECONDS", 0.01)
    with serve() as server, RemoteExecutor(server.url) as executor:
        server.faults = [200, 500, 500, 500]
        (run,) = executor.run([job("a")])
        assert server.faults == []
    assert (run.outcome, run.results) == (Outcome.SANDBOX_ERROR, ())
    assert "nothing vouches" in run.detail


def test_a_server_that_lies_gives_no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coupled.sandbox.remote._BACKOFF_SECONDS", 0.01)
    with serve() as server, RemoteExecutor(server.url) as executor:
        server.lie = lambda stdout: lie(stdout.encode()).decode()
        (run,) = executor.run([job("a")])
        assert run.outcome is Outcome.SANDBOX_ERROR
        assert "do not trust" in run.detail
        server.lie = None
        assert outcomes(executor.run([job("a")])) == [(Outcome.OK, 42)]
