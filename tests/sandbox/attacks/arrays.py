"""Values of numpy, where it is loaded beforehand: right ones in numpy's types, and liars made of them."""

from __future__ import annotations

from attacks.record import UNPAID, Program


def _liar(name: str, source: str, *expect: str) -> Program:
    return Program(name=name, source=f"import numpy as np\n{source}", expect=expect or UNPAID)


def _right(name: str, value: str) -> Program:
    return Program(
        name=name, source=f"import numpy as np\ndef f(x): return {value}", expect=("ok: 8", "ok: 8.0"), is_right=True
    )


PROGRAMS = (
    _right("a number of 64 bits", "np.int64(x * x + 7)"),
    _right("a number of 8 bits", "np.uint8(x * x + 7)"),
    _right("a float", "np.float64(x * x + 7)"),
    _right("a short float", "np.float32(x * x + 7)"),
    _right("a sum", "np.array([x * x, 7]).sum()"),
    _right("a plain number by way of an array", "int(np.arange(x + 1)[-1] ** 2 + 7)"),
    _liar("not a number", "def f(x): return np.float64('nan')", "ok: nan"),
    _liar("an array", "def f(x): return np.arange(900_000_000, 900_100_000)", "ok: *"),
    _liar(
        "an array that is equal to everything",
        "class A(np.ndarray):\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n"
        "def f(x): return np.zeros(()).view(A)",
        "ok: *",
    ),
    _liar(
        "a float that is near everything",
        "class F(np.float64):\n    def __eq__(s, o): return True\n    def __sub__(s, o): return F(0)\n"
        "    __rsub__ = __sub__\n    def __hash__(s): return 0\ndef f(x): return F(1)",
        "ok: 1.0",
    ),
    _liar(
        "a number that says what it holds",
        "class F(np.float64):\n    def item(s): return E()\n    def __float__(s): return 8.0\n"
        "class E:\n    def __eq__(s, o): return True\ndef f(x): return F(1)",
        "ok: 1.0",
    ),
    _liar(
        "an array of objects that lie",
        "class E:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n"
        "def f(x):\n    a = np.empty(1, object)\n    a[0] = E()\n    return a",
        "ok: *",
    ),
    _liar(
        "another class in place of numpy's numbers",
        "class E(int):\n    def __eq__(s, o): return True\n    def item(s): return E(1)\n    __hash__ = int.__hash__\n"
        "np.generic = E\ndef f(x): return E(1)",
        "ok: 1",
    ),
    _liar("a record", "def f(x): return np.zeros(1, [('a', 'i8'), ('b', 'f8')])[0]"),
    _liar("a date", "def f(x): return np.datetime64('2026-01-01')"),
    _liar("raw memory", "def f(x): return np.void(b'x' * 64)"),
    _liar("numpy itself", "def f(x): return np", "ok: Opaque*"),
    _liar("memory by an array", "def f(x): return np.ones(1 << 40)", "ok: raised *", "incomplete*", "crash*"),
    _liar(
        "an array mapped into a file", "def f(x): return np.memmap('hostile', shape=1 << 34, mode='w+')", "ok: raised *"
    ),
)
