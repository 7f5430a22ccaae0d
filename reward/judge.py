"""Runs the hidden tests of tasks on programs and says which passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coupled.reward.extract import extract, has_program
from coupled.reward.plan import Expected, Plan, oracle_job, plan, read_oracle
from coupled.reward.types import Judgement, Status, Task, UnsupportedTest
from coupled.sandbox import Execution, Executor, Job, Limits, Outcome, Usage

_Key = tuple[str, int]


class Judge:
    """Judges completions with an executor, which stays the caller's to close.

    Keeps the expected values of `evalplus` tasks, so that each reference runs once. `allow_weak`: tests may run
    in the program's own process (tier T2) where they can run nowhere else.
    """

    def __init__(self, executor: Executor, limits: Limits | None = None, *, allow_weak: bool = False) -> None:
        self._executor = executor
        self.limits = limits or Limits()
        """Of every program."""
        self._allow_weak = allow_weak
        self._expected: dict[_Key, Expected] = {}

    def judge(self, tasks: Sequence[Task], completions: Sequence[str], *, run_visible: bool = False) -> list[Judgement]:
        """Return one judgement per completion: its first python block against the hidden tests of its task.

        With `run_visible` the visible tests are run as well and told apart. Raises UnsupportedTest for a test
        that cannot be judged, ValueError when the lengths differ.
        """
        programs = [extract(completion).code for completion in completions]
        return self.judge_programs(tasks, programs, run_visible=run_visible)

    def judge_programs(
        self, tasks: Sequence[Task], programs: Sequence[str | None], *, run_visible: bool = False
    ) -> list[Judgement]:
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
        return self._with_visible(tasks, programs, judgements) if run_visible else judgements

    def _run(self, jobs: dict[int, Job]) -> dict[int, Execution]:
        return dict(zip(jobs, self._executor.run(list(jobs.values())), strict=True)) if jobs else {}

    def _learn_expected(self, tasks: Sequence[Task]) -> dict[_Key, Execution]:
        """Run the references that have not run yet; those that the sandbox failed on, to be tried next time."""
        new = {_key(task): task for task in tasks if task.style == "evalplus" and _key(task) not in self._expected}
        runs = self._executor.run([oracle_job(task) for task in new.values()]) if new else []
        outages = {}
        for (key, task), run in zip(new.items(), runs, strict=True):
            if run.outcome.is_infrastructure:
                outages[key] = run
            else:
                self._expected[key] = read_oracle(task, run)
        return outages

    def _with_visible(
        self, tasks: Sequence[Task], programs: Sequence[str | None], judgements: Sequence[Judgement]
    ) -> list[Judgement]:
        shown: dict[int, Task] = {}
        for index, task in enumerate(tasks):
            alone = replace(task, hidden_tests=task.visible_tests, visible_tests=())
            try:
                if task.visible_tests and plan(alone, allow_weak=self._allow_weak).total:
                    shown[index] = alone
            except UnsupportedTest:
                continue  # only hidden tests are promised to be judged
        seen = self.judge_programs(list(shown.values()), [programs[index] for index in shown])
        visible = dict(zip(shown, (judgement.per_test for judgement in seen), strict=True))
        return [replace(judgement, visible=visible.get(index, ())) for index, judgement in enumerate(judgements)]


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
