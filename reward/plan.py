"""How a task is judged: what is run for a program, and what its results mean, test by test."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from coupled.reward import evalplus
from coupled.reward.asserts import ParsedTest, parse_test, parse_tests
from coupled.reward.programs import (
    Script,
    asserts_program,
    check_program,
    imports_of,
    refuse_what_runs_values,
    script_program,
    split_check,
    unittest_program,
)
from coupled.reward.stdio import parse_stdio, same_output
from coupled.reward.types import Task, UnsupportedTest
from coupled.sandbox import Call, Execution, Job, Limits, TestProgram

ORACLE_LIMITS = Limits(cpu_seconds=120, wall_seconds=600.0, memory_mb=4096, output_kb=1 << 18)
"""For a reference, which is the dataset's and runs once per task."""
_SLOWER = 4
"""A program may take so many times the processor time of the reference, on top of the limits."""
_OUTPUT_KB = 1 << 16
"""All replies together, for tasks with hundreds of inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the reference of a task replies, and what that took."""

    values: tuple[object, ...]
    cpu_seconds: float
    wall_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to judge the programs of one task."""

    tier: str
    """T0, T1 or T2; see `Judgement.tier`."""
    total: int
    """How many tests, or parts of one, are judged."""
    job: Callable[[str, Limits], Job]
    """From a program and its limits to what is run."""
    verdicts: Callable[[Execution], tuple[bool, ...]]
    """From what came of it to one bool per test; shorter when not all were reached."""
    checker: Callable[[Execution, Limits], Job] | None = None
    """When a checker of the dataset decides: from what came of the job to the checker's job, whose replies count."""


def plan(task: Task, *, allow_weak: bool = False, expected: Expected | None = None) -> Plan:
    """Return how a task is judged. `expected` is needed to run an `evalplus` plan, not to make one.

    Raises UnsupportedTest when its tests cannot be judged, or only by tier T2 while that is off.
    """
    match task.style:
        case "assert":
            return _asserts(task)
        case "check":
            return _check(task)
        case "unittest":
            return _beside(task, unittest_program(_one_program(task), task.entry_point, task.setup))
        case "evalplus":
            return _evalplus(task, expected)
        case "stdio":
            return _stdio(task)
        case "script":
            if not allow_weak:
                raise UnsupportedTest(
                    f"tests of style 'script' run in the program's own process, where it can forge them (tier T2); "
                    f"task {task.uid!r} needs it and it is off: drop the task, or set reward.allow_weak: true "
                    "(coupled sandbox run: --allow-weak)"
                )
            return _in_process(task, script_program(_one_program(task)))
    raise ValueError(f"no style {task.style!r}")


def oracle_job(task: Task) -> Job:
    """Return the job that gives the expected values of an `evalplus` task: its reference, no other program."""
    may_digest = task.oracle == "equal" and task.atol == 0
    calls = tuple(replace(_call(task, text, may_digest), keep_floats=may_digest) for text in task.hidden_tests)
    return Job(uid=f"{task.uid} reference", source=task.reference, setup=task.setup, calls=calls, limits=ORACLE_LIMITS)


def read_oracle(task: Task, run: Execution) -> Expected:
    """Return the expected values; UnsupportedTest when the reference does not give one for every input."""
    bad = next((index for index, reply in enumerate(run.results) if reply.raised), len(run.results))
    if bad < len(task.hidden_tests):
        raised = run.results[bad].raised if bad < len(run.results) else None
        raise UnsupportedTest(
            f"the reference of a task replies to every input; that of {task.uid!r} does not to input {bad} "
            f"({raised or run.outcome}, {run.detail[:200]!r}): drop the task, or mend its reference"
        )
    values = tuple(reply.value for reply in run.results)
    return Expected(values=values, cpu_seconds=run.usage.cpu_seconds, wall_seconds=run.usage.wall_seconds)


def _asserts(task: Task) -> Plan:
    try:
        tests = parse_tests(task)
    except UnsupportedTest:
        return _beside(task, asserts_program(task.hidden_tests, task.entry_point, task.setup))
    return _calls(task, tests)


def _calls(task: Task, tests: Sequence[ParsedTest]) -> Plan:
    calls = tuple(call for test in tests for call in test.calls)

    def job(program: str, limits: Limits) -> Job:
        return Job(uid=task.uid, source=program, setup=task.setup, calls=calls, limits=limits)

    def verdicts(run: Execution) -> tuple[bool, ...]:
        """A test whose calls were answered before the program ended still counts: slow is not wrong."""
        passed, start = [], 0
        for test in tests:
            end = start + len(test.calls)
            passed.append(test.holds(run.results[start:end]))
            start = end
        return tuple(passed)

    return Plan(tier="T0", total=len(tests), job=job, verdicts=verdicts)


def _check(task: Task) -> Plan:
    text = "\n".join((task.setup, _one_program(task)))
    if not task.entry_point:
        raise UnsupportedTest(
            f"style 'check' needs an entry point for its candidate; task {task.uid!r} has none: add it"
        )
    asserts = split_check(text, task.entry_point)
    if asserts is not None:
        try:
            return _calls(task, [parse_test(one, task.entry_point, text) for one in asserts])
        except UnsupportedTest:
            pass  # the same tests as a program
    return _beside(task, check_program(text, task.entry_point))


def _beside(task: Task, program: TestProgram) -> Plan:
    setup = imports_of(task.setup)  # the rest is the tests' own, and runs where they run

    def job(source: str, limits: Limits) -> Job:
        return Job(uid=task.uid, source=source, setup=setup, tests=program, limits=limits)

    def verdicts(run: Execution) -> tuple[bool, ...]:
        return tuple(reply.value is True for reply in run.results)

    return Plan(tier="T1", total=len(program.parts), job=job, verdicts=verdicts)


def _in_process(task: Task, script: Script) -> Plan:
    def job(source: str, limits: Limits) -> Job:
        return Job(uid=task.uid, source=source, setup=task.setup, tests=script.tests, profile="compat", limits=limits)

    def verdicts(run: Execution) -> tuple[bool, ...]:
        reports = [reply.value for reply in run.results]
        return tuple(_is_confirmed(report, sites) for report, sites in zip(reports, script.sites, strict=False))

    return Plan(tier="T2", total=len(script.sites), job=job, verdicts=verdicts)


def _is_confirmed(report: object, sites: Sequence[tuple[int, str, ast.expr | None]]) -> bool:
    """True when the tests said that a method passed, and every check that it cannot leave out was seen and holds."""
    assert isinstance(report, list)
    is_passed, seen = report
    required = {number for number, _, _ in sites}
    reached = [(number, value) for number, value in seen if number in required]
    if not is_passed or [number for number, _ in reached] != [number for number, _, _ in sites]:
        return False
    for (_, value), (_, kind, constant) in zip(reached, sites, strict=True):
        if kind == "equal" and constant is not None and value != ast.literal_eval(constant):
            return False
        if kind == "true" and not _truth(value):
            return False
    return True


def _truth(value: object) -> bool:
    try:
        return bool(value)
    except TypeError:  # an opaque value without a truth
        return False


def _evalplus(task: Task, expected: Expected | None) -> Plan:
    arguments = tuple(map(evalplus.parse_arguments, task.hidden_tests))

    def job(program: str, limits: Limits) -> Job:
        assert expected is not None
        calls = tuple(
            _call(task, text, evalplus.is_exact(task, value))
            for text, value in zip(task.hidden_tests, expected.values, strict=True)
        )
        limits = replace(
            limits,
            cpu_seconds=limits.cpu_seconds + math.ceil(_SLOWER * expected.cpu_seconds),
            wall_seconds=limits.wall_seconds + _SLOWER * expected.wall_seconds,
            output_kb=max(limits.output_kb, _OUTPUT_KB),
        )
        return Job(uid=task.uid, source=program, setup=task.setup, calls=calls, limits=limits)

    def verdicts(run: Execution) -> tuple[bool, ...]:
        assert expected is not None
        return tuple(
            reply.raised is None and evalplus.matches(task, args, reply.value, value)
            for args, reply, value in zip(arguments, run.results, expected.values, strict=False)
        )

    return Plan(tier="T0", total=len(arguments), job=job, verdicts=verdicts)


def _call(task: Task, text: str, may_digest: bool) -> Call:
    assert task.entry_point is not None
    return Call(function=task.entry_point, args=evalplus.parse_arguments(text), may_digest=may_digest)


def _stdio(task: Task) -> Plan:
    cases = tuple(map(parse_stdio, task.hidden_tests))
    # All cases together: room for the right answers twice over, blanks included.
    output_kb = sum(2 * len(stdout.encode(errors="replace")) for _, stdout in cases) // 1024 + 1

    def job(program: str, limits: Limits) -> Job:
        limits = replace(limits, output_kb=max(limits.output_kb, output_kb))
        return Job(uid=task.uid, source=program, stdin_cases=tuple(stdin for stdin, _ in cases), limits=limits)

    def verdicts(run: Execution) -> tuple[bool, ...]:
        return tuple(
            same_output(str(reply.value), stdout, task.atol)
            for reply, (_, stdout) in zip(run.results, cases, strict=False)
        )

    def checker(run: Execution, limits: Limits) -> Job:
        calls = tuple(
            Call(function="check", args=(stdin, stdout, str(reply.value)))
            for reply, (stdin, stdout) in zip(run.results, cases, strict=False)
        )
        return Job(uid=f"{task.uid} checker", source=task.checker, calls=calls, limits=limits)

    if not task.checker:
        return Plan(tier="T0", total=len(cases), job=job, verdicts=verdicts)
    refuse_what_runs_values(task.checker)
    return Plan(tier="T1", total=len(cases), job=job, verdicts=_checked, checker=checker)


def _checked(run: Execution) -> tuple[bool, ...]:
    return tuple(reply.raised is None and reply.value is True for reply in run.results)


def _one_program(task: Task) -> str:
    if len(task.hidden_tests) != 1:
        raise UnsupportedTest(
            f"style {task.style!r} has one hidden test, which is a program; task {task.uid!r} has "
            f"{len(task.hidden_tests)}: join them"
        )
    return task.hidden_tests[0]
