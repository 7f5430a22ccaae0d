"""Text that is hard to read, for the judge as for the interpreter."""

from __future__ import annotations

from attacks.record import UNPAID, Program

_SQUARE = "def f(x): return x * x + 7"


def _odd(name: str, source: str, *expect: str) -> Program:
    return Program(name=name, source=source, expect=expect or UNPAID)


def _right(name: str, source: str) -> Program:
    return Program(name=name, source=source, expect=("ok: 8",), is_right=True)


PROGRAMS = (
    _odd("nothing", "", "ok: raised NameError", "load_error*"),
    _odd("a remark only", "# " + _SQUARE, "ok: raised NameError", "load_error*"),
    _odd("a zero byte", "\0" + _SQUARE, "load_error*"),
    _odd("a zero byte in a text", "a = '\0'\n" + _SQUARE, "load_error*"),
    _odd("half a character", "a = '\ud800'\n" + _SQUARE, *UNPAID),
    _odd("many brackets", "f = " + "(" * 50_000 + "0" + ")" * 50_000),
    _odd("many lists", "f = " + "[" * 90 + "]" * 90 + "\n" * 3 + "f = lambda x: 0", "ok: 0", "load_error*"),
    _odd("many signs", "f = " + "-" * 200_000 + "1"),
    _odd("many negations", "f = " + "not " * 50_000 + "1"),
    _odd("many sums", "f = lambda x: " + "+".join(["1"] * 50_000)),
    _odd("many attributes", "f = a" + ".a" * 100_000),
    _odd("many calls", "f = a" + "()" * 50_000),
    _odd("many powers", "f = lambda x: " + "**".join(["1"] * 20_000)),
    _odd("many comparisons", "f = lambda x: " + " < ".join(["1"] * 20_000)),
    _odd("many lambdas", "f = " + "lambda: " * 20_000 + "0"),
    _odd("many conditions", "f = " + "1 if 0 else " * 20_000 + "0"),
    _odd("many blocks", "\n".join(" " * n + "if 1:" for n in range(99)) + "\n" + " " * 99 + "pass"),
    _odd("many loops", "\n".join(" " * n + "for a in b:" for n in range(30)) + "\n" + " " * 30 + "pass", "load_error*"),
    _odd("many decorators", "@(lambda f: f)\n" * 20_000 + "def f(x): return 0"),
    _odd("a number of a million digits", "f = lambda x: " + "9" * 1_000_000),
    _odd("a number that folds into memory", "f = lambda x: 1 << (1 << 40)"),
    _odd("a text that folds into memory", "f = lambda x: 'ab' * 10 ** 11"),
    _odd("a format within formats", "f = lambda x: " + "f'{" * 4 + "1" + "}'" * 4),
    _odd("one line of a million characters", "f = lambda x: " + "[" + "0," * 400_000 + "]"),
    _odd(
        "compiles itself without end",
        'import sys\ns = \'exec(compile(s, "s", "exec"))\'\nexec(s)',
        "load_error*",
        *UNPAID,
    ),
    _odd(
        "a class that makes itself",
        "class A:\n    def __init_subclass__(c):\n        class B(c): pass\nclass C(A): pass",
        "load_error*",
    ),
    _odd(
        "a metaclass that never ends",
        "class M(type):\n    def __prepare__(*a, **k):\n        while True: pass\nclass C(metaclass=M): pass",
        "timeout*",
    ),
    _odd("the wrong encoding", "# -*- coding: rot13 -*-\nqrs s(k): erghea k * k + 7", *UNPAID),
    _odd("an encoding that does not exist", "# -*- coding: hostile -*-\ndef f(x): return 0"),
    _odd("no builtins", "__builtins__ = {}\ndef f(x): return 0", "ok: 0"),
    _odd("no builtins at all", "import builtins\nbuiltins.__dict__.clear()\ndef f(x): return 0"),
    _odd("no import", "import builtins\ndel builtins.__import__\ndef f(x): return 0"),
    _odd("no module", "import sys\nsys.modules.clear()\ndef f(x): return 0"),
    _odd("its own name is gone", "import sys\ndel sys.modules['solution'], __name__\ndef f(x): return 0"),
    # Python puts such names together in time that grows with the square of their length; the judge parses on the host.
    _odd("a name of many marks", "a" + "\u0315\u0300" * 49_000 + " = 1\n" + _SQUARE, *UNPAID),
    _odd("an import of many parts", "import " + "a." * 49_000 + "a\n" + _SQUARE, *UNPAID),
    _odd("an import of many parts on many lines", "import " + "a.\\\n" * 24_000 + "a\n" + _SQUARE, *UNPAID),
    _odd("a text with many fields", "x = 1\ny = f'" + "{x}" * 30_000 + "'\ndef f(x): return 0", *UNPAID),
    _odd("the way round a text is read", "\u202edef f(x): return 0", "load_error*"),
    _odd("a blank that is none", "def\u00a0f(x): return 0", "load_error*"),
    _odd("waits at the top", "await 1\ndef f(x): return 0", "load_error*"),
    _odd("braces from the future", "from __future__ import braces", "load_error*"),
    _odd("gives its name away while it is called", "def f(x):\n    global f\n    f = None\n    return 0", "ok: 0"),
    _odd("a name that is a module", "import math as f", "ok: raised TypeError"),
    _odd("a name that is gone", "def f(x): return 0\ndel f", "ok: raised NameError"),
    _odd(
        "a name that is a property", "class C:\n    @property\n    def f(self): return lambda x: 0\nf = C().f", "ok: 0"
    ),
    _odd("a name that is no function", "f = 8", "ok: raised TypeError"),
    _odd(
        "a warning that is an error", "import warnings\nwarnings.simplefilter('error')\na = '\\d'\ndef f(x): return 0"
    ),
    _odd("code that is not code", "def f(x): return 0\nf.__code__ = f.__code__.replace(co_code=b'\\xff' * 64)"),
    _odd(
        "code on a stack of no size",
        "def f(x): return 0\nf.__code__ = f.__code__.replace(co_stacksize=0, co_consts=())",
    ),
    # Right as the first bytes of a file; in a text it is a character like any other, and no Python.
    _odd("a mark of the byte order", "\ufeff" + _SQUARE, "load_error*"),
    _right("line ends of another system", "def f(x):\r\n    return x * x + 7\r\n"),
    _right("a form feed", "\f\n" + _SQUARE),
    _right("letters of another alphabet", "def 𝔣(х): return х * х + 7"),
    _right("names of the interpreter", "type = list = len = None\n" + _SQUARE),
    _right("hides behind a partial", "import functools\nf = functools.partial(lambda a, x: x * x + a, 7)"),
    _right("a callable object", "class F:\n    def __call__(self, x): return x * x + 7\nf = F()"),
    _right("a tower of closures", "f = lambda x: x * x + 7\nfor _ in range(50): f = (lambda g: lambda x: g(x))(f)"),
    _right("annotations without sense", "def f(x: 1 / 1, *, y: print = 0) -> 'no' : return x * x + 7"),
)
