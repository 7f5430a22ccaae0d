"""Tests that are a program of their own: cut into parts that are judged one by one, or refused.

`def check(candidate)` whose body is asserts over calls becomes a list of asserts, which needs no program at all.
Everything else runs in a sandbox beside the program's (tier T1), where the names that the tests take from the
program are stubs. Test classes that need the program's own process are tier T2: there each value that a check
looks at is shown to the host (`__see__`), which compares it with the test's constant again.
"""

from __future__ import annotations

import ast
import builtins
import datetime
import importlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from coupled.reward.types import UnsupportedTest
from coupled.sandbox import TestProgram

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
"""With these, tests reach into the program's process or share files with it."""
_NEEDS_THE_STREAMS = frozenset(("redirect_stdout", "redirect_stderr", "capsys", "capfd", "monkeypatch"))
_TYPE_CHECKS = {
    "isinstance": 1,
    "issubclass": 1,
    "assertIsInstance": 1,
    "assertNotIsInstance": 1,
    "assertRaises": 0,
    "assertRaisesRegex": 0,
}
"""Which argument of these is a type."""
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
"""What the replies of a plain function can have."""
_Site = tuple[int, str, ast.expr | None]
_EQUAL = ("assertEqual", "assertEquals", "assertListEqual", "assertDictEqual", "assertTupleEqual", "assertSetEqual")


def split_check(text: str, entry_point: str) -> tuple[str, ...] | None:
    """Return the asserts of `check(candidate)`, over the entry point; None when its body is more than asserts."""
    body = _parsed(text).body
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
    module = _parsed(text)
    check = _check_function(module.body)
    if check is None:
        raise _unsupported(text, "there is no function check(candidate)")
    count = itertools.count()
    check.body = [_as_part([node], count) if _has_assert(node) else node for node in check.body]
    module.body = [node for node in module.body if not (_is_main_guard(node) or _calls_check(node))]
    module.body = [*module.body, *ast.parse(f"check({entry_point})").body]
    return _program(text, module, next(count), entry_point)


@lru_cache(maxsize=1 << 12)
def asserts_program(texts: tuple[str, ...], entry_point: str | None, setup: str) -> TestProgram:
    """Return the test program of a list of tests: each is one part. Raises UnsupportedTest."""
    count = itertools.count()
    module = _parsed(setup)
    for text in texts:
        body = _parsed(text).body
        if not any(map(_has_assert, body)):
            raise _unsupported(text, "it asserts nothing, so it would pass without a program")
        module.body = [*module.body, _as_part(body, count)]
    program = _program("\n".join((setup, *texts)), module, next(count), entry_point)
    return program


@lru_cache(maxsize=1 << 12)
def unittest_program(text: str, entry_point: str | None, setup: str = "") -> TestProgram:
    """Return the test program of test classes: each method is one part. Raises UnsupportedTest."""
    text = f"{setup}\n{text}"
    module = _parsed(text)
    module.body = [node for node in module.body if not _is_main_guard(node)]
    parts = tuple(f"{owner.name}.{method.name}" for owner, method in _methods(text, module))
    program = _program(text, module, 0, entry_point)
    return replace(program, parts=parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """Test classes for the program's own process, and what must be seen of each method."""

    tests: TestProgram
    sites: tuple[tuple[_Site, ...], ...]
    """Per method, the checks it cannot leave out, in order: number, kind (`equal`, `true`, or `any`), constant."""


@lru_cache(maxsize=1 << 12)
def script_program(text: str) -> Script:
    """Return test classes with every check made visible to the host. UnsupportedTest when there is no method."""
    module = _parsed(text)
    module.body = [node for node in module.body if not _is_main_guard(node)]
    parts, sites = [], []
    count = itertools.count()
    for owner, method in _methods(text, module):
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
            # What a context manager may swallow is not certain to be reached.
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


class _Rename(ast.NodeTransformer):
    """Replaces a name by an expression."""

    def __init__(self, name: str, by: ast.expr) -> None:
        self.name, self.by = name, by

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.by if node.id == self.name else node


def library_names(free: AbstractSet[str], entry_point: str | None) -> dict[str, str]:
    """Return the free names that are the standard library's, with their modules.

    Without an entry point only classes, and when nothing else is asked of the program, not even these: it may be
    the tests of a class `Counter`.
    """
    library = _LIBRARY | (dict.fromkeys(dir(math), "math") if entry_point else {})
    known = {name: library[name] for name in free if name in library and name != _owner(entry_point)}
    return known if entry_point or free - known.keys() - set(dir(builtins)) else {}


def unclear_names(free: AbstractSet[str]) -> AbstractSet[str]:
    """Return the free names that could be a function of `math` or one of the program: `isclose` beside a function `f`.

    When all of them are such, they are what the program is asked for.
    """
    unclear = free & set(dir(math))
    return unclear if free - unclear else set()


def looks_like_a_class(name: str) -> bool:
    """True for a name such as `Stack`."""
    return name.lstrip("_")[:1].isupper()


@lru_cache(maxsize=1 << 12)
def bound_by(text: str) -> frozenset[str]:
    """Return the names that code gives itself, anywhere in it. UnsupportedTest when it does not parse."""
    return frozenset(_bound(text, _parsed(text)))


def imports_of(text: str) -> str:
    """Return the imports at the top of a code, alone. UnsupportedTest when it does not parse."""
    return "\n".join(ast.unparse(node) for node in _parsed(text).body if isinstance(node, ast.Import | ast.ImportFrom))


def refuse_what_runs_values(text: str) -> None:
    """Raise UnsupportedTest for a program of the tests' that could run what the program under test gives it."""
    for node in ast.walk(_parsed(text)):
        _refuse_what_runs_values(text, node)


def _owner(entry_point: str | None) -> str:
    return (entry_point or "").partition("()")[0].partition(".")[0]


def _program(text: str, module: ast.Module, num_parts: int, entry_point: str | None) -> TestProgram:
    bound = _bound(text, module)
    for node in ast.walk(module):
        _refuse_what_runs_values(text, node)
        _refuse_what_needs_the_process(text, node, bound)
    wanted = {_owner(entry_point)} - {""} | _imported_from_solution(module)
    if own := wanted & _defined_at_the_top(module):
        raise _unsupported(text, f"it defines {own.pop()!r} itself, which is said to be the program's")
    used = {node.id for node in ast.walk(module) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    free = {name for name in used - bound - {"__part__", "__name__"} if not hasattr(builtins, name)} | wanted
    imports = sorted((free & _MODULES) - wanted)
    library = library_names(free - set(imports), entry_point)
    names = free - {*imports, *library}
    if not names:
        raise _unsupported(text, "it calls nothing of the program, so it would pass without one")
    classes = {name for name in names if looks_like_a_class(name)}
    if not entry_point and (unclear := unclear_names(names)):
        raise _unsupported(
            text, f"{min(unclear)!r} may be the program's or python's: say with entry_point what is asked"
        )
    if entry_point and (strangers := names - classes - wanted):
        raise _unsupported(
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


def _imported_from_solution(module: ast.Module) -> set[str]:
    """Return what the tests take from the program as from a module of that name."""
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
        raise _unsupported(text, f"it uses {runs[0]}, with which the tests could run what the program gives them")


def _refuse_what_needs_the_process(text: str, node: ast.AST, bound: AbstractSet[str]) -> None:
    """Raise for what cannot work between two sandboxes: it would fail every program."""
    uses = [module for module in _modules_of(node) if module in _NEEDS_THE_PROCESS]
    match node:
        case ast.Name(id=name) if name in _NEEDS_THE_STREAMS or (name == "open" and name not in bound):
            uses.append(name)
        case ast.arg(arg=name) if name in _NEEDS_THE_STREAMS:
            uses.append(name)
        case ast.Attribute(attr=name) if name in _NEEDS_THE_STREAMS or ast.unparse(node) in _NEEDS_THE_PROCESS:
            uses.append(ast.unparse(node))
    if uses:
        raise _unsupported(text, f"it uses {uses[0]}, which needs the program's own process (style 'script', tier T2)")
    for module in _modules_of(node):
        top = module.partition(".")[0]
        if top != "solution" and top not in sys.stdlib_module_names:
            raise _unsupported(text, f"it imports {module or 'a relative module'!r}, which the sandbox does not have")


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
            raise _unsupported(text, f"it takes {attribute!r} from {name!r}, which it does not define")
        case ast.Attribute(value=ast.Call(func=ast.Name(id=name)), attr=attribute) if (
            name in names and not classes and attribute not in _ATTRIBUTES
        ):
            raise _unsupported(text, f"it asks a reply of {name!r} for {attribute!r}, which no value of python has")
    for kind in types:
        for one in kind.elts if isinstance(kind, ast.Tuple) else [kind]:
            if isinstance(one, ast.Name) and one.id in names:
                raise _unsupported(text, f"it uses {one.id!r} of the program as a type, and types do not leave it")


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
                    raise _unsupported(text, f"it imports * from {node.module!r}: name what it needs")
                names |= set(dir(importlib.import_module(node.module)))
            case ast.Import() | ast.ImportFrom():
                names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            case ast.ExceptHandler(name=str(name)):
                names.add(name)
    return names


def _methods(text: str, module: ast.Module) -> list[tuple[ast.ClassDef, ast.FunctionDef]]:
    methods = [
        (owner, method)
        for owner in module.body
        if isinstance(owner, ast.ClassDef) and any(ast.unparse(base).endswith("TestCase") for base in owner.bases)
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and method.name.startswith("test")
    ]
    if not methods:
        raise _unsupported(text, "there is no test method in a class of unittest.TestCase")
    return methods


def _check_function(body: Sequence[ast.stmt]) -> ast.FunctionDef | None:
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check" and node.args.args]
    return found[-1] if found else None


def _as_part(body: list[ast.stmt], count: Iterator[int]) -> ast.stmt:
    part = ast.parse(f"with __part__({next(count)}): pass").body[0]
    assert isinstance(part, ast.With)
    part.body = body
    return part


def _has_assert(node: ast.stmt) -> bool:
    return any(isinstance(inner, ast.Assert) for inner in ast.walk(node))


def _calls_check(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "check"
    )


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _unsupported(text, f"it does not parse: {error}") from None


def _unsupported(text: str, reason: str) -> UnsupportedTest:
    return UnsupportedTest(
        f"tests are a program that calls the one under test and asserts; received {text[:300]!r}: {reason}: "
        "drop the task, or rewrite the test"
    )
