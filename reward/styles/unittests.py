"""Style `unittest`: test classes over functions of the program, run as a program beside it (tier T1)."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import lru_cache

from coupled.reward.styles.programs import build_program, is_main_guard, methods_of, one_program, parsed, program_plan
from coupled.reward.styles.style import Expected, Plan, TestStyle
from coupled.reward.types import Task
from coupled.sandbox import TestProgram


def plan(task: Task, expected: Expected | None = None) -> Plan:
    """Return how the task is judged, method by method. Raises UnsupportedTest."""
    return program_plan(task, unittest_program(one_program(task), task.entry_point, task.setup))


def recognises(module: ast.Module) -> bool:
    """Return True for a module that defines a subclass of `TestCase`."""
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    return any(ast.unparse(base).endswith("TestCase") for node in classes for base in node.bases)


@lru_cache(maxsize=1 << 12)
def unittest_program(text: str, entry_point: str | None, setup: str = "") -> TestProgram:
    """Return the test program of test classes: each method is one part. Raises UnsupportedTest."""
    text = f"{setup}\n{text}"
    module = parsed(text)
    module.body = [node for node in module.body if not is_main_guard(node)]
    parts = tuple(f"{owner.name}.{method.name}" for owner, method in methods_of(text, module))
    program = build_program(text, module, 0, entry_point)
    return replace(program, parts=parts)


STYLE = TestStyle(name="unittest", plan=plan, recognises=recognises, is_program=True)
