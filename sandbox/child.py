"""Runs inside the program's own process, after it was locked down: loads the program and answers calls.

Everything here can be rewritten by the program it runs. That is no loss: a reply carries a value and never a
verdict, so the best forgery of a reply is the right answer. Loaded by path: standard library only.

On the result socket, program's side: the byte LOCKED, then frames, each a 4-byte big-endian length and JSON:
`{"load": null | [type, text]}`, then per call `{"n": i, "v": document}`, `{"n": i, "d": digest}` or
`{"n": i, "x": [type, text]}`.
When the tests are a program of their own, `serve` answers them and `tests` runs them, each in a sandbox of its
own; `script` runs them in the program's process.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import json
import operator
import os
import random
import struct
import sys
import types
from typing import Any

LOCKED = b"\x55"
"""Sent after the lock-down and before the first untrusted byte is read."""
MAX_TEXT = 500
"""Characters of an exception's text that are sent."""


def fix_randomness() -> None:
    """Make the global generators start alike: fork reseeds from the system, and a verdict must not hang on that."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def serve(fd: int, codec: Any) -> int:
    """Say that the lock-down is done, read the job and do it. Returns the exit status."""
    fix_randomness()
    os.write(fd, LOCKED)
    job = json.loads(_read_frame(fd))
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)  # the interpreter runs without `site`, which adds these two
    match job["mode"]:
        case "stdio":
            return _run_main(job["source"])
        case "calls":
            _answer_calls(fd, job, codec)
        case "serve":
            _serve_tests(fd, job, codec)
        case "tests":
            _run_tests(fd, job, codec)
        case "script":
            _run_script(fd, job, codec)
    return 0


def _load(fd: int, job: dict[str, Any]) -> dict[str, Any] | None:
    """Load the program and say how that went; its names, or None when it did not load."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and pickle look a class's module up
    names = module.__dict__
    try:
        for title, source in (("<program>", job["source"]), ("<setup>", job["setup"])):
            exec(compile(source, title, "exec", dont_inherit=True), names)
    except BaseException as error:
        _send(fd, {"load": _described(error)})
        return None
    _send(fd, {"load": None})
    return names


def _answer_calls(fd: int, job: dict[str, Any], codec: Any) -> None:
    names = _load(fd, job)
    if names is None:
        return
    for index, (function, args, kwargs, may_digest) in enumerate(job["calls"]):
        try:
            target = _resolve(names, function)
            value = target(*codec.decode_tree(args), **codec.decode_tree(kwargs))
            kind, document = codec.encode_or_digest(value) if may_digest else ("v", codec.encode(value))
            reply = f'{{"n":{index},"{kind}":{document}}}'
        except BaseException as error:
            reply = json.dumps({"n": index, "x": _described(error)})
        _write_frame(fd, reply.encode())


def _run_main(source: str) -> int:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    # The inherited stream objects were made for other files.
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    status = 0
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        status = 1
    sys.stdout.flush()
    return status & 0xFF


def _resolve(names: dict[str, Any], function: str) -> Any:
    owner, dot, method = function.partition("().")
    if owner not in names:
        raise NameError(f"name {owner!r} is not defined")
    return getattr(names[owner](), method) if dot else names[owner]


class _Server:
    """The program's side of tests in another sandbox: does what they ask, keeps the objects they hold."""

    def __init__(self, names: dict[str, Any], asked: list[str], codec: Any) -> None:
        self.names = names
        self.asked = asked
        self.codec = codec
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}

    def refer(self, value: Any) -> list[Any] | None:
        """Return the handle of a value that can be used and not copied: only of classes that the tests name."""
        classes = tuple(c for c in map(self.names.get, self.asked) if isinstance(c, type))
        if isinstance(value, classes):
            kind = "object"
        elif isinstance(value, _FUNCTIONS):
            kind = "call"
        elif hasattr(type(value), "__next__"):
            kind = "iter"
        else:
            return None
        if id(value) not in self.numbers:  # kept alive in `objects`, so its id stays its own
            self.numbers[id(value)] = len(self.objects)
            self.objects[len(self.objects)] = value
        return [kind, self.numbers[id(value)]]

    def resolve(self, kind: str, number: int) -> Any:
        return self.objects[number]

    def answer(self, ask: dict[str, Any]) -> dict[str, Any]:
        args = [self.codec.decode_tree(arg, self.resolve) for arg in ask["args"]]
        kwargs = {name: self.codec.decode_tree(arg, self.resolve) for name, arg in ask["kwargs"].items()}
        # Compared as text afterwards: what the program changed in place is changed for the tests too.
        given = {key: self.codec.encode(arg) for key, arg in [*enumerate(args), *kwargs.items()] if _is_mutable(arg)}
        reply: dict[str, Any]
        try:
            target = self.names[ask["on"]] if isinstance(ask["on"], str) else self.objects[ask["on"]]
            reply = {"v": self.tree(_do(target, ask["op"], ask["name"], args, kwargs))}
        except BaseException as error:
            base = next(c for c in type(error).__mro__ if c.__module__ == "builtins")
            name, text = _described(error)
            reply = {"x": [name, base.__name__, text]}
        now = {key: args[key] if isinstance(key, int) else kwargs[key] for key in given}
        reply["changed"] = [[key, self.tree(now[key])] for key in given if self.codec.encode(now[key]) != given[key]]
        return reply

    def tree(self, value: Any) -> Any:
        return self.codec.parse(self.codec.encode(value, self.refer))


_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


def _is_mutable(value: Any) -> bool:
    return isinstance(value, list | dict | set)


def _do(target: Any, op: str, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    match op:
        case "call":
            return (getattr(target, name) if name else target)(*args, **kwargs)
        case "get":
            return getattr(target, name)
        case "set":
            return setattr(target, name, *args)
        case "truth":
            return bool(target)
    raise ValueError(f"unknown operation {op!r}")


def _serve_tests(fd: int, job: dict[str, Any], codec: Any) -> None:
    names = _load(fd, job)
    if names is None:
        return
    server = _Server(names, job["names"], codec)
    while True:
        try:
            ask = json.loads(_read_frame(fd))
        except EOFError:
            return
        _send(fd, server.answer(ask))


class _Program:
    """The tests' side: asks the program in the other sandbox through the host."""

    def __init__(self, fd: int, codec: Any) -> None:
        self.fd = fd
        self.codec = codec
        self.stands_for: dict[int, Any] = {}

    def ask(self, op: str, on: str | int, name: str = "", args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        message = {
            "op": op,
            "on": on,
            "name": name,
            "args": [self.tree(arg) for arg in args],
            "kwargs": {key: self.tree(arg) for key, arg in kwargs.items()},
        }
        _send(self.fd, message)
        reply = json.loads(_read_frame(self.fd))
        for key, tree in reply["changed"]:
            ours = args[key] if isinstance(key, int) else kwargs[key]
            _take_over(ours, self.codec.decode_tree(tree, self.resolve))
        if "x" in reply:
            name, base, text = reply["x"]
            kind = getattr(builtins, base, None)
            # One that would end the tests, or that needs more than a text, comes as its nearest relative.
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, UnicodeError):
                kind = ValueError if isinstance(kind, type) and issubclass(kind, ValueError) else RuntimeError
            raise kind(text if kind.__name__ == name else f"{text}")
        return self.codec.decode_tree(reply["v"], self.resolve)

    def tree(self, value: Any) -> Any:
        return self.codec.parse(self.codec.encode(value, _handle))

    def resolve(self, kind: str, number: int) -> Any:
        if number not in self.stands_for:
            self.stands_for[number] = {"object": _Object, "call": _Function, "iter": _Iterator}[kind](self, number)
        return self.stands_for[number]


def _handle(value: Any) -> list[Any] | None:
    if isinstance(value, _Proxy):
        return [value._kind, object.__getattribute__(value, "_on")]
    if isinstance(value, _FUNCTIONS):
        raise TypeError("a function of the tests cannot be passed to the program")
    return None


def _take_over(ours: Any, theirs: Any) -> None:
    """Change a container of the tests as the program changed its copy."""
    if type(ours) is not type(theirs):
        return
    if isinstance(ours, list):
        for index, (old, new) in enumerate(zip(ours, theirs, strict=False)):
            if _is_mutable(old) and type(old) is type(new):
                _take_over(old, new)
                theirs[index] = old
        ours[:] = theirs
    elif isinstance(ours, dict | set):
        ours.clear()
        ours.update(theirs)


class _Proxy:
    """Stands for something in the program. Equal to nothing but itself: the program is not asked."""

    _kind = ""

    def __init__(self, program: _Program, on: str | int) -> None:
        self.__dict__.update(_program=program, _on=on)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Proxy) and other is not self:
            raise TypeError("two objects of the program are not compared: it would be the judge")
        return other is self

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = object.__hash__


class _Function(_Proxy):
    _kind = "call"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.ask("call", self._on, "", args, kwargs)


class _Named(_Function):
    """A name that the tests take from the program."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("get", self._on, name)


class _Iterator(_Proxy):
    _kind = "iter"

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self._program.ask("call", self._on, "__next__")


class _Object(_Named):
    """An object of a class that the tests name. No operator that takes a value of the tests is passed on."""

    _kind = "object"

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("set", self._on, name, [value])

    def __bool__(self) -> bool:
        return self._program.ask("truth", self._on) is True

    def __len__(self) -> int:
        return operator.index(self._program.ask("call", self._on, "__len__"))

    def __iter__(self) -> Any:
        return self._program.ask("call", self._on, "__iter__")

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("call", self._on, "__getitem__", [key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._program.ask("call", self._on, "__setitem__", [key, value])

    def __str__(self) -> str:
        return str(self._program.ask("call", self._on, "__str__"))

    def __repr__(self) -> str:
        return str(self._program.ask("call", self._on, "__repr__"))


class _Part:
    """One part of the tests: says whether it was left without an exception, and goes on with the next."""

    def __init__(self, fd: int, number: int) -> None:
        self.fd = fd
        self.number = number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if kind is EOFError:
            return False  # the host has gone
        _send(self.fd, {"part": self.number, "ok": kind is None})
        return True


def _run_tests(fd: int, job: dict[str, Any], codec: Any) -> None:
    program = _Program(fd, codec)
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    names = module.__dict__
    names |= {name: _Named(program, name) for name in job["names"]}
    names["__part__"] = functools.partial(_Part, fd)
    with contextlib.suppress(Exception, SystemExit):
        exec(compile(job["source"], "<tests>", "exec", dont_inherit=True), names)
        _run_methods(fd, names, job["parts"])
    _send(fd, {"end": True})


def _run_script(fd: int, job: dict[str, Any], codec: Any) -> None:
    names = _load(fd, job)
    if names is None:
        return
    tests = json.loads(_read_frame(fd))  # sent now: the program is loaded and finds nothing to read before

    def see(site: int, value: Any = None) -> Any:
        _write_frame(fd, f'{{"site":{site},"v":{codec.encode(value)}}}'.encode())
        return value

    names["__see__"] = see
    exec(compile(tests["source"], "<tests>", "exec", dont_inherit=True), names)
    _run_methods(fd, names, tests["parts"])


def _run_methods(fd: int, names: dict[str, Any], parts: list[str]) -> None:
    """Run the parts that are methods of test classes, each as a suite of its own."""
    for number, part in enumerate(parts):
        class_name, dot, method = part.partition(".")
        if not dot:
            return
        import unittest

        result = unittest.TestResult()
        try:
            unittest.TestSuite([names[class_name](method)]).run(result)
        except EOFError:
            raise
        except BaseException:
            result.failures.append((None, ""))  # type: ignore[arg-type]
        is_passed = result.testsRun == 1 and result.wasSuccessful() and not result.skipped
        _send(fd, {"part": number, "ok": is_passed})


def _described(error: BaseException) -> list[str]:
    try:
        return [str(type(error).__name__)[:MAX_TEXT], str(error)[:MAX_TEXT]]
    except BaseException:
        return ["Exception", "an exception that cannot be shown"]


def _send(fd: int, message: dict[str, Any]) -> None:
    _write_frame(fd, json.dumps(message).encode())


def _write_frame(fd: int, body: bytes) -> None:
    rest = memoryview(struct.pack(">I", len(body)) + body)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _read_frame(fd: int) -> bytes:
    (size,) = struct.unpack(">I", _read_exactly(fd, 4))
    return _read_exactly(fd, size)


def _read_exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError("the host closed the result socket")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
