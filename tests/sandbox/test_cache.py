"""The cache: what counts as the same program, what is kept, and for how long."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from coupled.sandbox import (
    CachedExecutor,
    CacheStatistics,
    Call,
    CallResult,
    Execution,
    Executor,
    Isolation,
    Job,
    Limits,
    LocalExecutor,
    Opaque,
    Outcome,
    Raised,
    SandboxUnavailable,
    cache,
)
from coupled.sandbox.cache import KEPT, job_key

CLOCK = "import time, os\ndef f(x): return (x, time.monotonic_ns(), os.urandom(8))"


def job(source: str = "def f(x): return x + 1", *args: object, uid: str = "u", **limits: float) -> Job:
    calls = (Call(function="f", args=args or (1,)),)
    given = Limits(**({"cpu_seconds": 1, "wall_seconds": 20.0} | limits))  # type: ignore[arg-type]
    return Job(uid=uid, source=source, calls=calls, limits=given)


class Scripted:
    """An executor whose outcome is given, and which counts what reaches it."""

    def __init__(self, outcome: Outcome = Outcome.OK, value: object = 1) -> None:
        self.outcome, self.value = outcome, value
        self.batches: list[list[str]] = []

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        self.batches.append([job.source for job in jobs])
        results = (CallResult(value=self.value),)
        return [Execution(uid=job.uid, outcome=self.outcome, results=results, tier="scripted") for job in jobs]

    def isolation(self) -> Isolation:
        return Isolation(tier="scripted", user="", has_network=False, filesystem="", processes="", has_filter=True)

    def close(self) -> None:
        self.batches.append(["closed"])


def test_the_same_program_is_run_once_and_its_second_execution_is_the_first(executor: LocalExecutor) -> None:
    cached = CachedExecutor(executor)
    (first,) = cached.run([job(CLOCK, 3, uid="a")])
    (second,) = cached.run([job(CLOCK, 3, uid="b")])
    assert first.outcome is Outcome.OK
    assert second == dataclasses.replace(first, uid="b"), "a new run would have read another time"
    assert executor.run([job(CLOCK, 3)])[0].results != first.results, "the program is indeed never like itself"
    assert cached.statistics() == CacheStatistics(num_jobs=2, num_hits=1)


def test_duplicates_within_a_batch_are_run_once_and_each_gets_its_own_uid() -> None:
    inner = Scripted()
    cached = CachedExecutor(inner)
    executions = cached.run([job("a", uid="1"), job("b", uid="2"), job("a", uid="3")])
    assert inner.batches == [["a", "b"]]
    assert [execution.uid for execution in executions] == ["1", "2", "3"]
    assert cached.statistics().num_hits == 1


def test_whatever_a_program_can_depend_on_makes_another_key() -> None:
    base = job()
    others = [
        job("def f(x): return x + 2"),
        job("def f(x): return x + 1", 2),
        job("def f(x): return x + 1", True),
        job("def f(x): return x + 1", 1.0),
        job("def f(x): return x + 1", (1,)),
        job("def f(x): return x + 1", [1]),
        job("def f(x): return x + 1", "1"),
        job("def f(x): return x + 1", {1: 2}),
        job("def f(x): return x + 1", {1, 2}),
        job(memory_mb=600),
        job(cpu_seconds=2),
        dataclasses.replace(base, setup="pass"),
        dataclasses.replace(base, calls=(Call(function="g", args=(1,)),)),
        dataclasses.replace(base, calls=(*base.calls, *base.calls)),
        dataclasses.replace(base, calls=(Call(function="f", kwargs={"x": 1}),)),
        dataclasses.replace(base, calls=(), stdin_cases=("1",)),
        dataclasses.replace(base, calls=(), stdin_cases=("1", "")),
    ]
    keys = [job_key(each) for each in [base, *others]]
    assert len(set(keys)) == len(keys)
    assert job_key(base, "another tier") != job_key(base)
    assert job_key(job(uid="somebody else's")) == job_key(base)


def test_every_field_of_a_job_but_its_uid_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[object] = []
    monkeypatch.setattr("coupled.sandbox.cache._feed", lambda update, value: fed.append(value))
    base = job()
    job_key(base)
    assert fed == [getattr(base, item.name) for item in dataclasses.fields(base) if item.name != "uid"]


@pytest.mark.parametrize("outcome", list(Outcome))
def test_only_what_a_program_brings_about_by_itself_is_kept(outcome: Outcome) -> None:
    inner = Scripted(outcome)
    cached = CachedExecutor(inner)
    for _ in range(2):
        assert cached.run([job()])[0].outcome is outcome
    assert len(inner.batches) == (1 if outcome in KEPT else 2)
    assert not {o for o in KEPT if o.is_infrastructure or o in (Outcome.TIMEOUT, Outcome.KILLED)}


class Held(Scripted):
    """Runs nothing until it is let go; may fail then."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.has_begun, self.may_go, self.error = threading.Event(), threading.Event(), error

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        self.has_begun.set()
        assert self.may_go.wait(60)
        if self.error is not None:
            raise self.error
        return super().run(jobs)


def test_what_another_thread_is_running_is_waited_for_and_not_run_again() -> None:
    inner = Held()
    cached = CachedExecutor(inner)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cached.run, [job("a", uid="1")])
        assert inner.has_begun.wait(60)
        second = threads.submit(cached.run, [job("a", uid="2"), job("b", uid="3"), job("a", uid="4")])
        inner.may_go.set()
        assert [execution.uid for execution in second.result(60)] == ["2", "3", "4"]
        assert [execution.uid for execution in first.result(60)] == ["1"]
    assert sorted(inner.batches) == [["a"], ["b"]]
    assert (cached.statistics().num_jobs, cached.statistics().num_hits) == (4, 2)


def test_an_outcome_that_is_not_kept_is_shared_with_those_who_wait_for_it_alone() -> None:
    inner = Held()
    inner.outcome = Outcome.TIMEOUT
    cached = CachedExecutor(inner)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cached.run, [job("a")])
        assert inner.has_begun.wait(60)
        second = threads.submit(cached.run, [job("a")])
        while cached.statistics().num_jobs < 2:
            time.sleep(0.01)
        inner.may_go.set()
        assert first.result(60) == second.result(60)
    cached.run([job("a")])
    assert inner.batches == [["a"], ["a"]]


def test_a_failure_reaches_everybody_who_waits_and_the_job_is_new_again() -> None:
    inner = Held(SandboxUnavailable("no memory"))
    cached = CachedExecutor(inner)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(cached.run, [job("a")])]
        assert inner.has_begun.wait(60)
        runs.append(threads.submit(cached.run, [job("a")]))
        while cached.statistics().num_jobs < 2:
            time.sleep(0.01)
        inner.may_go.set()
        for run in runs:
            with pytest.raises(SandboxUnavailable, match="no memory"):
                run.result(60)
    inner.error = None
    assert cached.run([job("a")])[0].outcome is Outcome.OK


def test_what_was_used_longest_ago_goes_first_and_results_too_large_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "MAX_VALUES", 40)  # two entries of 17 fit
    inner = Scripted()
    cached = CachedExecutor(inner)
    for source in ("a", "b", "a", "c", "a", "b"):
        cached.run([job(source)])
    assert inner.batches == [["a"], ["b"], ["c"], ["b"]]
    inner.value, inner.batches = ["x" * 6400, {1: (2, 3)}], []
    for source in ("large", "large", "b"):
        cached.run([job(source)])
    assert inner.batches == [["large"], ["large"], ["b"]], "it made room for itself, then had to go too"


@pytest.mark.parametrize(
    "large",
    [1 << 80_000, [range(1 << 80_000)], "\u2603" * 5000, Opaque("x" * 9000), {(): b"x" * 9000}],
    ids=["int", "range", "text", "opaque", "bytes"],
)
def test_one_value_that_is_large_by_itself_counts_by_its_size(large: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_VALUES", 70)
    inner = Scripted(value=large)
    cached = CachedExecutor(inner)
    for source in ("a", "a"):
        cached.run([job(source)])
    assert inner.batches == [["a"], ["a"]], "about 10 kB are more than 70 values"


@pytest.mark.parametrize("where", ["stdout", "detail", "raised"])
def test_texts_besides_the_values_count_too(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def talkative(self: Scripted, jobs: Sequence[Job]) -> list[Execution]:
        executions = run(self, jobs)
        text = "x" * 9000
        if where == "raised":
            raised = CallResult(raised=Raised(type="E", text=text))
            return [dataclasses.replace(execution, results=(raised,)) for execution in executions]
        return [dataclasses.replace(execution, **{where: text}) for execution in executions]  # type: ignore[arg-type]

    run = Scripted.run
    monkeypatch.setattr(Scripted, "run", talkative)
    monkeypatch.setattr(cache, "MAX_VALUES", 70)
    inner = Scripted()
    cached = CachedExecutor(inner)
    for source in ("a", "a"):
        cached.run([job(source)])
    assert inner.batches == [["a"], ["a"]]


def test_a_cache_is_an_executor_and_closes_the_one_behind_it() -> None:
    inner = Scripted()
    with CachedExecutor(inner) as cached:
        executor: Executor = cached
        assert executor.isolation().tier == "scripted"
        assert executor.run([]) == []
    assert inner.batches == [["closed"]], "no jobs, nothing to run"
