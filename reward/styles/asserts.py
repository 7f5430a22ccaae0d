"""Style `assert`: each test is asserts over calls, split in two: calls for the sandbox, and a check for the host.

`assert set(f([1, 2])) == {1, 2}` becomes the call `f([1, 2])` and the check `set(□) == {1, 2}`: the program
sees inputs only, the expected value never leaves the host (tier T0). Each test is split once and kept. Tests that
cannot be split run as a program beside the one under test (tier T1).
"""

from __future__ import annotations

import ast
import builtins
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from coupled.reward.styles.expressions import FAILURES, FUNCTIONS, NoReply, Slot, Unsupported, evaluate, function_name
from coupled.reward.styles.programs import (
    as_part,
    bound_by,
    build_program,
    has_assert,
    library_names,
    looks_like_a_class,
    parsed,
    program_plan,
    refused,
    unclear_names,
)
from coupled.reward.styles.style import Expected, Plan, TestStyle
from coupled.reward.types import Task, UnsupportedTest
from coupled.sandbox import Call, CallResult, Execution, Job, Limits, TestProgram


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTest:
    """One test: the calls, and the checks that must hold for the replies."""

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


def plan(task: Task, expected: Expected | None = None) -> Plan:
    """Return how the task is judged: T0 where every test can be split, else T1. Raises UnsupportedTest."""
    try:
        tests = parse_tests(task)
    except UnsupportedTest:
        return program_plan(task, asserts_program(task.hidden_tests, task.entry_point, task.setup))
    return calls_plan(task, tests)


def calls_plan(task: Task, tests: Sequence[ParsedTest]) -> Plan:
    """Return the plan that sends the calls of all tests to the program and checks the replies here (tier T0)."""
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


def parse_tests(task: Task) -> tuple[ParsedTest, ...]:
    """Return the hidden tests of a task; UnsupportedTest naming the first that cannot be split."""
    return tuple(parse_test(text, task.entry_point, task.setup) for text in task.hidden_tests)


@lru_cache(maxsize=1 << 16)
def parse_test(text: str, entry_point: str | None, setup: str = "") -> ParsedTest:
    """Split one test, which is one or more asserts and maybe `import math`.

    Calls of `entry_point` go to the program, and no others. Without one, the program receives the calls of every name
    that neither Python nor the setup defines, and of methods of a fresh object, `Class().method`. Arguments must be
    literals, or literals combined by the operations of `expressions`. Raises UnsupportedTest.
    """
    try:
        module = ast.parse(text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _unsupported(text, f"it does not parse: {error}") from None
    bound = bound_by(setup)
    called = {
        node.func.id for node in ast.walk(module) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    free = {name for name in called - bound if name not in FUNCTIONS and not hasattr(builtins, name)}
    splitter = _Splitter(entry_point, bound | library_names(free, entry_point).keys() | unclear_names(free))
    body = module.body
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
        replace(call, may_digest=_is_only_compared(index, checks), items=_use_of_items(index, checks))
        for index, call in enumerate(splitter.calls)
    )
    return ParsedTest(text=text, calls=calls, checks=tuple(checks))


@lru_cache(maxsize=1 << 12)
def asserts_program(texts: tuple[str, ...], entry_point: str | None, setup: str) -> TestProgram:
    """Return the test program of a list of tests: each is one part. Raises UnsupportedTest."""
    count = itertools.count()
    module = parsed(setup)
    for text in texts:
        body = parsed(text).body
        if not any(map(has_assert, body)):
            raise refused(text, "it asserts nothing, so it would pass without a program")
        module.body = [*module.body, as_part(body, count)]
    return build_program("\n".join((setup, *texts)), module, next(count), entry_point)


def _is_only_compared(index: int, checks: Sequence[ast.expr]) -> bool:
    """True when the test only compares the reply with a value for equality."""
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


_WALKERS = ("list", "tuple", "set", "frozenset", "sorted", "sum", "min", "max", "all", "any")


def _use_of_items(index: int, checks: Sequence[ast.expr]) -> str:
    """Return `walked` or `counted` when a test does nothing else with a reply, as in `list(f(3))`; else no text."""
    for node in (node for check in checks for node in ast.walk(check)):
        match node:
            case ast.Call(func=function, args=[Slot() as slot]) if slot.index == index:
                name = function_name(function)
                return "walked" if name in _WALKERS else "counted" if name == "len" else ""
            case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[Slot() as slot]) if slot.index == index:
                return "walked"
    return ""


class _Splitter(ast.NodeTransformer):
    """Replaces every call of the program by a slot and keeps the call."""

    def __init__(self, entry_point: str | None, bound: Collection[str]) -> None:
        self.entry_point = entry_point
        self.bound = bound
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
            case ast.Name(id=name) if name == self.entry_point or (self.entry_point is None and self.is_free(node)):
                return name
            case ast.Attribute(value=ast.Call(func=ast.Name(id=owner) as made, args=[], keywords=[]), attr=method):
                return f"{owner}().{method}" if self.is_class(made, method) else None
        return None

    def is_free(self, node: ast.Name) -> bool:
        """True when only the program can define the name: a builtin that the program redefines could be anything."""
        return function_name(node) is None and not hasattr(builtins, node.id) and node.id not in self.bound

    def is_class(self, node: ast.Name, method: str) -> bool:
        """True for a class of the program. A method of a function's reply would be code of the program's choice."""
        if self.entry_point is None:
            return self.is_free(node) and looks_like_a_class(node.id)
        owner, dot, _ = self.entry_point.partition("().")
        return (bool(dot) and node.id == owner) or (
            method == self.entry_point and self.is_free(node) and looks_like_a_class(node.id)
        )


def _literal(node: ast.expr) -> object:
    """Return the value of an argument, which must not need the program or the setup."""
    try:
        return evaluate(node, ())
    except FAILURES as error:  # Unsupported is one of them
        raise Unsupported(f"the argument {ast.unparse(node)[:80]!r} is no literal: {error}") from None


def _check_supported(node: ast.AST) -> None:
    """Raise Unsupported when the evaluator lacks any part of the check.

    It evaluates each part without replies: a missing construct shows as Unsupported, anything else as a failure.
    """
    if isinstance(node, ast.expr) and not isinstance(node, Slot | ast.Slice):
        try:
            evaluate(node, ())
        except (NoReply, Unsupported) as error:
            if isinstance(error, Unsupported):
                raise
        except FAILURES as error:
            # It would fail for every reply: if the test makes sense, it is too large for this evaluator.
            raise Unsupported(f"{ast.unparse(node)[:80]!r} cannot be evaluated: {error}") from None
    if isinstance(node, ast.BinOp) and any(isinstance(node.op, op) and _has_kind(node, kinds) for op, kinds in _OTHERS):
        raise Unsupported(f"{type(node.op).__name__} of anything but numbers: {ast.unparse(node)[:80]!r}")
    if isinstance(node, ast.Attribute):
        return  # evaluating it has looked the whole name up
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.Call) and child is node.func:
            continue  # a function's name is no value; evaluating the call has looked it up
        _check_supported(child)


_OTHERS = ((ast.Mod, (ast.Constant, ast.JoinedStr)), (ast.BitOr, (ast.Dict, ast.DictComp)))
"""Operators that Python defines for more than numbers and sets, and the operands that show such a use."""


def _has_kind(node: ast.BinOp, kinds: tuple[type[ast.expr], ...]) -> bool:
    """True when the left operand (of `|`, either) is of these kinds and, if a constant, a text."""
    sides = [node.left] if isinstance(node.op, ast.Mod) else [node.left, node.right]
    return any(
        isinstance(side, kinds) and not (isinstance(side, ast.Constant) and not isinstance(side.value, str | bytes))
        for side in sides
    )


def _unsupported(text: str, reason: str) -> UnsupportedTest:
    return UnsupportedTest(
        f"a test is asserts over calls of the program with literal arguments; received {text[:300]!r}: "
        f"{reason}: drop the task, or rewrite the test"
    )


STYLE = TestStyle(name="assert", plan=plan)
