"""Runs the hidden tests of tasks on programs, and judges each test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from coupled.reward.extract import extract, has_program
from coupled.reward.styles import STYLES, Expected, Plan, plan
from coupled.reward.types import Judgement, Status, Task
from coupled.sandbox import Execution, Executor, Job, Limits, Outcome, Usage

_Key = tuple[str, int]
_K = TypeVar("_K")


class Judge:
    """Judges completions with an executor, which the caller closes.

    Keeps the expected values of tasks whose style runs a reference (`evalplus`), so that each reference runs once.
    `allow_weak`: tests may run in the program's own process (tier T2) where they can run nowhere else.
    """

    def __init__(self, executor: Executor, limits: Limits | None = None, *, allow_weak: bool = False) -> None:
        self._executor = executor
        self.limits = limits or Limits()
        """Limits of every program."""
        self._allow_weak = allow_weak
        self._expected: dict[_Key, Expected] = {}

    def judge(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[Judgement]:
        """Return one judgement per completion: its first python block against the hidden tests of its task.

        Visible tests are neither run nor counted. Raises UnsupportedTest for a test that cannot be judged, ValueError
        when the lengths differ.
        """
        return self.judge_programs(tasks, [extract(completion).code for completion in completions])

    def judge_programs(self, tasks: Sequence[Task], programs: Sequence[str | None]) -> list[Judgement]:
        """As `judge`, for programs that are extracted already; None: the completion had none."""
        if len(tasks) != len(programs):
            raise ValueError(f"one task per program; received {len(tasks)} tasks and {len(programs)} programs")
        runnable = [program is not None and has_program(program) for program in programs]
        outages = self._learn_expected([task for task, runs in zip(tasks, runnable, strict=True) if runs])
        plans = [plan(task, allow_weak=self._allow_weak, expected=self._expected.get(_key(task))) for task in tasks]
        jobs = {
            index: plans[index].job(str(program), self.limits)
            for index, program in enumerate(programs)
            if runnable[index] and _key(tasks[index]) not in outages
        }
        runs = self._run(jobs)
        checkers = {
            index: make(run, self.limits)
            for index, run in runs.items()
            if (make := plans[index].checker) and not run.outcome.is_infrastructure
        }
        checks = self._run(checkers)
        judgements = []
        for index, (task, program) in enumerate(zip(tasks, programs, strict=True)):
            if index in runs:
                judgements.append(_judgement(plans[index], runs[index], checks.get(index)))
            elif runnable[index]:
                judgements.append(_infra(outages[_key(task)]))
            else:
                judgements.append(_nothing_to_run(plans[index], program))
        return judgements

    def _run(self, jobs: dict[_K, Job]) -> dict[_K, Execution]:
        return dict(zip(jobs, self._executor.run(list(jobs.values())), strict=True)) if jobs else {}

    def _learn_expected(self, tasks: Sequence[Task]) -> dict[_Key, Execution]:
        """Run the references that have not run yet. Return the sandbox's failures, which the next call retries."""
        new = {
            _key(task): (task, reference)
            for task in tasks
            if (reference := STYLES[task.style].reference) and _key(task) not in self._expected
        }
        runs = self._run({key: reference.job(task) for key, (task, reference) in new.items()})
        outages = {key: run for key, run in runs.items() if run.outcome.is_infrastructure}
        for key, (task, reference) in new.items():
            if key not in outages:
                self._expected[key] = reference.read(task, runs[key])
        return outages


def _key(task: Task) -> _Key:
    return task.uid, hash((task.reference, task.setup, task.entry_point, task.hidden_tests, task.oracle, task.atol))


def _nothing_to_run(planned: Plan, program: str | None) -> Judgement:
    outcome = "no_code" if program is None else "syntax_error"
    return Judgement(status=Status.CRASH, outcome=outcome, per_test=(False,) * planned.total)


def _infra(run: Execution) -> Judgement:
    return Judgement(status=Status.INFRA, outcome=str(run.outcome), per_test=(), detail=run.detail)


def _judgement(planned: Plan, run: Execution, check: Execution | None) -> Judgement:
    for part in (run, check):
        if part is not None and part.outcome.is_infrastructure:
            return _infra(part)
    per_test = planned.verdicts(run if check is None else check)
    status = {Outcome.OK: Status.OK, Outcome.TIMEOUT: Status.TIMEOUT}.get(run.outcome, Status.CRASH)
    return Judgement(
        status=status,
        outcome=str(run.outcome),
        per_test=per_test + (False,) * (planned.total - len(per_test)),
        tier=planned.tier,
        usage=run.usage if check is None else _sum(run.usage, check.usage),
        detail=run.detail,
    )


def _sum(run: Usage, check: Usage) -> Usage:
    """Both together; the memory is the program's, not its checker's."""
    return replace(
        run, cpu_seconds=run.cpu_seconds + check.cpu_seconds, wall_seconds=run.wall_seconds + check.wall_seconds
    )
