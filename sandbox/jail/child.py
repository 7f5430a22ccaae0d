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
import importlib
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


_LOADED = b'{"load": null}'
_decode = json.JSONDecoder().raw_decode


class _HostGone(BaseException):
    """The host closed the socket. A type of its own: an EOFError can be the program's, and tests catch Exception."""


def fix_randomness() -> None:
    """Make the global generators start alike: fork reseeds from the system, and a verdict must not hang on that."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def serve(fd: int, codec: Any) -> int:
    """Report the lock-down, read the job and do it; return the exit status. The caller fixes randomness."""
    os.write(fd, LOCKED)
    job = _decode(_read_frame(fd).decode())[0]
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)  # the interpreter runs without `site`, which adds these two
    match job["mode"]:
        case "stdio":
            return _run_main(job["source"])
        case "calls":
            _answer_calls(fd, job, codec)
    handle = {"serve": _serve_tests, "tests": _run_tests, "script": _run_script}.get(job["mode"])
    if handle is not None:
        with contextlib.suppress(_HostGone):
            handle(fd, job, codec)
    return 0


def _load(fd: int, job: dict[str, Any]) -> dict[str, Any] | None:
    """Load the program and report the result; return its names, or None when it did not load."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and pickle look a class's module up
    names = module.__dict__
    try:
        exec(compile(job["source"], "<program>", "exec", dont_inherit=True), names)
        if job["setup"]:
            exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), names)
    except BaseException as error:
        _send(fd, {"load": _described(error)})
        return None
    _write_frame(fd, _LOADED)
    return names


def _answer_calls(fd: int, job: dict[str, Any], codec: Any) -> None:
    names = _load(fd, job)
    if names is None:
        return
    for index, (function, args, kwargs, may_digest, keep_floats, items) in enumerate(job["calls"]):
        try:
            target = _resolve(names, function)
            value = target(*codec.decode_tree(args), **codec.decode_tree(kwargs))
            if items:
                value = codec.listed(value, is_counted=items == "counted")
            kind, document = "v", ""
            if may_digest:
                kind, document = codec.encode_or_digest(value, keep_floats=keep_floats)
            else:
                document = codec.encode(value)
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
    target = _named(names, owner)
    return getattr(target(), method) if dot else target


def _named(names: dict[str, Any], name: str) -> Any:
    if name not in names:
        raise NameError(f"name {name!r} is not defined")
    return names[name]


class _Server:
    """The program's side of tests in another sandbox: does what they request, keeps the objects they hold."""

    def __init__(self, names: dict[str, Any], classes: list[str], codec: Any) -> None:
        self.names = names
        self.classes = classes
        self.codec = codec
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}

    def refer(self, value: Any) -> list[Any] | None:
        """Return the handle of a value that can be used and not copied: an object of a class that the tests name."""
        text = _as_text(value)
        if text is not None:
            return text
        classes = tuple(c for c in map(self.names.get, self.classes) if isinstance(c, type))
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

    def resolve(self, kind: str, which: int | str) -> Any:
        if isinstance(which, int):
            return self.objects[which]
        return _named(self.names, which) if kind == "name" else _from_text(kind, which)

    def answer(self, ask: dict[str, Any]) -> dict[str, Any]:
        args = [self.codec.decode_tree(arg, self.resolve) for arg in ask["args"]]
        kwargs = {name: self.codec.decode_tree(arg, self.resolve) for name, arg in ask["kwargs"].items()}
        # Compared as text afterwards: what the program changed in place is changed for the tests too.
        given = {key: self.codec.encode(arg) for key, arg in [*enumerate(args), *kwargs.items()] if _is_mutable(arg)}
        reply: dict[str, Any]
        try:
            target = _named(self.names, ask["on"]) if isinstance(ask["on"], str) else self.objects[ask["on"]]
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


# Kind, its module, what makes text of it and what makes it of the text. A datetime is a date too, so it comes first.
_TEXTS: dict[str, tuple[str, Any, Any]] = {
    "Decimal": ("decimal", lambda base, value: base.__str__(value), lambda base, text: base(text)),
    # Not `base(text)`, which would read "1e99999999" and compute that power.
    "Fraction": (
        "fractions",
        lambda base, value: base.__str__(value),
        lambda base, text: base(*map(int, text.split("/"))),
    ),
    "datetime": ("datetime", lambda base, value: base.isoformat(value), lambda base, text: base.fromisoformat(text)),
    "date": ("datetime", lambda base, value: base.isoformat(value), lambda base, text: base.fromisoformat(text)),
    "time": ("datetime", lambda base, value: base.isoformat(value), lambda base, text: base.fromisoformat(text)),
    "timedelta": (
        "datetime",
        lambda base, value: f"{value.days} {value.seconds} {value.microseconds}",
        lambda base, text: base(*map(int, text.split())),
    ),
}


def _as_text(value: Any) -> list[Any] | None:
    """Return kind and text of a number or time of the standard library; None for any other value."""
    for kind, (module, text, _) in _TEXTS.items():
        base = getattr(sys.modules.get(module), kind, None)
        if isinstance(base, type) and issubclass(type(value), base):
            try:
                return [kind, str(text(base, value))]
            except Exception:  # a subclass of the program's making: the codec classifies it
                return None
    return None


def _from_text(kind: str, text: str) -> Any:
    module, _, make = _TEXTS[kind]
    return make(getattr(importlib.import_module(module), kind), text)


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
    server = _Server(names, job["classes"], codec)
    while True:
        _send(fd, server.answer(json.loads(_read_frame(fd))))


class _Program:
    """The tests' side: calls the program in the other sandbox through the host."""

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
            _, base, text = reply["x"]
            kind = getattr(builtins, base, None)
            # One that would end the tests, or that needs more than a text, comes as its nearest relative.
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, UnicodeError):
                kind = ValueError if isinstance(kind, type) and issubclass(kind, ValueError) else RuntimeError
            # Raised by a function within `map` or `all`, it would end them as if all had been right.
            if issubclass(kind, StopIteration | StopAsyncIteration) and name != "__next__":
                kind = RuntimeError
            raise kind(text)
        return self.codec.decode_tree(reply["v"], self.resolve)

    def tree(self, value: Any) -> Any:
        return self.codec.parse(self.codec.encode(value, _handle))

    def resolve(self, kind: str, which: int | str) -> Any:
        if isinstance(which, str):
            return _from_text(kind, which)
        if which not in self.stands_for:
            self.stands_for[which] = {"object": _Object, "call": _Function, "iter": _Iterator}[kind](self, which)
        return self.stands_for[which]


def _handle(value: Any) -> list[Any] | None:
    if isinstance(value, _Proxy):
        on = object.__getattribute__(value, "_on")
        return ["name", on] if isinstance(on, str) else [value._kind, on]
    if isinstance(value, _FUNCTIONS):
        raise TypeError("a function of the tests cannot be passed to the program")
    return _as_text(value)


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
    """Stands for something in the program. Equal to nothing but itself; no comparison reaches the program."""

    _kind = ""
    _program: _Program
    _on: str | int

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
    """A class that the tests take from the program. A plain function has no attributes: they would be its word."""

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
    """One part of the tests: reports whether it was left without an exception, and continues with the next."""

    def __init__(self, fd: int, number: int) -> None:
        self.fd = fd
        self.number = number

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if kind is _HostGone:
            return False
        _send(self.fd, {"part": self.number, "ok": kind is None})
        return True


def _run_tests(fd: int, job: dict[str, Any], codec: Any) -> None:
    program = _Program(fd, codec)
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    names = module.__dict__
    stubs = {name: (_Named if name in job["classes"] else _Function)(program, name) for name in job["names"]}
    names |= stubs
    sys.modules["solution"] = types.ModuleType("solution")  # as which tests may import them
    sys.modules["solution"].__dict__.update(stubs)
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
        except _HostGone:
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
            raise _HostGone
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
