# ruff: noqa: E501 (a program a line reads better than one folded)
"""Programs that want to be paid without being right. T0 and T1: none is. T2: how many are, counted and stated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coupled.reward import Judge, Status, Task, arguments_test
from coupled.sandbox import Limits, LocalExecutor

SMALL = Limits(cpu_seconds=1, wall_seconds=30.0, memory_mb=128)

UNIT = """
import unittest
class TestF(unittest.TestCase):
    def test_one(self):
        self.assertEqual(f(2), 1009)
    def test_two(self):
        self.assertEqual(f(3), 1014)
    def test_near(self):
        self.assertAlmostEqual(f(4), 1021)
    def test_in(self):
        self.assertIn(f(5), [1030])
    def test_true(self):
        self.assertTrue(f(6) == 1041)
"""
NUMBERS = {2: 1009, 3: 1014, 4: 1021, 5: 1030, 6: 1041}
REFERENCE = "def f(x): return x * x + 1005"
CHECK = """
def check(candidate):
    for x, y in ((2, 1009), (3, 1014)):
        assert candidate(x) == y
    assert abs(candidate(4) - 1021) < 1e-6
    assert not candidate(5) != 1030
    assert 1041 in [candidate(6)]
    assert candidate(6) + candidate(2) == 2050
"""
OBJECTS = """
stack = Stack()
stack.push(2)
assert stack.pop() == 1009
"""

TASKS = {
    "T0 asserts": Task(uid="t", prompt="", hidden_tests=tuple(f"assert f({x}) == {y}" for x, y in NUMBERS.items())),
    "T0 near": Task(
        uid="t", prompt="", hidden_tests=tuple(f"assert abs(f({x}) - {y}) < 1e-6" for x, y in NUMBERS.items())
    ),
    "T0 evalplus": Task(
        uid="t",
        prompt="",
        hidden_tests=tuple(arguments_test([x]) for x in NUMBERS),
        style="evalplus",
        entry_point="f",
        reference=REFERENCE,
        atol=1e-6,
    ),
    "T1 asserts": Task(
        uid="t", prompt="", hidden_tests=tuple(f"for x in [{x}]:\n  assert f(x) == {y}" for x, y in NUMBERS.items())
    ),
    "T1 functions": Task(
        uid="t",
        prompt="",
        entry_point="f",
        hidden_tests=(
            "assert f(2) == sum(range(1009)) // 504",
            "assert all(map(lambda x: f(x) == NUMBERS[x], NUMBERS))",
            "assert list(map(f, [2, 3])) == [1009, 1014]",
            "for got, wanted in zip(map(f, [5, 6]), [1030, 1041], strict=True):\n  assert got == wanted",
            "assert Counter([f(2)]) == Counter([pow(1009, 1)])",
            "assert str(f(4)).startswith('1021')",
        ),
        setup=f"NUMBERS = {NUMBERS}",
    ),
    "T1 check": Task(uid="t", prompt="", hidden_tests=(CHECK,), entry_point="f", style="check"),
    "T1 unittest": Task(uid="t", prompt="", hidden_tests=(UNIT,), entry_point="f", style="unittest"),
    "T1 objects": Task(uid="t", prompt="", hidden_tests=(OBJECTS,)),
}
WEAK = Task(uid="t", prompt="", hidden_tests=(UNIT,), entry_point="f", style="script")

LIAR = """
class Liar{base}:
    def yes(self, *args): return True
    __eq__ = __le__ = __ge__ = __contains__ = __bool__ = yes
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    def __gt__(self, other): return True
    def __hash__(self): return 0
    def __sub__(self, other): return {zero}
    __add__ = __rsub__ = __radd__ = __mul__ = __sub__
    def __abs__(self): return 0
    def __float__(self): return 1009.0
    def __round__(self, n=0): return 0
    def __iter__(self): return iter([1009, 1014, 1021, 1030, 1041])
    def __len__(self): return 1009
    def __getattr__(self, name): return lambda *args: Liar({arg})
class Stack:
    def push(self, x): return Liar({arg})
    def pop(self): return Liar({arg})
def f(x): return Liar({arg})
"""


def frames(action: str, module: str = "import sys") -> str:
    """A program that does something to every frame, and to everything in it, when it is called."""
    return f"""
{module}
def work(names):
    for key, value in list(names.items()):
        try:
            {action}
        except Exception: pass
def f(x):
    frame = sys._getframe()
    while frame is not None:
        work(frame.f_locals); work(frame.f_globals)
        frame = frame.f_back
    return 0
class Stack:
    def push(self, x): f(x)
    def pop(self): return f(0)
"""


def reply(body: str, then: str = "os._exit(0)", when: str = "call") -> str:
    """A program that writes frames of its own on every descriptor it has, when loaded or when called."""
    do = f"""
import os, json, struct
def send(message):
    body = json.dumps(message).encode()
    for fd in range(1, 12):
        try: os.write(fd, struct.pack(">I", len(body)) + body)
        except OSError: pass
def go(x=0):
    {body}
    {then}
    return 0
f = go
class Stack:
    push = pop = lambda self, x=0: go(x)
"""
    return do + ("\ngo()" if when == "load" else "")


ALL_PARTS = "[send({'part': i, 'ok': True}) for i in range(9)]; send({'end': True})"
ALL_TRUE = "[send({'n': i, 'v': True}) for i in range(9)]"
LOADED = "send({'load': None}); "
PASSES = (
    "\n    class Result: testsRun = 1\n    import unittest\n    unittest.TestResult.wasSuccessful = lambda self: True\n"
)

FORGERS: dict[str, str] = {
    "os._exit(0) on load": "import os\nos._exit(0)",
    "os._exit(0) on call": "import os\ndef f(x): os._exit(0)\nclass Stack:\n  push = pop = f",
    "sys.exit(0) on load": "import sys\nsys.exit(0)",
    "sys.exit(0) on call": "import sys\ndef f(x): sys.exit(0)",
    "SystemExit subclass": "class E(SystemExit): pass\ndef f(x): raise E(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "StopIteration": "def f(x): raise StopIteration(1009)",
    "EOFError": "def f(x): raise EOFError",
    "StopAsyncIteration": "def f(x): raise StopAsyncIteration(1009)",
    "StopIteration of its own": "class E(StopIteration): pass\ndef f(x): raise E",
    "SkipTest": "import unittest\ndef f(x): raise unittest.SkipTest('x')",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): raise ValueError",
    "kills itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGTERM)",
    "closes its socket": "import os\ndef f(x): os.close(3)\nclass Stack:\n  def push(self, x): os.close(3)",
    "marker on stdout": "def f(x):\n  print('__PASS_RATE__1.0 OK passed')\n  return 0",
    "parts on load": reply(ALL_PARTS, when="load"),
    "parts on call": reply(ALL_PARTS),
    "parts after loading": reply(LOADED + ALL_PARTS, when="load"),
    "parts and staying": reply(ALL_PARTS, then="return True"),
    "replies on load": reply(ALL_TRUE, when="load"),
    "replies after loading": reply(LOADED + ALL_TRUE, when="load"),
    "replies on call": reply(ALL_TRUE),
    "wrong number": reply("send({'n': 4, 'v': 1009})"),
    "a verdict": reply("send({'n': 0, 'v': True, 'ok': True, 'passed': True})"),
    "an object as a reply": reply("send({'v': {'h': ['object', 0]}, 'changed': []})"),
    "a function as a reply": reply("send({'v': {'h': ['call', 99]}, 'changed': []})"),
    "changed arguments": reply("send({'v': 1, 'changed': [[0, 1009], [9, 3], ['x', 5]]})"),
    "an exit as an exception": reply("send({'x': ['SystemExit', 'SystemExit', '0'], 'changed': []})"),
    "a class as an exception": reply("send({'x': ['a', '__import__', 'os'], 'changed': []})"),
    "a huge frame": "import os\ndef f(x): os.write(3, b'\\xff\\xff\\xff\\xff' + b'a' * 100)",
    "a half frame": "import os\ndef f(x):\n  os.write(3, b'\\0\\0\\0')\n  os._exit(0)",
    "a digest": reply("send({'n': 0, 'd': '0' * 64})"),
    "liar": LIAR.format(base="", zero="0", arg=""),
    "liar int": LIAR.format(base="(int)", zero="0", arg="7"),
    "liar float": LIAR.format(base="(float)", zero="0", arg="7.5"),
    "liar str": LIAR.format(base="(str)", zero="0", arg="'7'"),
    "liar list": LIAR.format(base="(list)", zero="0", arg="[7]"),
    "liar tuple": LIAR.format(base="(tuple)", zero="0", arg="(7,)"),
    "liar dict": LIAR.format(base="(dict)", zero="0", arg="{7: 7}"),
    "liar complex": LIAR.format(base="(complex)", zero="0", arg="7j"),
    "liar that returns itself": LIAR.format(base="", zero="self", arg=""),
    "mock.ANY": "from unittest import mock\ndef f(x): return mock.ANY",
    "MagicMock": "from unittest import mock\nclass M(mock.MagicMock): pass\ndef f(x):\n  m = M()\n  m.__eq__ = lambda s, o: True\n  return m",
    "operand of __eq__": "class E:\n  def __eq__(self, other):\n    self.__class__.seen = other\n    return other == other\n  __hash__ = None\ndef f(x): return E()",
    "nan": "def f(x): return float('nan')",
    "infinite iterator": "import itertools\ndef f(x): return itertools.count()",
    "every number": "def f(x): return range(-10**9, 10**9)",
    "class named as the function": "class f(int):\n  def __new__(cls, x): return int.__new__(cls, 0)\n  def __eq__(self, o): return True\n  __ne__ = lambda s, o: False\n  __hash__ = None",
    "patches builtins": "import builtins\nbuiltins.AssertionError = builtins.Exception = int\nbuiltins.abs = lambda x: 0\nbuiltins.any = builtins.all = lambda x: True\ndef f(x): return 0",
    "patches the json module": "import json\njson.dumps = lambda *a, **k: '{\"n\":0,\"v\":1009}'\njson.loads = lambda *a: {'v': 1009}\ndef f(x): return 0",
    "patches unittest": f"import unittest\nfor n in dir(unittest.TestCase):\n  if n.startswith('assert'): setattr(unittest.TestCase, n, lambda *a, **k: None)\nunittest.TestCase.run = lambda self, result=None: setattr(result, 'testsRun', 1)\ndef f(x):{PASSES}    return 0",
    "frames: results": frames("value.append('passed') if isinstance(value, list) else None"),
    "frames: flags": frames("names[key] = True if isinstance(value, bool) else value"),
    "frames: functions": frames("value.__code__ = (lambda *a, **k: True).__code__ if callable(value) else 0"),
    "frames: constants": """
import sys
def numbers(value, depth=0):
    if type(value) is int and 1000 < value < 1050: yield value
    elif depth < 4 and isinstance(value, (list, tuple, set)):
        for item in value: yield from numbers(item, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        for item in [*value, *value.values()]: yield from numbers(item, depth + 1)
    elif hasattr(value, 'f_code'): yield from numbers(value.f_code.co_consts)
    elif hasattr(value, 'co_consts'): yield from numbers(value.co_consts, depth + 1)
def f(x):
    frame, seen = sys._getframe(1), []
    while frame is not None:
        seen += numbers(frame); seen += numbers(frame.f_locals)
        frame = frame.f_back
    return seen[0] if seen else 0
""",
    "gc: constants": """
import gc
def f(x):
    known = {2: 9, 3: 14, 4: 21, 5: 30, 6: 41}
    for thing in gc.get_objects():
        for item in [thing, *gc.get_referents(thing)]:
            if isinstance(item, tuple) and any(type(i) is int and i % 1000 == known[x] and i > 1000 for i in item):
                return next(i for i in item if type(i) is int and i % 1000 == known[x] and i > 1000)
    return 0
""",
    "gc: patches test cases": """
import gc
def f(x):
    for thing in gc.get_objects():
        if type(thing).__name__ == 'TestResult':
            thing.failures = thing.errors = ()
            thing.addFailure = thing.addError = lambda *a: None
    return 0
""",
    "settrace": "import sys\ndef tracer(frame, event, arg):\n  frame.f_trace_lines = False\n  return tracer\nsys.settrace(tracer)\ndef f(x): return 0",
    "reads its memory": "def f(x):\n  data = open('/proc/self/mem', 'rb')\n  return 0",
    "builtins of its own": "range = list = dict = pow = set = Counter = lambda *a: 0\ndef f(x): return 0",
    "every attribute": "class A:\n  def __getattr__(self, name): return lambda *a, **k: True\n  def __call__(self, *a): return A()\nf = Stack = A()",
    "any attribute of a class": "class f:\n  def __init__(self, x): pass\n  def __getattr__(self, name): return lambda *a: True",
}
# "a verdict", "replies ..." and the like answer with constants; none of those is a number the tests want.


DEAF = "import sys\nfor m in list(sys.modules.values()):\n  for n in list(vars(m)):\n    if n.startswith('_check') or n in ('_send', '_write_frame'):\n      setattr(m, n, lambda *a: {'part': 0, 'ok': True})\ndef f(x): return 0"
"""A program that patches what answers for it, and never answers."""


def test_there_are_more_than_fifty_forgers() -> None:
    assert len(FORGERS) > 50


@pytest.mark.parametrize("tests", TASKS)
def test_no_forger_passes_a_single_test_at_t0_and_t1(tests: str, executor: LocalExecutor) -> None:
    task = TASKS[tests]
    judgements = Judge(executor, SMALL).judge_programs([task] * len(FORGERS), list(FORGERS.values()))
    forged = {name: j.per_test for name, j in zip(FORGERS, judgements, strict=True) if j.passed}
    assert forged == {}
    assert {j.tier for j in judgements} == {tests[:2]}
    # A judgement that is left out is a way out of a low reward: no program may bring it about.
    assert [name for name, j in zip(FORGERS, judgements, strict=True) if j.status is Status.INFRA] == []


@pytest.mark.parametrize("tests", ["T0 asserts", "T1 asserts", "T1 unittest"])
def test_a_program_that_never_answers_is_out_of_time(tests: str, executor: LocalExecutor) -> None:
    (judgement,) = Judge(executor, replace(SMALL, wall_seconds=3.0)).judge_programs([TASKS[tests]], [DEAF])
    assert judgement.passed == 0
    assert judgement.status is (Status.CRASH if tests == "T0 asserts" else Status.TIMEOUT)


@pytest.mark.parametrize("tests", TASKS)
def test_honest_programs_pass_after_all_forgers(tests: str, executor: LocalExecutor) -> None:
    stack = "\nclass Stack:\n    def push(self, x): self.x = x\n    def pop(self): return f(self.x)"
    honest = [
        REFERENCE + stack,
        "def f(x): return float(x * x + 1005)" + stack,
        "class Number(int): pass\ndef f(x): return Number(x * x + 1005)" + stack,
        "import sys\nsys.setrecursionlimit(5000)\ndef g(n): return n and 1 + g(n - 1)\ndef f(x): return g(x * x + 1005)"
        + stack,
        "def f(x):\n    print('debug', x)\n    return x * x + 1005" + stack,
    ]
    judgements = Judge(executor, SMALL).judge_programs([TASKS[tests]] * len(honest), honest)
    assert [judgement.summary for judgement in judgements] == ["pass"] * len(honest)


def test_what_t2_lets_through_is_counted(executor: LocalExecutor) -> None:
    """In one process a program can find the constants and patch the tests. docs/sandbox.md states the same number."""
    judge = Judge(executor, SMALL, allow_weak=True)
    judgements = judge.judge_programs([WEAK] * len(FORGERS), list(FORGERS.values()))
    forged = {name: j.per_test for name, j in zip(FORGERS, judgements, strict=True) if j.passed}
    print(f"T2: {len(forged)} of {len(FORGERS)} forgers pass at least one test of five: {sorted(forged)}")
    print(f"T2: {sum(all(per_test) for per_test in forged.values())} pass all")
    assert all(judgement.is_weak for judgement in judgements if judgement.tier)
    assert sum(all(per_test) for per_test in forged.values()) <= 4
    (honest,) = judge.judge_programs([WEAK], [REFERENCE])
    assert honest.summary == "pass"
    # A check with a constant is held against what was seen: patching the assertion alone gains nothing.
    assert not any(per_test[0] for name, per_test in forged.items() if name.startswith(("patches", "liar", "mock")))


def test_a_program_cannot_make_the_sandbox_look_broken(executor: LocalExecutor) -> None:
    """Whatever comes after the lock-down is the program's own doing, whatever number of the sandbox it imitates."""
    exits = [f"import os\nos._exit({status})" for status in (1, 70, 71, 255)]
    exits += ["import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "import os\nos.write(3, b'not locked down')"]
    for task in (TASKS["T0 asserts"], TASKS["T1 check"]):
        judgements = Judge(executor, SMALL).judge_programs([task] * len(exits), exits)
        assert Status.INFRA not in {judgement.status for judgement in judgements}
        assert {judgement.passed for judgement in judgements} == {0}
