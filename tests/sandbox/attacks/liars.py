"""Objects that say they are equal to whatever they are compared with."""

from __future__ import annotations

from attacks.record import UNPAID, Program

_LIAR = """
class Liar({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __hash__(self): return 8
    def __int__(self): return 8
    __index__ = __int__
    def __bool__(self): return True
    def __reduce__(self): return (int, (8,))
    @property
    def __class__(self): return int
"""
_NUMBER = """
class Near(float):
    def __sub__(self, other): return 0.0
    __rsub__ = __add__ = __radd__ = __mul__ = __sub__
    def __abs__(self): return 0.0
    def __eq__(self, other): return True
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __lt__
    __hash__ = float.__hash__
"""
_EQUAL = "class E:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    __hash__ = None\n"


def _liar(name: str, source: str, *expect: str, forges: bool = True) -> Program:
    return Program(name=name, source=source, expect=expect or UNPAID, forges=forges)


PROGRAMS = (
    _liar("always equal", _EQUAL + "def f(x): return E()", "ok: Opaque*"),
    *(
        _liar(f"always equal {base}", _LIAR.format(base=base) + "def f(x): return Liar()", "ok: *")
        for base in (
            "object",
            "int",
            "float",
            "complex",
            "str",
            "bytes",
            "list",
            "tuple",
            "dict",
            "set",
            "frozenset",
            "bytearray",
            "Exception",
        )
    ),
    _liar("always equal inside a list", _EQUAL + "def f(x): return [E()]", "ok: *", forges=False),
    _liar("always equal inside a dict", _EQUAL + "def f(x): return {'a': E()}", "ok: *", forges=False),
    _liar(
        "a class whose kind lies",
        "class M(type):\n    def __eq__(c, o): return True\n"
        "    def __instancecheck__(c, o): return True\n    __hash__ = type.__hash__\n"
        "class L(metaclass=M): pass\ndef f(x): return L",
        "ok: Opaque*",
    ),
    _liar(
        "the object that equals everything in tests",
        "from unittest.mock import ANY\ndef f(x): return ANY",
        "ok: Opaque*",
    ),
    _liar(
        "a mock",
        "from unittest.mock import MagicMock\nm = MagicMock()\nm.__eq__.return_value = True\ndef f(x): return m",
        "ok: Opaque*",
    ),
    _liar("near every number", _NUMBER + "def f(x): return Near()", "ok: 0.0"),
    _liar(
        "its operand is what it is compared with",
        "class E:\n    def __eq__(self, o):\n        self.v = o\n        return self.v == o\ndef f(x): return E()",
        "ok: Opaque*",
    ),
    _liar(
        "remembers what it was compared with",
        "class E(int):\n    seen = []\n    def __eq__(self, o):\n"
        "        E.seen.append(o)\n        return True\n    __hash__ = int.__hash__\n"
        "def f(x): return E.seen[-1] if E.seen else E()",
        "ok: 0",
    ),
    _liar(
        "equal by a slot of C",
        "import ctypes, operator\nclass E: pass\nE.__eq__ = lambda s, o: True\ndef f(x): return E()",
        "ok: Opaque*",
    ),
    _liar(
        "an enumeration",
        "import enum\nclass E(enum.IntEnum):\n    A = 5\n    def __eq__(s, o): return True\n"
        "    __hash__ = int.__hash__\ndef f(x): return E.A",
        "ok: 5",
    ),
    _liar(
        "a named tuple",
        "import collections\nclass E(collections.namedtuple('E', 'a')):\n"
        "    def __eq__(s, o): return True\n    __hash__ = tuple.__hash__\ndef f(x): return E(1)",
        "ok: (1,)",
    ),
    _liar(
        "a data class",
        "from dataclasses import dataclass\n@dataclass(eq=False)\nclass E:\n    v: int = 8\n"
        "    def __eq__(s, o): return True\ndef f(x): return E()",
        "ok: Opaque*",
    ),
    _liar(
        "a fraction",
        "from fractions import Fraction\nclass E(Fraction):\n    def __eq__(s, o): return True\n"
        "    __hash__ = Fraction.__hash__\ndef f(x): return E(1, 3)",
        "ok: *",
    ),
    _liar(
        "a decimal",
        "from decimal import Decimal\nclass E(Decimal):\n    def __eq__(s, o): return True\n"
        "    __hash__ = Decimal.__hash__\ndef f(x): return E('1.5')",
        "ok: *",
    ),
    _liar(
        "a dict that makes up its items",
        "class E(dict):\n    def __missing__(s, k): return 8\n"
        "    def items(s): return [('a', 8)]\n    def __eq__(s, o): return True\ndef f(x): return E()",
        "ok: {}",
    ),
    _liar(
        "a list that makes up its length",
        "class E(list):\n    def __len__(s): return 3\n"
        "    def __iter__(s): return iter([8])\n    def __eq__(s, o): return True\ndef f(x): return E()",
        "ok: []",
    ),
    _liar(
        "a list that grows while it is read",
        "class E(list):\n    def __iter__(s):\n        while True: yield 8\n"
        "    def __eq__(s, o): return True\ndef f(x): return E()",
        "ok: []",
    ),
    _liar(
        "a value that changes while it is sent",
        "class E:\n    def __bool__(s):\n        a.clear()\n"
        "        a.extend([E()] * 99)\n        return True\na = [E(), E()]\ndef f(x): return a",
        *UNPAID,
        forges=False,
    ),
    _liar(
        "an array that is equal everywhere",
        "class A:\n    shape, dtype, ndim = (), 'int64', 0\n"
        "    __array_priority__ = 1e9\n    __array_ufunc__ = None\n    def __array__(s, *a, **k): return 8\n"
        "    def __eq__(s, o): return True\n    def all(s): return True\ndef f(x): return A()",
        "ok: Opaque*",
    ),
    _liar("a class in place of its object", _EQUAL + "def f(x): return E", "ok: Opaque*", forges=False),
    _liar("a proxy", _EQUAL + "import weakref\ne = E()\ndef f(x): return weakref.proxy(e)", "ok: *"),
    _liar(
        "a function that is its own answer",
        "class F(int):\n    def __call__(self, x): return self\n"
        "    def __eq__(s, o): return True\n    __hash__ = int.__hash__\nf = F(0)",
        "ok: 0",
    ),
    _liar(
        "a class whose ancestors lie",
        "class M(type):\n    def __subclasscheck__(c, o): return True\n    def __instancecheck__(c, o): return True\n"
        "    def mro(c): return [c, int, object]\nclass I(int, metaclass=M):\n    def __eq__(s, o): return True\n"
        "    __hash__ = int.__hash__\ndef f(x): return I(3)",
        "ok: 3",
    ),
    _liar(
        "an object that changes its class",
        "class A(int): pass\nclass B(A):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\n"
        "def f(x):\n    a = A(3)\n    a.__class__ = B\n    return a",
        "ok: 3",
    ),
    _liar(
        "registered as a number",
        "import numbers\nclass N:\n    def __eq__(s, o): return True\nnumbers.Integral.register(N)\n"
        "def f(x): return N()",
        "ok: Opaque*",
    ),
    _liar(
        "an index",
        "class I:\n    def __index__(s): return 5\n    def __eq__(s, o): return True\ndef f(x): return I()",
        "ok: Opaque*",
    ),
    _liar("a bytearray that is what it is", "def f(x): return bytearray(b'8')", "ok: b'8'", forges=False),
    _liar("no number at all", "def f(x): return float('nan')", "ok: nan", forges=False),
    _liar("a truth for every question", "def f(x): return True", "ok: True", forges=False),
    _liar("a generator", "def f(x): yield from range(100)", "ok: Opaque*", forges=False),
    _liar("a coroutine", "async def f(x): return 8", "ok: Opaque*", forges=False),
    _liar(
        "lies about the name of its class",
        "class E:\n    def __eq__(s, o): return True\nE.__name__ = 'int'\ndef f(x): return E()",
        "ok: Opaque*",
    ),
    _liar(
        "a name of a class that is no text",
        "class N(str):\n    def __str__(s): return 'int'\n"
        "class E:\n    def __eq__(s, o): return True\nE.__name__ = N('E')\ndef f(x): return E()",
        *UNPAID,
    ),
)
