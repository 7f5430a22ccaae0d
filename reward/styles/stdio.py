"""Style `stdio`: each test feeds standard input, and the host compares standard output (tier T0).

With `Task.checker` a program of the dataset decides instead, in a sandbox of its own (tier T1).
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

from coupled.reward.styles.programs import refuse_what_runs_values
from coupled.reward.styles.style import Expected, Plan, TestStyle
from coupled.reward.types import Task, UnsupportedTest
from coupled.sandbox import Call, Execution, Job, Limits


def plan(task: Task, expected: Expected | None = None) -> Plan:
    """Return how the task is judged, case by case. Raises UnsupportedTest."""
    cases = tuple(map(parse_stdio, task.hidden_tests))
    # All cases together: enough for the right answers twice over, blanks included.
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


def validate(task: Task) -> None:
    """Raise ValueError for a task with a setup: no test calls the program."""
    if task.setup:
        raise ValueError(
            f"setup goes with tests that call the program; task {task.uid!r} has style 'stdio': drop its setup"
        )


def stdio_test(stdin: str, stdout: str) -> str:
    """Return the text of one test: the program reads `stdin` and must print `stdout`."""
    return json.dumps({"input": stdin, "output": stdout})


def parse_stdio(text: str) -> tuple[str, str]:
    """Return input and expected output of the text that `stdio_test` gave; UnsupportedTest for any other."""
    try:
        test = json.loads(text)
        stdin, stdout = test["input"], test["output"]
    except (ValueError, KeyError, TypeError):
        stdin = stdout = None
    if type(stdin) is not str or type(stdout) is not str:
        raise UnsupportedTest(
            f"a stdio test is a JSON object with texts 'input' and 'output'; received {text[:300]!r}: "
            "build it with coupled.reward.stdio_test"
        )
    return stdin, stdout


def same_output(received: str, expected: str, atol: float = 0.0) -> bool:
    """True when all lines are the same up to blanks within a line and blank lines at the end.

    With a tolerance, two words that are numbers may differ by `atol`, or by `atol` times the expected one where
    that is larger than 1.
    """
    left, right = _lines(received), _lines(expected)
    if left == right or atol == 0:
        return left == right
    return [len(line) for line in left] == [len(line) for line in right] and all(
        _same_word(word, wanted, atol)
        for line, other in zip(left, right, strict=True)
        for word, wanted in zip(line, other, strict=True)
    )


def _same_word(word: str, wanted: str, atol: float) -> bool:
    if word == wanted:
        return True
    try:
        number, received = float(wanted), float(word)
    except ValueError:
        return False
    if not (math.isfinite(number) and math.isfinite(received)):
        return number == received  # to an infinite one, every number would be near
    return abs(received - number) <= atol * max(1.0, abs(number))


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.rstrip().split("\n")]


def _checked(run: Execution) -> tuple[bool, ...]:
    return tuple(reply.raised is None and reply.value is True for reply in run.results)


STYLE = TestStyle(name="stdio", plan=plan, validate=validate, has_run_per_test=True, has_checker=True)
