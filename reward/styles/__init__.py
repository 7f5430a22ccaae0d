"""Test styles: how the hidden tests of a task are read, run and judged.

Each style is one `TestStyle` record in a file of its own; `STYLES` lists them, and nothing else in the project decides
by the name of a style. To add one:

1. Add `reward/styles/NAME.py` with a function `plan(task, expected)` and one record
   `STYLE = TestStyle(name="NAME", plan=plan)`. The plan holds the job that runs a program against the hidden tests, and
   the function that turns its execution into one bool per test. Prefer tier T0: send inputs with the job (`calls`,
   `stdin_cases`), keep the expected values, and compare here. Raise UnsupportedTest (rule, value received, remedy) for
   a test that cannot be judged: such tasks are left out before training starts, and reported.
2. Set the other fields of the record where the default is wrong; `style.py` documents each.
3. Add the record to `STYLES` below. Dataset rows, `Task`, the judge, time limits and `coupled sandbox run` follow it.
4. Add tests in `tests/reward/`: a right program passes, a wrong one fails, tests outside of the rule are refused, and a
   program that tries to forge its verdict fails (`test_forging.py`).

Shared parts: `asserts.calls_plan` judges by calls (T0), `programs.program_plan` by a test program beside the program
(T1), `expressions` evaluates a check over the replies.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

from coupled.reward.styles import asserts, check, evalplus, script, stdio, unittests
from coupled.reward.styles.style import Expected, Plan, ReferenceRun, TestStyle
from coupled.reward.types import Task, UnsupportedTest

__all__ = [
    "PROGRAM_STYLES",
    "STYLES",
    "Expected",
    "Plan",
    "ReferenceRun",
    "TestStyle",
    "num_runs",
    "plan",
    "style_of",
]

STYLES: Mapping[str, TestStyle] = {
    style.name: style
    for style in (asserts.STYLE, check.STYLE, unittests.STYLE, evalplus.STYLE, stdio.STYLE, script.STYLE)
}
"""Name → style. A row that names no style has the first one that recognises its test, or `assert`."""
PROGRAM_STYLES = tuple(style.name for style in STYLES.values() if style.is_program)
"""Names of the styles whose one hidden test is a whole program."""


def plan(task: Task, *, allow_weak: bool = False, expected: Expected | None = None) -> Plan:
    """Return how a task is judged. `expected` is needed to run the plan of a style with a reference, not to make it.

    Raises UnsupportedTest when its tests cannot be judged, or only by tier T2 while `allow_weak` is off.
    """
    style = STYLES[task.style]
    if style.is_weak and not allow_weak:
        raise UnsupportedTest(
            f"tests of style {style.name!r} run in the program's own process, where it can forge them (tier T2); "
            f"task {task.uid!r} needs it and it is off: drop the task, or set reward.allow_weak: true "
            "(coupled sandbox run: --allow-weak)"
        )
    return style.plan(task, expected)


def num_runs(task: Task) -> int:
    """Return how many runs of a program, each with its own wall time, judging the task takes."""
    return len(task.hidden_tests) if STYLES[task.style].has_run_per_test else 1


def style_of(text: str) -> str:
    """Return the name of the style that recognises the text of a test; `assert` when none does."""
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return asserts.STYLE.name
    found = (name for name, style in STYLES.items() if style.recognises is not None and style.recognises(module))
    return next(found, asserts.STYLE.name)
