"""Runs inside the program's own process, after it was locked down: loads the program and answers calls.

Everything here can be rewritten by the program it runs. That is no loss: a reply carries a value and never a
verdict, so the best forgery of a reply is the right answer. Loaded by path: standard library only.

On the result socket, program's side: the byte LOCKED, then frames, each a 4-byte big-endian length and JSON:
`{"load": null | [type, text]}`, then per call `{"n": i, "v": document}` or `{"n": i, "x": [type, text]}`.
"""

from __future__ import annotations

import builtins
import json
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
    if job["mode"] == "stdio":
        return _run_main(job["source"])
    _answer_calls(fd, job, codec)
    return 0


def _answer_calls(fd: int, job: dict[str, Any], codec: Any) -> None:
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and pickle look a class's module up
    names = module.__dict__
    try:
        for title, source in (("<program>", job["source"]), ("<setup>", job["setup"])):
            exec(compile(source, title, "exec", dont_inherit=True), names)
    except BaseException as error:
        _send(fd, {"load": _described(error)})
        return
    _send(fd, {"load": None})
    for index, (function, args, kwargs) in enumerate(job["calls"]):
        try:
            target = _resolve(names, function)
            value = target(*codec.decode_tree(args), **codec.decode_tree(kwargs))
            reply = f'{{"n":{index},"v":{codec.encode(value)}}}'
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
