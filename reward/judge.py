"""Runs the hidden tests of tasks on programs and says which passed."""

from __future__ import annotations

from collections.abc import Sequence

from coupled.reward.asserts import ParsedTest, parse_tests
from coupled.reward.extract import extract, has_program
from coupled.reward.stdio import parse_stdio, same_output
from coupled.reward.types import Judgement, Status, Task
from coupled.sandbox import Execution, Executor, Job, Limits, Outcome


class Judge:
    """Judges completions with an executor, which stays the caller's to close."""

    def __init__(self, executor: Executor, limits: Limits | None = None) -> None:
        self._executor = executor
        self._limits = limits or Limits()

    def judge(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[Judgement]:
        """Return one judgement per completion: its first python block against the hidden tests of its task.

        Raises UnsupportedTest for a test that cannot be split, ValueError when the lengths differ.
        """
        return self.judge_programs(tasks, [extract(completion).code for completion in completions])

    def judge_programs(self, tasks: Sequence[Task], programs: Sequence[str | None]) -> list[Judgement]:
        """As `judge`, for programs that are extracted already; None: the completion had none."""
        if len(tasks) != len(programs):
            raise ValueError(f"one task per program; received {len(tasks)} tasks and {len(programs)} programs")
        jobs = {
            index: self._job(task, program)
            for index, (task, program) in enumerate(zip(tasks, programs, strict=True))
            if program is not None and has_program(program)
        }
        runs = dict(zip(jobs, self._executor.run(list(jobs.values())), strict=True))
        return [
            _judgement(task, runs[index]) if index in runs else _nothing_to_run(task, program)
            for index, (task, program) in enumerate(zip(tasks, programs, strict=True))
        ]

    def _job(self, task: Task, program: str) -> Job:
        if task.style == "stdio":
            cases = tuple(parse_stdio(text)[0] for text in task.hidden_tests)
            return Job(uid=task.uid, source=program, stdin_cases=cases, limits=self._limits)
        calls = tuple(call for test in parse_tests(task) for call in test.calls)
        return Job(uid=task.uid, source=program, setup=task.setup, calls=calls, limits=self._limits)


def _nothing_to_run(task: Task, program: str | None) -> Judgement:
    outcome = "no_code" if program is None else "syntax_error"
    return Judgement(status=Status.CRASH, outcome=outcome, per_test=(False,) * len(task.hidden_tests))


def _judgement(task: Task, run: Execution) -> Judgement:
    if run.outcome.is_infrastructure:
        return Judgement(status=Status.INFRA, outcome=str(run.outcome), per_test=())
    per_test = _stdio(task, run) if task.style == "stdio" else _asserts(parse_tests(task), run)
    status = {Outcome.OK: Status.OK, Outcome.TIMEOUT: Status.TIMEOUT}.get(run.outcome, Status.CRASH)
    return Judgement(status=status, outcome=str(run.outcome), per_test=per_test, cpu_seconds=run.usage.cpu_seconds)


def _asserts(tests: Sequence[ParsedTest], run: Execution) -> tuple[bool, ...]:
    """A test whose calls were answered before the program ended still counts: slow is not wrong."""
    passed, start = [], 0
    for test in tests:
        end = start + len(test.calls)
        passed.append(test.holds(run.results[start:end]))
        start = end
    return tuple(passed)


def _stdio(task: Task, run: Execution) -> tuple[bool, ...]:
    printed = [str(result.value) for result in run.results]
    expected = [parse_stdio(text)[1] for text in task.hidden_tests]
    passed = [same_output(text, wanted) for text, wanted in zip(printed, expected, strict=False)]
    return tuple(passed + [False] * (len(expected) - len(passed)))
