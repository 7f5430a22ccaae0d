"""Style `check`: one program with a function `check(candidate)`, as HumanEval has.

A `check` whose body is asserts over calls is split like the style `assert` (tier T0). Any other runs as a program
beside the one under test (tier T1).
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from functools import lru_cache

from coupled.reward.styles.asserts import calls_plan, parse_test
from coupled.reward.styles.programs import (
    as_part,
    build_program,
    has_assert,
    is_main_guard,
    one_program,
    parsed,
    program_plan,
    refused,
)
from coupled.reward.styles.style import Expected, Plan, TestStyle
from coupled.reward.types import Task, UnsupportedTest
from coupled.sandbox import TestProgram


def plan(task: Task, expected: Expected | None = None) -> Plan:
    """Return how the task is judged: T0 where its `check` is asserts over calls, else T1. Raises UnsupportedTest."""
    text = "\n".join((task.setup, one_program(task)))
    if not task.entry_point:
        raise UnsupportedTest(
            f"style 'check' needs an entry point for its candidate; task {task.uid!r} has none: add it"
        )
    asserts = split_check(text, task.entry_point)
    if asserts is not None:
        try:
            return calls_plan(task, [parse_test(one, task.entry_point, text) for one in asserts])
        except UnsupportedTest:
            pass  # the same tests as a program
    return program_plan(task, check_program(text, task.entry_point))


def recognises(module: ast.Module) -> bool:
    """Return True for a module that defines a function `check`."""
    return any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in module.body)


def split_check(text: str, entry_point: str) -> tuple[str, ...] | None:
    """Return the asserts of `check(candidate)`, over the entry point; None when its body is more than asserts."""
    body = parsed(text).body
    check = _check_function(body)
    if check is None or any(isinstance(node, ast.FunctionDef | ast.ClassDef) and node is not check for node in body):
        return None
    candidate = check.args.args[0].arg
    rename = _Rename(candidate, ast.parse(entry_point, mode="eval").body)
    asserts = []
    for node in check.body:
        if isinstance(node, ast.Assert):
            asserts.append(ast.unparse(rename.visit(node)))
        elif not (isinstance(node, ast.Pass | ast.Import) or _is_text(node)):
            return None
    return tuple(asserts) or None


@lru_cache(maxsize=1 << 12)
def check_program(text: str, entry_point: str) -> TestProgram:
    """Return the test program of `check(candidate)`: each statement of it with an assert is one part.

    Raises UnsupportedTest when there is no such function, or when the tests would run what the program gives.
    """
    module = parsed(text)
    check = _check_function(module.body)
    if check is None:
        raise refused(text, "there is no function check(candidate)")
    count = itertools.count()
    check.body = [as_part([node], count) if has_assert(node) else node for node in check.body]
    module.body = [node for node in module.body if not (is_main_guard(node) or _calls_check(node))]
    module.body = [*module.body, *ast.parse(f"check({entry_point})").body]
    return build_program(text, module, next(count), entry_point)


def _check_function(body: Sequence[ast.stmt]) -> ast.FunctionDef | None:
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check" and node.args.args]
    return found[-1] if found else None


def _calls_check(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "check"
    )


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


class _Rename(ast.NodeTransformer):
    """Replaces a name by an expression."""

    def __init__(self, name: str, by: ast.expr) -> None:
        self.name, self.by = name, by

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.by if node.id == self.name else node


STYLE = TestStyle(name="check", plan=plan, recognises=recognises, is_program=True)
