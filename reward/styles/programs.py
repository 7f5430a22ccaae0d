"""Tests that are a program of their own: cut into parts that are judged one by one, or refused.

They run in a sandbox beside the program's (tier T1), where the names that the tests take from the program are stubs.
The styles `assert`, `check` and `unittest` build their test programs here.
"""

from __future__ import annotations

import ast
import builtins
import datetime
import importlib
import math
import sys
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from coupled.reward.styles.style import Plan
from coupled.reward.types import Task, UnsupportedTest
from coupled.sandbox import Execution, Job, Limits, TestProgram

_MODULES = frozenset(
    [
        "bisect",
        "cmath",
        "collections",
        "copy",
        "datetime",
        "decimal",
        "fractions",
        "functools",
        "heapq",
        "itertools",
        "json",
        "math",
        "operator",
        "os",
        "random",
        "re",
        "statistics",
        "string",
        "sys",
        "time",
        "typing",
        "unittest",
    ]
)
"""Modules that tests use without importing them, because the program of the dataset's author did."""
_RUNNERS = frozenset(
    [
        "code",
        "codeop",
        "ctypes",
        "dill",
        "importlib",
        "joblib",
        "marshal",
        "multiprocessing",
        "pickle",
        "pty",
        "runpy",
        "shelve",
        "subprocess",
    ]
)
_RUN_CALLS = frozenset(("eval", "exec", "compile", "__import__"))
_LIBRARY: dict[str, str] = {
    "Counter": "collections",
    "OrderedDict": "collections",
    "defaultdict": "collections",
    "deque": "collections",
    "Decimal": "decimal",
    "Fraction": "fractions",
}
"""Classes that tests use without importing them, and their modules."""
_NEEDS_THE_PROCESS = frozenset(
    [
        "unittest.mock",
        "mock",
        "pytest_mock",
        "tempfile",
        "shutil",
        "sys.stdin",
        "sys.stdout",
        "sys.stderr",
        "sys.argv",
        "builtins.input",
        "builtins.print",
    ]
)
"""Names with which tests reach into the program's process or share files with it."""
_NEEDS_THE_STREAMS = frozenset(("redirect_stdout", "redirect_stderr", "capsys", "capfd", "monkeypatch"))
_TYPE_CHECKS = {
    "isinstance": 1,
    "issubclass": 1,
    "assertIsInstance": 1,
    "assertNotIsInstance": 1,
    "assertRaises": 0,
    "assertRaisesRegex": 0,
}
"""Position of the argument that is a type."""
_ATTRIBUTES = frozenset(
    name
    for kind in (
        int,
        float,
        complex,
        str,
        bytes,
        list,
        tuple,
        set,
        frozenset,
        dict,
        range,
        type(None),
        Decimal,
        Fraction,
    )
    for name in dir(kind)
) | frozenset(name for kind in (datetime.datetime, datetime.time, datetime.timedelta) for name in dir(kind))
"""Attributes that the replies of a plain function can have."""


def one_program(task: Task) -> str:
    """Return the one hidden test of a task whose style is a program. Raises UnsupportedTest when it has not one."""
    if len(task.hidden_tests) != 1:
        raise UnsupportedTest(
            f"style {task.style!r} has one hidden test, which is a program; task {task.uid!r} has "
            f"{len(task.hidden_tests)}: join them"
        )
    return task.hidden_tests[0]


def program_plan(task: Task, program: TestProgram) -> Plan:
    """Return the plan that runs the tests in a sandbox beside the program's (tier T1)."""
    setup = imports_of(task.setup)  # the rest belongs to the tests, and runs where they run

    def job(source: str, limits: Limits) -> Job:
        return Job(uid=task.uid, source=source, setup=setup, tests=program, limits=limits)

    def verdicts(run: Execution) -> tuple[bool, ...]:
        return tuple(reply.value is True for reply in run.results)

    return Plan(tier="T1", total=len(program.parts), job=job, verdicts=verdicts)


def build_program(text: str, module: ast.Module, num_parts: int, entry_point: str | None) -> TestProgram:
    """Return the program of tests, with the names that it takes from the program under test.

    `module` is the parsed `text` after its parts were marked, and is changed; `num_parts` counts the marks. Without an
    entry point, every name that neither the tests nor Python define is the program's. Raises UnsupportedTest for tests
    that cannot run apart from the program, or that would call nothing of it.
    """
    bound = _bound(text, module)
    for node in ast.walk(module):
        _refuse_what_runs_values(text, node)
        _refuse_what_needs_the_process(text, node, bound)
    wanted = {_owner(entry_point)} - {""} | _imported_from_solution(module)
    if own := wanted & _defined_at_the_top(module):
        raise refused(text, f"it defines {own.pop()!r} itself, which the task expects from the program")
    used = {node.id for node in ast.walk(module) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    free = {name for name in used - bound - {"__part__", "__name__"} if not hasattr(builtins, name)} | wanted
    imports = sorted((free & _MODULES) - wanted)
    library = library_names(free - set(imports), entry_point)
    names = free - {*imports, *library}
    if not names:
        raise refused(text, "it calls nothing of the program, so it would pass without one")
    classes = {name for name in names if looks_like_a_class(name)}
    if not entry_point and (unclear := unclear_names(names)):
        raise refused(
            text, f"{min(unclear)!r} may be the program's or Python's: name the tested function in entry_point"
        )
    if entry_point and (strangers := names - classes - wanted):
        raise refused(
            text,
            f"it uses {min(strangers)!r}, which it does not define, and of the program only {entry_point!r} counts",
        )
    for node in ast.walk(module):
        _refuse_what_cannot_come(text, node, names, classes)
    given = [f"import {name}" for name in imports] + [f"from {library[name]} import {name}" for name in sorted(library)]
    body = [node for node in module.body if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")]
    module.body = [*ast.parse("\n".join(given)).body, *body]
    source = ast.unparse(ast.fix_missing_locations(module))
    parts = tuple(map(str, range(num_parts)))
    return TestProgram(source=source, parts=parts, names=tuple(sorted(names)), classes=tuple(sorted(classes)))


def methods_of(text: str, module: ast.Module) -> list[tuple[ast.ClassDef, ast.FunctionDef]]:
    """Return the test methods of all test classes, each with its class. UnsupportedTest when there is none."""
    methods = [
        (owner, method)
        for owner in module.body
        if isinstance(owner, ast.ClassDef) and any(ast.unparse(base).endswith("TestCase") for base in owner.bases)
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and method.name.startswith("test")
    ]
    if not methods:
        raise refused(text, "there is no test method in a class of unittest.TestCase")
    return methods


def as_part(body: list[ast.stmt], count: Iterator[int]) -> ast.stmt:
    """Return statements as one part, which the sandbox reports on by its number."""
    part = ast.parse(f"with __part__({next(count)}): pass").body[0]
    assert isinstance(part, ast.With)
    part.body = body
    return part


def has_assert(node: ast.stmt) -> bool:
    """Return True for a statement with an assert in it."""
    return any(isinstance(inner, ast.Assert) for inner in ast.walk(node))


def is_main_guard(node: ast.stmt) -> bool:
    """Return True for `if __name__ == ...`."""
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def parsed(text: str) -> ast.Module:
    """Return the parsed text of a test. UnsupportedTest when it does not parse."""
    try:
        return ast.parse(text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise refused(text, f"it does not parse: {error}") from None


def refused(text: str, reason: str) -> UnsupportedTest:
    """Return the error for a test program that cannot be judged."""
    return UnsupportedTest(
        f"tests are a program that calls the one under test and asserts; received {text[:300]!r}: {reason}: "
        "drop the task, or rewrite the test"
    )


def library_names(free: AbstractSet[str], entry_point: str | None) -> dict[str, str]:
    """Return the free names that are the standard library's, with their modules.

    Without an entry point only classes, and when the tests use nothing else of the program, not even these: they may be
    tests of a class `Counter`.
    """
    library = _LIBRARY | (dict.fromkeys(dir(math), "math") if entry_point else {})
    known = {name: library[name] for name in free if name in library and name != _owner(entry_point)}
    return known if entry_point or free - known.keys() - set(dir(builtins)) else {}


def unclear_names(free: AbstractSet[str]) -> AbstractSet[str]:
    """Return the free names that could be a function of `math` or one of the program: `isclose` beside a function `f`.

    When every free name is such, the tests take them from the program.
    """
    unclear = free & set(dir(math))
    return unclear if free - unclear else set()


def looks_like_a_class(name: str) -> bool:
    """True for a name such as `Stack`."""
    return name.lstrip("_")[:1].isupper()


@lru_cache(maxsize=1 << 12)
def bound_by(text: str) -> frozenset[str]:
    """Return the names that code defines, anywhere in it. UnsupportedTest when it does not parse."""
    return frozenset(_bound(text, parsed(text)))


def imports_of(text: str) -> str:
    """Return the imports at the top of a code, alone. UnsupportedTest when it does not parse."""
    return "\n".join(ast.unparse(node) for node in parsed(text).body if isinstance(node, ast.Import | ast.ImportFrom))


def refuse_what_runs_values(text: str) -> None:
    """Raise UnsupportedTest for a test program that could run values of the program under test."""
    for node in ast.walk(parsed(text)):
        _refuse_what_runs_values(text, node)


def _owner(entry_point: str | None) -> str:
    return (entry_point or "").partition("()")[0].partition(".")[0]


def _imported_from_solution(module: ast.Module) -> set[str]:
    """Return the names that the tests import from the program, as from a module `solution`."""
    names: set[str] = set()
    for node in ast.walk(module):
        match node:
            case ast.ImportFrom(module="solution"):
                names |= {alias.name for alias in node.names} - {"*"}
            case ast.Attribute(value=ast.Name(id="solution"), attr=name):
                names.add(name)
    return names


def _refuse_what_runs_values(text: str, node: ast.AST) -> None:
    runs = [module for module in _modules_of(node) if module.partition(".")[0] in _RUNNERS]
    if isinstance(node, ast.Name) and node.id in _RUN_CALLS:
        runs.append(node.id)
    if runs:
        raise refused(text, f"it uses {runs[0]}, with which the tests could run values of the program")


def _refuse_what_needs_the_process(text: str, node: ast.AST, bound: AbstractSet[str]) -> None:
    """Raise for a construct that cannot work between two sandboxes: it would fail every program."""
    uses = [module for module in _modules_of(node) if module in _NEEDS_THE_PROCESS]
    match node:
        case ast.Name(id=name) if name in _NEEDS_THE_STREAMS or (name == "open" and name not in bound):
            uses.append(name)
        case ast.arg(arg=name) if name in _NEEDS_THE_STREAMS:
            uses.append(name)
        case ast.Attribute(attr=name) if name in _NEEDS_THE_STREAMS or ast.unparse(node) in _NEEDS_THE_PROCESS:
            uses.append(ast.unparse(node))
    if uses:
        raise refused(text, f"it uses {uses[0]}, which needs the program's own process (style 'script', tier T2)")
    for module in _modules_of(node):
        top = module.partition(".")[0]
        if top != "solution" and top not in sys.stdlib_module_names:
            raise refused(text, f"it imports {module or 'a relative module'!r}, which the sandbox does not have")


def _refuse_what_cannot_come(text: str, node: ast.AST, names: AbstractSet[str], classes: AbstractSet[str]) -> None:
    """Raise for a use of the program's names that cannot work by calls alone: it would fail every program."""
    types: list[ast.expr] = []
    match node:
        case ast.Call(func=function) if (name := ast.unparse(function).rpartition(".")[2]) in _TYPE_CHECKS:
            types = node.args[_TYPE_CHECKS[name] :][:1]
        case ast.ExceptHandler(type=ast.expr() as kind):
            types = [kind]
        case ast.ClassDef():
            types = node.bases
        case ast.Compare() if any(ast.unparse(side).startswith("type(") for side in [node.left, *node.comparators]):
            types = [node.left, *node.comparators]
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in names - classes:
            raise refused(text, f"it takes {attribute!r} from {name!r}, which it does not define")
        case ast.Attribute(value=ast.Call(func=ast.Name(id=name)), attr=attribute) if (
            name in names and not classes and attribute not in _ATTRIBUTES
        ):
            raise refused(text, f"it reads {attribute!r} of a reply of {name!r}, which no builtin value has")
    for kind in types:
        for one in kind.elts if isinstance(kind, ast.Tuple) else [kind]:
            if isinstance(one, ast.Name) and one.id in names:
                raise refused(text, f"it uses {one.id!r} of the program as a type, and types do not leave it")


def _modules_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "" if node.level else node.module or ""
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


def _defined_at_the_top(module: ast.Module) -> set[str]:
    names = {node.name for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {
        target.id
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _bound(text: str, module: ast.Module) -> set[str]:
    """Return the names that the tests define themselves, anywhere."""
    names: set[str] = set()
    for node in ast.walk(module):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.ImportFrom(module="solution"):
                names |= {alias.asname for alias in node.names if alias.asname}
            case ast.ImportFrom() if any(alias.name == "*" for alias in node.names):
                if node.module not in _MODULES:
                    raise refused(text, f"it imports * from {node.module!r}: name what it needs")
                names |= set(dir(importlib.import_module(node.module)))
            case ast.Import() | ast.ImportFrom():
                names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            case ast.ExceptHandler(name=str(name)):
                names.add(name)
    return names
