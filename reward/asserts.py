"""Tests in `assert` form, split in two: calls for the sandbox, and a check for the host.

`assert set(f([1, 2])) == {1, 2}` becomes the call `f([1, 2])` and the check `set(□) == {1, 2}`: the program
sees inputs only, the expected value never leaves the host. Done once per test and kept.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from coupled.reward.expressions import FAILURES, Slot, Unsupported, evaluate, function_name
from coupled.reward.types import Task, UnsupportedTest
from coupled.sandbox import Call, CallResult


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTest:
    """One test: what to call, and what must hold of the replies."""

    text: str
    calls: tuple[Call, ...]
    checks: tuple[ast.expr, ...]
    """All must be true; each `Slot` in them stands for the reply to the call of that number."""

    def holds(self, replies: Sequence[CallResult]) -> bool:
        """True when every check is true of the replies, which may be fewer than the calls."""
        try:
            return all(bool(evaluate(check, replies)) for check in self.checks)
        except FAILURES:
            return False


def parse_tests(task: Task) -> tuple[ParsedTest, ...]:
    """Return the hidden tests of a task; UnsupportedTest naming the first that cannot be split."""
    return tuple(parse_test(text, task.entry_point) for text in task.hidden_tests)


@lru_cache(maxsize=1 << 16)
def parse_test(text: str, entry_point: str | None) -> ParsedTest:
    """Split one test, which is one or more asserts and maybe `import math`.

    Calls of `entry_point`, of `Class().method`, and of any name the evaluator does not know go to the
    program; their arguments must be literals, or literals combined by what `expressions` has. Raises
    UnsupportedTest.
    """
    try:
        body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _unsupported(text, f"it does not parse: {error}") from None
    splitter = _Splitter(entry_point)
    checks: list[ast.expr] = []
    try:
        for statement in body:
            if isinstance(statement, ast.Assert):
                checks.append(splitter.visit(statement.test))
            elif not (isinstance(statement, ast.Import) and ast.unparse(statement) == "import math"):
                raise Unsupported(f"{type(statement).__name__} statement")
        for check in checks:
            _check_supported(check)
    except Unsupported as error:
        raise _unsupported(text, str(error)) from None
    if not splitter.calls:
        raise _unsupported(text, "it calls nothing of the program, so it would pass without one")
    calls = tuple(
        replace(call, may_digest=_is_only_compared(index, checks)) for index, call in enumerate(splitter.calls)
    )
    return ParsedTest(text=text, calls=calls, checks=tuple(checks))


def _is_only_compared(index: int, checks: Sequence[ast.expr]) -> bool:
    """True when all that is asked of a reply is whether it equals a value of the test."""
    for check in checks:
        slots = [node for node in ast.walk(check) if isinstance(node, Slot)]
        if any(slot.index == index for slot in slots):
            return (
                isinstance(check, ast.Compare)
                and len(slots) == len(check.ops) == 1
                and isinstance(check.ops[0], ast.Eq)
                and slots[0] in (check.left, check.comparators[0])
            )
    return False


class _Splitter(ast.NodeTransformer):
    """Replaces every call of the program by a slot and keeps the call."""

    def __init__(self, entry_point: str | None) -> None:
        self.entry_point = entry_point
        self.calls: list[Call] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = self.program_function(node.func)
        if name is None:
            return self.generic_visit(node)
        if any(isinstance(arg, ast.Starred) for arg in node.args) or any(word.arg is None for word in node.keywords):
            raise Unsupported(f"* or ** in the arguments of {name}")
        args = tuple(_literal(arg) for arg in node.args)
        kwargs = {str(word.arg): _literal(word.value) for word in node.keywords}
        self.calls.append(Call(function=name, args=args, kwargs=kwargs))
        return Slot(len(self.calls) - 1)

    def program_function(self, node: ast.expr) -> str | None:
        match node:
            case ast.Name(id=name) if name == self.entry_point or function_name(node) is None:
                return name
            case ast.Attribute(value=ast.Call(func=ast.Name(id=owner), args=[], keywords=[]) as made, attr=method):
                return f"{owner}().{method}" if function_name(made.func) is None else None
        return None


def _literal(node: ast.expr) -> object:
    """Return the value of an argument, which must not need the program or the setup."""
    try:
        return evaluate(node, ())
    except FAILURES as error:  # Unsupported is one of them
        raise Unsupported(f"the argument {ast.unparse(node)[:80]!r} is no literal: {error}") from None


def _check_supported(node: ast.AST) -> None:
    """Raise Unsupported when the evaluator lacks any part of the check.

    Found out by evaluating each part without replies: what is missing shows as Unsupported, the rest as a
    failure.
    """
    if isinstance(node, ast.expr) and not isinstance(node, Slot | ast.Slice):
        try:
            evaluate(node, ())
        except Unsupported:
            raise
        except FAILURES:
            pass
    if isinstance(node, ast.Attribute):
        return  # evaluating it has looked the whole name up
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.Call) and child is node.func:
            continue  # a function's name is no value; evaluating the call has looked it up
        _check_supported(child)


def _unsupported(text: str, reason: str) -> UnsupportedTest:
    return UnsupportedTest(
        f"a test is asserts over calls of the program with literal arguments; received {text[:300]!r}: "
        f"{reason}: drop the task, or rewrite the test"
    )
