"""Test styles: one record has every rule of a style, and a new record is all that a new style needs."""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import cast

import pytest

from coupled.reward import PROGRAM_STYLES, STYLES, Judge, Task, UnsupportedTest, num_runs, plan, style_of
from coupled.reward.styles.asserts import calls_plan, parse_test
from coupled.reward.styles.style import Expected, Plan, TestStyle
from coupled.reward.styles.unittests import STYLE as UNITTEST
from coupled.sandbox import Limits, LocalExecutor

SMALL = Limits(cpu_seconds=1, wall_seconds=30.0, memory_mb=128)
UNIT = "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(f(2), 2)\n"


def test_the_table_of_styles_is_the_rules_that_hold() -> None:
    table = {
        name: (style.is_program, style.is_weak, style.has_run_per_test, style.has_checker, style.reference is not None)
        for name, style in STYLES.items()
    }
    assert table == {
        "assert": (False, False, False, False, False),
        "check": (True, False, False, False, False),
        "unittest": (True, False, False, False, False),
        "evalplus": (False, False, False, False, True),
        "stdio": (False, False, True, True, False),
        "script": (True, True, False, False, False),
    }
    assert PROGRAM_STYLES == ("check", "unittest", "script")
    assert all(style.name == name for name, style in STYLES.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"style": "riddle"}, r"style is one of \('assert', 'check', .*task 't' has 'riddle'"),
        ({"style": "evalplus", "reference": "def f(): 1"}, "'evalplus' needs reference and entry_point; task 't'"),
        ({"style": "evalplus", "entry_point": "f"}, "'evalplus' needs reference and entry_point; task 't'"),
        ({"style": "stdio", "setup": "import math"}, "setup goes with tests that call .* 'stdio': drop its setup"),
        ({"checker": "def check(): 1"}, "checker goes with style 'stdio'; task 't' has 'assert': drop it"),
        ({"atol": -1.0}, "atol is a finite number, 0 or more; task 't' has -1.0"),
        ({"style": ["assert"]}, "style is one of .*task 't' has"),
    ],
)
def test_a_task_whose_fields_do_not_fit_its_style_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(uid="t", prompt="", hidden_tests=("assert f() == 1",), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("def check(candidate):\n    assert candidate(1) == 1", "check"),
        (UNIT, "unittest"),
        (UNIT + "def check(candidate): pass", "check"),
        ("assert f(1) == 1", "assert"),
        ("assert f(1) ==", "assert"),
    ],
)
def test_the_text_of_a_test_names_its_style(text: str, name: str) -> None:
    assert style_of(text) == name


def test_weak_styles_are_planned_only_where_they_are_allowed() -> None:
    task = Task(uid="t", prompt="", hidden_tests=(UNIT,), entry_point="f", style="script")
    with pytest.raises(UnsupportedTest, match=r"style 'script' run in the program's own process.*reward.allow_weak"):
        plan(task)
    assert plan(task, allow_weak=True).tier == "T2"
    assert plan(replace(task, style=UNITTEST.name)).tier == "T1"


def doubles_plan(task: Task, expected: Expected | None = None) -> Plan:
    """Each test is a number whose double the program must return."""
    return calls_plan(task, [parse_test(f"assert f({text}) == {2 * int(text)}", "f") for text in task.hidden_tests])


def refuse_setup(task: Task) -> None:
    if task.setup:
        raise ValueError("style 'doubles' has no setup")


DOUBLES = TestStyle(
    name="doubles",
    plan=doubles_plan,
    validate=refuse_setup,
    recognises=lambda module: bool(module.body) and isinstance(module.body[0], ast.Expr),
    has_run_per_test=True,
)


def test_one_record_adds_a_style(executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast("dict[str, TestStyle]", STYLES), "doubles", DOUBLES)
    assert style_of("20") == "doubles"
    task = Task(uid="t", prompt="", hidden_tests=("1", "20"), style="doubles")
    (judgement,) = Judge(executor, SMALL).judge_programs([task], ["def f(x): return x * 2 if x < 9 else 0"])
    assert (judgement.per_test, judgement.tier) == ((True, False), "T0")
    assert num_runs(task) == 2
    with pytest.raises(ValueError, match="'doubles' has no setup"):
        replace(task, setup="import math")


def test_num_runs_counts_the_runs_that_each_have_a_time_limit() -> None:
    cases = ('{"input": "", "output": ""}',) * 3
    assert num_runs(Task(uid="t", prompt="", hidden_tests=cases, style="stdio")) == 3
    assert num_runs(Task(uid="t", prompt="", hidden_tests=("assert f() == 1",) * 3)) == 1
