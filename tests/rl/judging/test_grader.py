"""What is found out before a run starts: that the tier can judge every task."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from coupled.reward import Task, plan, stdio_test
from coupled.rl.judging import local_sandbox
from coupled.rl.judging.open import open_grader
from coupled.rl.recipe.read import load_recipe
from coupled.sandbox import CallResult, Execution, Isolation, Job, Limits, Outcome, SandboxUnavailable

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
REMOTE = ("sandbox.tier=remote", "sandbox.url=http://sandbox.example:8080")
UNITTEST = """
import unittest
class T(unittest.TestCase):
    def test_one(self): self.assertEqual(f(1), 2)
"""
CALLS = Task(uid="calls", prompt="", hidden_tests=("assert f(1) == 2",), entry_point="f")
CLASSES = Task(uid="classes", prompt="", hidden_tests=(UNITTEST,), entry_point="f", style="unittest")


class Elsewhere:
    """Stands for a server; runs nothing."""

    is_closed = False

    def __init__(self, url: str, *, num_workers: int) -> None: ...

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        raise AssertionError("nothing runs while a grader is opened")

    def isolation(self) -> Isolation:
        return Isolation(tier="remote", user="", has_network=True, filesystem="", processes="", has_filter=False)

    def close(self) -> None:
        Elsewhere.is_closed = True


def test_tests_that_a_server_cannot_run_are_refused_when_the_grader_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_sandbox, "RemoteExecutor", Elsewhere)
    recipe = load_recipe(QUICKSTART, REMOTE)
    assert plan(CLASSES).tier == "T1"
    with pytest.raises(SandboxUnavailable, match=r"(?s)1 of 2 tasks cannot be judged here.*job 'classes'.*remedy"):
        open_grader(recipe, [CALLS, CLASSES])
    assert Elsewhere.is_closed
    open_grader(recipe, [CALLS, Task(uid="none", prompt="", hidden_tests=())]).close()


class Adds(Elsewhere):
    """Stands for a server on which every program adds one."""

    def __init__(self, url: str, *, num_workers: int) -> None:
        self.ran: list[str] = []

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        self.ran += [job.source for job in jobs]
        results = [tuple(CallResult(value=call.args[0] + 1) for call in job.calls) for job in jobs]
        return [
            Execution(uid=job.uid, outcome=Outcome.OK, results=result, tier="remote")
            for job, result in zip(jobs, results, strict=True)
        ]


def test_programs_that_were_begun_are_scored_as_if_they_had_not_been_and_run_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Adds] = []
    monkeypatch.setattr(local_sandbox, "RemoteExecutor", lambda *a, **k: opened.append(Adds(*a, **k)) or opened[-1])
    other = replace(CALLS, uid="other", hidden_tests=("assert f(1) == 2", "assert f(2) == 4"))
    tasks = [CALLS, other, CALLS, other]
    texts = [f"```python\ndef f(x): return x + {n}\n```" for n in (1, 1, 2, 2)]
    with contextlib.closing(open_grader(load_recipe(QUICKSTART, REMOTE), [CALLS, other])) as plain:
        wanted = plain.score(tasks, texts)
    assert [verdict.passed for verdict in wanted] == [1, 1, 1, 1]
    with contextlib.closing(open_grader(load_recipe(QUICKSTART, REMOTE), [CALLS, other])) as grader:
        grader.begin(["a", "b"], tasks[:2], texts[:2])
        grader.begin(["c", "d"], tasks[2:], texts[2:])
        assert grader.score([tasks[n] for n in (3, 0, 2, 1)], [texts[n] for n in (3, 0, 2, 1)], list("dacb")) == [
            wanted[n] for n in (3, 0, 2, 1)
        ]
        assert grader.score(tasks, texts, list("abcd")) == wanted, "what was begun is scored once; after that it is new"
        assert grader.score(tasks, texts) == wanted
    assert sorted(opened[1].ran) == sorted(opened[0].ran), "nothing is run twice"


class SlowAtFirst(Adds):
    """The first program that it runs takes too long."""

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        is_first = not self.ran
        done = super().run(jobs)
        return [replace(run, outcome=Outcome.TIMEOUT, results=()) for run in done] if is_first else done


def test_equal_completions_have_equal_verdicts_also_in_batches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_sandbox, "RemoteExecutor", SlowAtFirst)
    text = "```python\ndef f(x): return x + 1\n```"
    with contextlib.closing(open_grader(load_recipe(QUICKSTART, REMOTE), [CALLS])) as grader:
        for uid in ("a", "b"):
            grader.begin([uid], [CALLS], [text])
            grader._ahead[uid][0].result()
        assert [batch.result()[0].outcome for batch, _ in grader._ahead.values()] == ["timeout", "ok"]
        one, other = grader.score([CALLS] * 2, [text] * 2, ["a", "b"])
        assert one == other


def test_what_went_wrong_ahead_is_raised_when_the_scores_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_sandbox, "RemoteExecutor", Elsewhere)
    with contextlib.closing(open_grader(load_recipe(QUICKSTART, REMOTE), [CALLS])) as grader:
        grader.begin(["a"], [CALLS], ["```python\ndef f(x): return 1\n```"])
        with pytest.raises(AssertionError, match="nothing runs"):
            grader.score([CALLS], ["```python\ndef f(x): return 1\n```"], ["a"])


def test_a_stdio_task_leaves_room_for_its_right_answers() -> None:
    long = "1 2 3\n" * 200_000
    task = Task(uid="s", prompt="", hidden_tests=(stdio_test("", long),) * 8, style="stdio")
    job = plan(task).job("", Limits())
    assert job.limits.output_kb << 10 > 8 * len(long) > Limits().output_kb << 10
    small = Task(uid="s", prompt="", hidden_tests=(stdio_test("", "1"),), style="stdio")
    assert plan(small).job("", Limits()).limits == Limits()
