"""Replies and exceptions made for those who look at them: tests in a second sandbox, and the judge where it walks."""

from __future__ import annotations

from attacks.record import ENDED, UNPAID, Mode, Program

_FRAME = """
import json, os, struct
def send(tree):
    body = json.dumps(tree).encode()
    os.write(3, struct.pack(">I", len(body)) + body)
"""


def _against(mode: Mode, name: str, source: str, *expect: str, **more: object) -> Program:
    return Program(name=name, source=source, mode=mode, expect=expect or UNPAID, **more)  # type: ignore[arg-type]


def _raises(name: str, error: str) -> Program:
    """Raised in a loop of the tests, it must not end the loop as if nothing were left to compare."""
    return _against("beside", name, f"def f(x): raise {error}", "ok: False", *ENDED)


def _replies(name: str, reply: str) -> Program:
    source = f"{_FRAME}def f(x):\n    send({reply})\n    os._exit(0)"
    return _against("beside", name, source, "ok: False", "protocol*", *ENDED)


# A child of a child of a child: each has a processor time of its own, so only the wall time ends them.
_CHAIN = """
import os, time
def f(x):
    data = bytes(1 << 16)
    if os.fork() == 0:
        while True:
            for _ in range(200): os.write(1, data)
            if os.fork(): os._exit(0)
    while True:
        try: os.wait()
        except ChildProcessError: time.sleep(0.001)
"""
_VALUES = {
    "a range that nobody can walk": "range(10 ** 12)",
    "a range of huge numbers": "range(-(10 ** 6000), 10 ** 6000, 3)",
    "a range of one huge number": "range(10 ** 6000, 10 ** 6000 + 1)",
    "a long text": "'ab' * (1 << 17)",
    "a list of huge numbers": "[1 << 200_000] * 20",
    "a list of lists": "[[0] * 1000] * 100",
    "numbers whose hashes collide": "[n * (2 ** 61 - 1) for n in range(20_000)]",
    "things that cannot be sorted": "[1, 'a', None, (2,)]",
    "things that cannot be hashed": "[[1], {2: 3}]",
    "a dict": "{x: 0}",
    "nothing": "None",
    "no number at all": "[float('nan')] * 1000",
    "items without end": "itertools.count()",
    "items that are iterators without end": "itertools.repeat(itertools.repeat(0))",
    "more items than travel": "iter(range(500_000))",
    "nothing left": "iter(())",
    "an iterator that gives liars": "iter([Liar(5)])",
    "a container that lies about its items": "Items()",
    "an end in place of an iterator": "Ends()",
}
_CLASSES = """
import itertools
class Liar(int):
    def __eq__(self, other): return True
    def __lt__(self, other): return True
    def __radd__(self, other): return self
    def __hash__(self): return 0
class Items:
    def __len__(self): return 1
    def __contains__(self, item): return True
    def __iter__(self): return iter([Liar(5), self])
    def __eq__(self, other): return True
class Ends:
    def __iter__(self): raise StopIteration
"""

PROGRAMS = (
    _raises("says that nothing is left", "StopIteration"),
    _raises("says that nothing is left, with a value", "StopIteration(True)"),
    _raises("says that nothing is left to wait for", "StopAsyncIteration"),
    _raises("says that nothing is left, in its own words", "type('E', (StopIteration,), {})()"),
    _raises("says that the file is at its end", "EOFError('the host closed the result socket')"),
    _raises("ends the generator", "GeneratorExit"),
    _raises("ends the tests", "SystemExit(0)"),
    _raises("interrupts the tests", "KeyboardInterrupt"),
    _raises("says that the tests are to be passed over", "__import__('unittest').SkipTest('x')"),
    _raises("fails like a test", "AssertionError"),
    _replies("sends that nothing is left", "{'x': ['E', 'StopIteration', ''], 'changed': []}"),
    _replies("sends an exception that is none", "{'x': ['E', 'print', ''], 'changed': []}"),
    _replies("sends an exception that ends the tests", "{'x': ['E', 'SystemExit', '0'], 'changed': []}"),
    _replies("sends a part that passed", "{'part': 0, 'ok': True}"),
    _replies("sends the end", "{'end': True}"),
    _replies("sends a function in place of a value", "{'v': {'h': ['call', 0]}, 'changed': []}"),
    _replies("sends changes of what nobody gave it", "{'v': 0, 'changed': [[0, 8], [7, 8], ['x', 8]]}"),
    _replies("sends a fraction that takes a power", "{'v': {'h': ['Fraction', '1e99999999']}, 'changed': []}"),
    _replies("sends a number that signals", "{'v': {'h': ['Decimal', 'sNaN']}, 'changed': []}"),
    _replies("sends a name in place of a value", "{'v': {'h': ['name', 'f']}, 'changed': []}"),
    _replies("sends a number beyond all numbers", "{'v': float('inf'), 'changed': []}"),
    _replies("sends an exception that needs more", "{'x': ['E', 'ExceptionGroup', ''], 'changed': []}"),
    _against("beside", "an iterator that is the exception", "def f(x): return StopIteration()", "ok: False"),
    _against(
        "beside",
        "a function that answers every question",
        "class C:\n    def __call__(s, *a): return s\n    def __eq__(s, o): return True\n"
        "    def __getattr__(s, n): return s\n    def __iter__(s): return s\n    def __next__(s): raise StopIteration\n"
        "f = C()",
        "ok: False",
        "protocol*",
        *ENDED,
    ),
    _against("beside", "nothing to go through", "def f(x): return iter(())", "ok: False"),
    _against(
        "beside",
        "equal to everything in the other sandbox",
        "class E:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    __hash__ = None\n"
        "def f(x): return E()",
        "ok: False",
    ),
    _against("beside", "hangs up in the middle", "import os\ndef f(x): os.close(3)", "ok: False", *ENDED),
    _against("beside", "ends in the middle", "import os\ndef f(x): os._exit(0)", "ok: False", *ENDED),
    Program(
        name="children without end that print",
        source=_CHAIN,
        mode="beside",
        expect=("timeout*",),
        is_compat=True,
        limits={"wall_seconds": 1.5},
    ),
    Program(
        name="children without end that print, before any reply is due",
        source=_CHAIN + "f(1)",
        expect=("timeout*",),
        is_compat=True,
        limits={"wall_seconds": 1.5},
    ),
    *(
        _against("sets", f"{name}, where the judge walks", f"{_CLASSES}def f(x): return {value}")
        for name, value in _VALUES.items()
    ),
    *(
        _against("oracle", f"{name}, as a set", f"{_CLASSES}def f(x): return {value}")
        for name, value in _VALUES.items()
    ),
)
