"""Programs that mean well, in many ways of writing: every one must pass, in every tier."""

from __future__ import annotations

from attacks.record import Program


def _honest(name: str, source: str, **more: object) -> Program:
    return Program(name=name, source=source, expect=("ok: *8*",), is_right=True, **more)  # type: ignore[arg-type]


PROGRAMS = (
    _honest("a function", "def f(x): return x * x + 7"),
    _honest(
        "a recursion", "def f(x, n=None):\n    n = x if n is None else n\n    return 7 if n == 0 else x + f(x, n - 1)"
    ),
    _honest(
        "a cache",
        "import functools\n@functools.lru_cache(None)\ndef g(n): return 1 if n < 2 else g(n-1) + g(n-2)"
        "\ndef f(x): return x * x + 7 + 0 * g(200)",
    ),
    _honest(
        "the usual imports",
        "from typing import *\nimport math, re, heapq, itertools, collections, functools, "
        "random, string, datetime, bisect, operator, copy, json\ndef f(x): return int(math.pow(x, 2)) + 7",
    ),
    _honest(
        "a class",
        "class S:\n    def __init__(self, x): self.x = x\n    def go(self): return self.x ** 2 + 7\n"
        "def f(x): return S(x).go()",
    ),
    _honest(
        "a data class",
        "from dataclasses import dataclass, field\n@dataclass\nclass P:\n    x: int\n"
        "    l: list = field(default_factory=list)\ndef f(x): return P(x).x ** 2 + 7",
    ),
    _honest("a generator", "def g(x):\n    for _ in range(x): yield x\ndef f(x): return sum(g(x)) + 7"),
    _honest("prints as it goes", "def f(x):\n    print('debug', x)\n    return x * x + 7"),
    _honest("a main block", "def f(x): return x * x + 7\nif __name__ == '__main__':\n    raise SystemExit(f(1))"),
    _honest(
        "catches its exceptions",
        "def f(x):\n    try: return [][x]\n    except IndexError: return x * x + 7\n    finally: pass",
    ),
    _honest(
        "bit by bit",
        "def f(x):\n    r = 0\n    for i in range(x.bit_length()):\n"
        "        if x >> i & 1: r += x << i\n    return r + 7",
    ),
    _honest("megabytes for a while", "def f(x):\n    a = [0] * 3_000_000\n    return x * x + 7 + a[5]"),
    _honest("regular expressions and text", "import re\ndef f(x): return int(re.sub(r'\\D', '', f'<{x * x + 7}>'))"),
    _honest(
        "decimals and fractions",
        "from decimal import Decimal\nfrom fractions import Fraction\n"
        "def f(x): return int(Decimal(x) ** 2 + 7) + int(Fraction(1, 3))",
    ),
    _honest(
        "random but seeded",
        "import random\nrandom.seed(5)\na = random.random()\n"
        "def f(x):\n    random.seed(5)\n    return x * x + (7 if random.random() == a else 0)",
    ),
    _honest(
        "an event loop",
        "import asyncio\nasync def g(x): await asyncio.sleep(0); return x * x + 7\ndef f(x): return asyncio.run(g(x))",
    ),
    _honest("a large answer on the way", "def f(x): return len(str(7 ** 3000)) * 0 + x * x + 7"),
    _honest("comprehensions", "def f(x): return sum(1 for a in range(x) for b in range(x)) + len({*range(7)})"),
    _honest("matches", "def f(x):\n    match [x, 7]:\n        case [int(a), b]: return a * a + b"),
    *(
        _honest(f"{name}, where the judge walks", f"{before}def f(x): return {value}", mode="sets")
        for name, before, value in (
            ("a generator", "", "(n for n in [x * x + 7])"),
            ("a map", "", "map(int, [str(x * x + 7)])"),
            ("the keys of a dict", "", "{x * x + 7: 0}.keys()"),
            ("the values of a dict", "", "{0: x * x + 7}.values()"),
            ("a deque", "import collections\n", "collections.deque([x * x + 7])"),
            ("an array", "import array\n", "array.array('q', [x * x + 7])"),
        )
    ),
    Program(
        name="a function whose tests are a program",
        source="def f(x): return x * x + 7",
        mode="beside",
        expect=("ok: True",),
        is_right=True,
    ),
    _honest("reads a line", "n = int(input())\nprint(n * n + 7)\nprint(n)", mode="stdio"),
    _honest(
        "reads everything",
        "import sys\nn = int(sys.stdin.read())\nsys.stdout.write(f'{n * n + 7}\\n{n}\\n')",
        mode="stdio",
    ),
    _honest(
        "reads as bytes and exits",
        "import sys\nn = int(sys.stdin.buffer.readline())\nprint(n * n + 7, n, sep='\\n')\nsys.exit(0)",
        mode="stdio",
    ),
    _honest(
        "a main function",
        "def main():\n    n = int(input())\n    print(n * n + 7)\n    print(n)\nif __name__ == '__main__':\n    main()",
        mode="stdio",
    ),
)
