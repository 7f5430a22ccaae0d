"""Style `script`: test classes that must share the program's process (tier T2, weak).

The program can forge what runs beside it. So each value that a check looks at is shown to the host (`__see__`), which
compares it with the test's constant again.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from coupled.reward.styles.programs import is_main_guard, methods_of, one_program, parsed
from coupled.reward.styles.style import Expected, Plan, TestStyle
from coupled.reward.types import Task
from coupled.sandbox import Execution, Job, Limits, TestProgram

_Site = tuple[int, str, ast.expr | None]
_EQUAL = ("assertEqual", "assertEquals", "assertListEqual", "assertDictEqual", "assertTupleEqual", "assertSetEqual")


def plan(task: Task, expected: Expected | None = None) -> Plan:
    """Return how the task is judged, method by method. Raises UnsupportedTest."""
    script = script_program(one_program(task))

    def job(program: str, limits: Limits) -> Job:
        return Job(uid=task.uid, source=program, setup=task.setup, tests=script.tests, profile="compat", limits=limits)

    def verdicts(run: Execution) -> tuple[bool, ...]:
        reports = [reply.value for reply in run.results]
        return tuple(_is_confirmed(report, sites) for report, sites in zip(reports, script.sites, strict=False))

    return Plan(tier="T2", total=len(script.sites), job=job, verdicts=verdicts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """Test classes for the program's own process, and the checks that the host must see of each method."""

    tests: TestProgram
    sites: tuple[tuple[_Site, ...], ...]
    """Per method, the checks it cannot leave out, in order: number, kind (`equal`, `true`, or `any`), constant."""


@lru_cache(maxsize=1 << 12)
def script_program(text: str) -> Script:
    """Return test classes with every check made visible to the host. UnsupportedTest when there is no method."""
    module = parsed(text)
    module.body = [node for node in module.body if not is_main_guard(node)]
    parts, sites = [], []
    count = itertools.count()
    for owner, method in methods_of(text, module):
        parts.append(f"{owner.name}.{method.name}")
        found: list[_Site] = []
        method.body = list(_with_sight(method.body, count, found))
        sites.append(tuple(found))
    source = ast.unparse(ast.fix_missing_locations(module))
    return Script(tests=TestProgram(source=source, parts=tuple(parts), is_in_process=True), sites=tuple(sites))


def _with_sight(body: Sequence[ast.stmt], count: Iterator[int], found: list[_Site]) -> Iterator[ast.stmt]:
    """Yield the statements, with a `__see__` for every check that is reached whenever the method ends well."""
    for node in body:
        if isinstance(node, ast.Return):
            yield node
            return
        check = _check_of(node)
        if check is not None:
            kind, operand, constant = check
            number = next(count)
            found.append((number, kind, constant))
            if operand is None:
                yield from ast.parse(f"__see__({number})").body
            else:
                shown = ast.Call(
                    func=ast.Name("__see__", ast.Load()), args=[ast.Constant(number), operand], keywords=[]
                )
                _Swap(operand, shown).visit(node)
        elif isinstance(node, ast.With):
            # A context manager may swallow an exception, so the statements after it are not certain to be reached.
            swallows = any(name in ast.unparse(item) for item in node.items for name in ("assertRaises", "suppress"))
            inner: list[_Site] = []
            node.body = list(_with_sight(node.body, count, [] if swallows else inner))
            found += inner
        yield node


def _check_of(node: ast.stmt) -> tuple[str, ast.expr | None, ast.expr | None] | None:
    """Return kind, shown operand and constant of a check; None for a statement that is none."""
    if isinstance(node, ast.Assert):
        test = node.test
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            return _equality(test.left, test.comparators[0])
        return "any", None, None
    call = node.value if isinstance(node, ast.Expr) else None
    if not (
        isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr.startswith("assert")
    ):
        return None
    if call.func.attr in _EQUAL and len(call.args) >= 2:
        return _equality(call.args[0], call.args[1])
    if call.func.attr == "assertTrue" and call.args:
        return "true", call.args[0], None
    return "any", None, None


def _equality(left: ast.expr, right: ast.expr) -> tuple[str, ast.expr | None, ast.expr | None]:
    if _is_constant(right) and not _is_constant(left):
        return "equal", left, right
    if _is_constant(left) and not _is_constant(right):
        return "equal", right, left
    return "any", None, None


def _is_constant(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


class _Swap(ast.NodeTransformer):
    """Replaces one node, known by identity."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _is_confirmed(report: object, sites: Sequence[_Site]) -> bool:
    """True when the tests reported a pass, and every check that the method cannot leave out was seen and holds."""
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


STYLE = TestStyle(name="script", plan=plan, is_program=True, is_weak=True)
