"""An executor around the runs of one job: budgets, shortages of the host, jobs that a tier cannot run."""

from __future__ import annotations

import errno
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from coupled.sandbox import (
    Call,
    Job,
    Limits,
    LocalExecutor,
    Outcome,
    SandboxUnavailable,
    TestProgram,
    open_executor,
)
from coupled.sandbox import (
    executor as executors,
)
from coupled.sandbox.canary import NUM_BETWEEN
from coupled.sandbox.pool import GRACE_SECONDS, require_runnable
from coupled.sandbox.worker import Worker

ECHO = "print(input(), end='')"
JOB = Job(uid="u", source="def f(): return 1", calls=(Call(function="f"),))
BROKEN = Job(uid="broken", source="", limits=Limits(wall_seconds=60.0))
object.__setattr__(BROKEN.limits, "max_files", -7)  # no limit of the kernel's: the lock-down fails
IN_PROCESS = TestProgram(source="", parts=("0",), is_in_process=True)


def printed(executor: LocalExecutor, sizes: list[int], output_kb: int) -> tuple[Outcome, list[int]]:
    limits = Limits(wall_seconds=60.0, output_kb=output_kb)
    cases = tuple("x" * size for size in sizes)
    (run,) = executor.run([Job(uid="s", source=ECHO, stdin_cases=cases, limits=limits)])
    return run.outcome, [len(str(result.value)) for result in run.results]


def test_the_output_limit_is_on_all_inputs_together(executor: LocalExecutor) -> None:
    assert printed(executor, [4096, 4095, 1], 8) == (Outcome.OK, [4096, 4095, 1]), "the last byte is granted"
    assert printed(executor, [4096, 4096, 1], 8) == (Outcome.OUTPUT_LIMIT, [4096, 4096])
    assert printed(executor, [4096, 4095, 2], 8) == (Outcome.OUTPUT_LIMIT, [4096, 4095]), "less than a kilobyte over"
    assert printed(executor, [5000] * 20, 64) == (Outcome.OUTPUT_LIMIT, [5000] * 13)


@pytest.mark.parametrize("shortage", [OSError(errno.EMFILE, "too many open files"), SandboxUnavailable("no memory")])
def test_a_worker_that_cannot_be_started_again_at_once_is_given_time(
    monkeypatch: pytest.MonkeyPatch, shortage: Exception
) -> None:
    monkeypatch.setattr(executors, "_PAUSE_SECONDS", 0.0)
    shortages = [shortage] * 2
    restart = Worker.restart

    def failing(worker: Worker) -> None:
        if shortages:
            raise shortages.pop()
        restart(worker)

    with open_executor() as executor:
        monkeypatch.setattr(Worker, "restart", failing)
        runs = executor.run([JOB, BROKEN, JOB])
        assert [run.outcome for run in runs] == [Outcome.OK, Outcome.SANDBOX_ERROR, Outcome.OK]
        assert shortages == []
        shortages += [shortage] * 3
        with pytest.raises(type(shortage), match=r"too many|no memory"):
            executor.run([BROKEN])


def test_a_lack_of_descriptors_is_infrastructure_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Worker.run
    shortages: list[OSError] = []

    def failing(worker: Worker, *rest: object) -> object:
        if shortages:
            raise shortages.pop()
        return run(worker, *rest)  # type: ignore[arg-type]

    with open_executor() as executor:
        monkeypatch.setattr(Worker, "run", failing)
        shortages += [OSError(errno.EMFILE, "too many open files")]
        assert executor.run([JOB])[0].outcome is Outcome.OK
        assert shortages == []


def test_a_job_that_the_tier_cannot_run_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = Job(uid="weak", source="", tests=IN_PROCESS, profile="compat")
    require_runnable(weak, "namespaces")
    for tier in ("landlock", "process"):
        require_runnable(JOB, tier)
        with pytest.raises(
            SandboxUnavailable, match=r"(?s)'compat' is available in tier 'namespaces' only.*'weak'.*remedy"
        ):
            require_runnable(weak, tier)
    with open_executor() as executor:
        monkeypatch.setattr(executor._workers[0], "tier", "landlock")
        monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("something ran"))
        with pytest.raises(SandboxUnavailable, match="job 'weak' needs it"):
            executor.run([JOB, weak])


def test_close_lets_a_program_of_another_thread_end_and_refuses_what_is_left() -> None:
    sleeps = Job(
        uid="s", source="import time\ndef f(): time.sleep(1)", calls=JOB.calls, limits=Limits(wall_seconds=60.0)
    )
    executor = open_executor(num_workers=1)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(executor.run, [replace(sleeps, uid=str(n)) for n in range(NUM_BETWEEN)])
        while executor._idle.qsize():
            time.sleep(0.01)
        started = time.monotonic()
        executor.close()
        executor.close()
        assert time.monotonic() - started < GRACE_SECONDS, "no more than the program that was running was waited for"
        with pytest.raises(RuntimeError, match=r"nothing after close"):
            running.result(60)
    assert all(worker.pid is None for worker in executor._workers)
