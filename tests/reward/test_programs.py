"""Tests that are programs: `check(candidate)`, test classes, asserts that are no calls with constants."""

from __future__ import annotations

import pytest

from coupled.reward import Judge, Judgement, Status, Task, UnsupportedTest, plan
from coupled.reward.styles.check import split_check
from coupled.reward.styles.stdio import same_output
from coupled.sandbox import Limits, LocalExecutor

SMALL = Limits(cpu_seconds=1, wall_seconds=30.0, memory_mb=128)


def judged(executor: LocalExecutor, task: Task, program: str, **options: bool) -> Judgement:
    return Judge(executor, SMALL, **options).judge_programs([task], [program])[0]


def asserts(*tests: str, **fields: str) -> Task:
    return Task(uid="t", prompt="", hidden_tests=tests, **fields)  # type: ignore[arg-type]


def check(body: str, entry_point: str = "f", before: str = "") -> Task:
    text = f"{before}\ndef check(candidate):\n" + "\n".join(f"    {line}" for line in body.splitlines())
    return Task(uid="t", prompt="", hidden_tests=(text,), entry_point=entry_point, style="check")


STACK = """
class Stack:
    limit = 3
    def __init__(self, items=()):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
        return self
    def pop(self):
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __getitem__(self, index):
        return self.items[index]
"""

# (test, a right program, a wrong one); none of the tests is calls with constants
HONEST = [
    ("assert f(3) == list(range(3))", "def f(n): return list(range(n))", "range = lambda n: []\ndef f(n): return []"),
    ("assert f(2) == pow(2, 3)", "def f(x): return 8", "pow = f = lambda *x: 0"),
    ("assert f(1).startswith('ab')", "def f(x): return 'abc'", "class f:\n  startswith = lambda *x: True"),
    ("assert f('ab') == Counter('aab')", "def f(s): return {'a': 2, 'b': 1}", "Counter = f = lambda s: {}"),
    ("assert all(map(f, [1, 2]))", "def f(x): return x", "def f(x): raise StopIteration"),
    (
        "for x, y in zip(map(f, [1, 2]), [1, 2]):\n  assert x == y\nassert f(1)",
        "def f(x): return x",
        "def f(x):\n  if x > 1: raise StopIteration\n  return x",
    ),
    (
        "from decimal import Decimal as D\nassert isinstance(f(D('0.1')), D) and f(D('0.1')) == D('0.3')",
        "def f(x): return 3 * x",
        "def f(x): return 0.3",
    ),
    (
        "assert f(1) == [Fraction(1, 3)] and f(1)[0].denominator == 3",
        "from fractions import Fraction\ndef f(x): return [Fraction(x, 3)]",
        "def f(x): return [x / 3]",
    ),
    (
        "import datetime\nassert f(datetime.date(2024, 2, 28)) == datetime.date(2024, 3, 1) - datetime.timedelta(1)",
        "import datetime\ndef f(d): return d + datetime.timedelta(days=1)",
        "def f(d): return d",
    ),
    (
        "import datetime\nassert f(1) == datetime.datetime(2024, 1, 1, 1) and f(2).hour == 2",
        "import datetime\ndef f(h): return datetime.datetime(2024, 1, 1, h)",
        "import datetime\ndef f(h): return datetime.date(2024, 1, 1)",
    ),
    ("from solution import f as g\nassert g(g(1)) == 3", "def f(x): return x + 1", "def f(x): return x"),
    ("import solution\nassert solution.f(solution.f(1)) == 3", "def f(x): return x + 1", "def f(x): return x"),
    ("from solution import *\nassert f(f(1)) == 3", "def f(x): return x + 1", "def f(x): return x"),
    ("assert [x * 2 for x in f(3)] == [0, 2, 4]", "def f(n): return range(n)", "def f(n): return [n]"),
    ("xs = [3, 1]\nf(xs)\nassert xs == [1, 3]", "def f(xs): xs.sort()", "def f(xs): return sorted(xs)"),
    ("d = {'a': [1]}\nf(d)\nassert d == {'a': [1, 2]}", "def f(d): d['a'].append(2)", "def f(d): d['a'] = 2"),
    ("s = {1}\nf(s)\nassert s == {1, 2}", "def f(s): s.add(2)", "def f(s): pass"),
    ("inner = [1]\nf([inner])\nassert inner == [1, 2]", "def f(x): x[0].append(2)", "def f(x): x.append(2)"),
    ("assert f(2)(3) == 5", "def f(n): return lambda k: n + k", "def f(n): return lambda k: n"),
    ("g = f()\nassert next(g) == 1 and list(g) == [2]", "def f():\n  yield 1\n  yield 2", "def f(): yield 1"),
    (
        "assert apply(double, 3) == 6",
        "double = lambda x: 2 * x\ndef apply(f, x): return f(x)",
        "apply = double = lambda *x: 0",
    ),
    ("g = f\nassert g(1) and not hasattr(g, 'ok')", "def f(x): return x\nf.ok = True", "def f(x): return 0"),
    ("assert gcd(gcd(4, 6), 3) == 1", "from math import gcd", "def gcd(*x): return 2"),
    ("assert f(f(1)) == 3", "def f(x): return x + 1", "def f(x): return 2 * x"),
    ("assert f(*[1], **{'y': 2}) == 3", "def f(x, y): return x + y", "def f(x, y): return x"),
    (
        "try:\n  f()\nexcept KeyError as e:\n  assert 'k' in str(e)\nelse:\n  assert 0",
        "def f(): {}['k']",
        "def f(): 1 / 0",
    ),
    (
        "try:\n  f()\nexcept ValueError:\n  pass\nelse:\n  assert 0",
        "class E(ValueError): pass\ndef f(): raise E",
        "def f(): 0",
    ),
    (
        "s = Stack()\ns.push(1).push(2)\nassert (len(s), s.items, s.pop(), s[0]) == (2, [1, 2], 2, 1)",
        STACK,
        "Stack = list",
    ),
    ("assert Stack.limit == 3 and Stack([1]).pop() == 1", STACK, "class Stack: limit = 4"),
    ("s = Stack()\ns.items = [7]\nassert s.pop() == 7", STACK, "class Stack:\n  def pop(self): return 6"),
    ("import math\nassert math.sqrt(f()) == 3 and f'{f()}' == '9'", "def f(): return 9", "def f(): return 8"),
    ("assert sys.getsizeof(f()) == sys.getsizeof((1, 2))", "def f(): return (1, 2)", "def f(): return 1"),
    ("def twice(x):\n  return 2 * x\nassert twice(f(1)) == 4", "def f(x): return 2", "twice = f = lambda x: 4"),
    (
        "for i in range(20):\n  assert f(i) == i * i",
        "def f(i): return i * i",
        "def f(i): return i * i if i < 19 else 0",
    ),
]


@pytest.mark.parametrize(("test", "right", "wrong"), HONEST, ids=range(len(HONEST)))
def test_a_right_program_passes_and_a_wrong_one_does_not(
    test: str, right: str, wrong: str, executor: LocalExecutor
) -> None:
    task = asserts(test)
    assert plan(task).tier == "T1"
    judgement = judged(executor, task, right)
    assert (judgement.summary, judgement.per_test, judgement.tier, judgement.is_weak) == ("pass", (True,), "T1", False)
    assert judged(executor, task, wrong).per_test == (False,)


def test_numbers_of_numpy_reach_the_tests_as_those_of_python(numpy_executor: LocalExecutor) -> None:
    program = "import numpy as np\ndef f(n): return [np.int64(n), np.bool_(n), np.float32(n / 2)]"
    for test, tier in (
        ("assert f(1) == [1, True, 0.5]", "T0"),
        ("assert [str(x) for x in f(1)] == ['1', 'True', '0.5']", "T1"),
    ):
        judgement = Judge(numpy_executor).judge_programs([asserts(test)], [program])[0]
        assert (judgement.tier, judgement.summary) == (tier, "pass")


def test_every_test_of_a_list_is_judged_apart(executor: LocalExecutor) -> None:
    task = asserts("assert f(1) == 1", "assert f(f(2)) == 16", "assert f(3) == 9", "assert f(4) == 16")
    program = "def f(x):\n    if x == 3: raise SystemExit\n    return x * x"
    judgement = judged(executor, task, program)
    assert judgement.per_test == (True, True, False, True)
    assert (judgement.summary, judgement.status, judgement.pass_rate) == ("fail", Status.OK, 0.75)
    ends = judged(executor, task, "import os\ndef f(x):\n    if x == 3: os._exit(0)\n    return x * x")
    assert (ends.per_test, ends.summary) == ((True, True, False, False), "incomplete")
    hangs = judged(executor, task, "def f(x):\n    while x == 4: pass\n    return x * x")
    assert (hangs.per_test, hangs.summary) == ((True, False, False, False), "timeout")
    assert hangs.usage.cpu_seconds > 0.4


def test_a_check_of_plain_asserts_is_calls_and_has_partial_credit(executor: LocalExecutor) -> None:
    task = check(
        "'''Words.'''\nassert candidate(1) == 1\nassert abs(candidate(2) - 4) < 1e-6\nassert candidate(3) == 9"
    )
    assert split_check(task.hidden_tests[0], "f") == (
        "assert f(1) == 1",
        "assert abs(f(2) - 4) < 1e-06",
        "assert f(3) == 9",
    )
    assert plan(task).tier == "T0"
    assert judged(executor, task, "def f(x): return x * x if x < 3 else 0").per_test == (True, True, False)


def test_a_check_with_a_loop_has_a_part_for_each_statement_that_asserts(executor: LocalExecutor) -> None:
    body = "import random\nfor _ in range(5):\n    x = random.randint(0, 9)\n    assert candidate(x) == x * x\n"
    task = check(body + "assert candidate(10) == 100\ny = 2\nassert candidate(y) == 5")
    assert (plan(task).tier, plan(task).total) == ("T1", 3)
    assert judged(executor, task, "def f(x): return x * x").per_test == (True, True, False)


def test_helpers_of_the_tests_are_not_the_program_s(executor: LocalExecutor) -> None:
    task = check(
        "x = candidate([1, 2])\nassert abs(poly([1, 2], x)) < 1e-6", before="def poly(c, x): return c[0] + c[1] * x"
    )
    assert judged(executor, task, "def f(c): return -c[0] / c[1]").passed == 1
    assert judged(executor, task, "def poly(c, x): return 0\ndef f(c): return 1.0").passed == 0


def test_a_method_of_a_fresh_object_can_be_the_candidate(executor: LocalExecutor) -> None:
    task = check("for x in (1, 2):\n    assert candidate(x=x) == x + 1", entry_point="Solution().add")
    assert judged(executor, task, "class Solution:\n    def add(self, x): return x + 1").summary == "pass"
    assert judged(executor, task, "class Solution:\n    def add(self, x): return x").passed == 0
    assert judged(executor, task, "x = 1").passed == 0


UNIT = """
import unittest
class Base(unittest.TestCase):
    def setUp(self):
        self.start = 2
class TestF(unittest.TestCase):
    def setUp(self):
        self.xs = [1, 2]
    def test_equal(self):
        self.assertEqual(f(self.xs), 3)
    def test_raises(self):
        with self.assertRaises(TypeError):
            f(5)
    def test_many(self):
        for n in range(4):
            with self.subTest(n=n):
                self.assertEqual(f([n]), n)
    def test_close(self):
        self.assertRaises(TypeError, f, 5)
        self.assertIsInstance(f([1]), int)
        self.assertAlmostEqual(f([0.1, 0.2]), 0.3)
if __name__ == "__main__":
    unittest.main()
"""


def test_each_method_of_a_test_class_is_judged_apart(executor: LocalExecutor) -> None:
    task = Task(uid="t", prompt="", hidden_tests=(UNIT,), entry_point="f", style="unittest")
    assert (plan(task).tier, plan(task).total) == ("T1", 4)
    assert judged(executor, task, "def f(xs): return sum(xs)").per_test == (True, True, True, True)
    assert judged(executor, task, "def f(xs): return 3").per_test == (True, False, False, False)
    assert judged(executor, task, "import unittest\nraise unittest.SkipTest").summary == "load_error"
    skip = "import unittest\ndef f(xs): raise unittest.SkipTest('no')"
    assert judged(executor, task, skip).passed == 0


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("assert eval(f(1)) == 2", "eval"),
        ("import pickle\nassert pickle.loads(f(1)) == 2", "pickle"),
        ("exec(f(1))\nassert True", "exec"),
        ("from importlib import import_module\nassert import_module(f(1))", "importlib"),
        ("assert __import__(f(1))", "__import__"),
        ("import subprocess\nassert subprocess.run(f(1))", "subprocess"),
        ("assert [x for x in [1]] == [1]", "calls nothing of the program"),
        ("x = [f(i) for i in range(3)]", "asserts nothing"),
        ("assert f(1) ==", "does not parse"),
        ("for x in [1]:\n  assert isinstance(Stack(), Stack)", "'Stack' of the program as a type"),
        ("assert type(Stack()) == Stack", "'Stack' of the program as a type"),
        ("try:\n  f()\nexcept (MyError, ValueError):\n  pass\nelse:\n  assert 0", "'MyError' of the program as a type"),
        ("class Mine(Stack): pass\nassert Mine().x", "'Stack' of the program as a type"),
        (
            "import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()) as o: f()\nassert o",
            "redirect_stdout",
        ),
        ("import sys, io\nsys.stdin = io.StringIO('1')\nassert f() == 1", "sys.stdin"),
        ("import sys\nsys.argv = ['x']\nassert f() == 1", "sys.argv"),
        ("from unittest import mock\nassert f(mock.Mock())", "unittest.mock"),
        ("from unittest.mock import patch\nassert f(patch)", "unittest.mock"),
        ("import unittest.mock\nassert f(unittest.mock.Mock())", "unittest.mock"),
        ("import tempfile\nassert f(tempfile.mkdtemp())", "tempfile"),
        ("f('x')\nassert open('x').read() == '1'", "uses open"),
        (
            "from your_solution_module import f\nassert f(f(1)) == 1",
            "'your_solution_module', which the sandbox does not have",
        ),
        ("from . import f\nassert f(f(1)) == 1", "relative module"),
        ("assert f([1]).val == 1", "reads 'val' of a reply of 'f'"),
        ("assert np.allclose([f(x) for x in [1]], [2])", "takes 'allclose' from 'np'"),
        ("assert [f(x) for x in [1]] and f.ok", "takes 'ok' from 'f'"),
        ("assert isclose(f(1), 2.0)", "'isclose' may be the program's or Python's"),
        ("assert f(2) == sqrt(4)", "'sqrt' may be the program's or Python's"),
        ("f = len\nassert f(f([[]])) == 1", "calls nothing of the program"),
    ],
)
def test_tests_that_would_trust_the_program_are_refused(test: str, reason: str) -> None:
    with pytest.raises(UnsupportedTest, match="drop the task, or rewrite the test") as caught:
        plan(asserts(test))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("setup", "test", "entry_point", "reason"),
    [
        ("def f(x): return x", "assert f(f(1)) == 1", "f", "it defines 'f' itself"),
        ("", "assert f(f(1)) == ref(1)", "f", "it uses 'ref', which it does not define"),
        ("def ref(", "assert f(1) == 1", "f", "does not parse"),
    ],
)
def test_with_an_entry_point_the_program_is_asked_for_nothing_else(
    setup: str, test: str, entry_point: str, reason: str
) -> None:
    with pytest.raises(UnsupportedTest, match=reason):
        plan(asserts(test, setup=setup, entry_point=entry_point))


def test_names_of_the_setup_are_the_tests_own(executor: LocalExecutor) -> None:
    task = asserts(
        "assert f(2) == double(2)", "assert f(3) == sqrt(9)", setup="def double(x): return 2 * x", entry_point="f"
    )
    assert plan(task).tier == "T1"
    assert judged(executor, task, "def f(x): return x + x if x < 3 else x").per_test == (True, True)
    assert judged(executor, task, "def f(x): return 0\nsqrt = double = f").per_test == (False, False)
    assert judged(executor, task, "def f(x): return double(x)").passed == 0, "nor can the program call them"
    unit = "import unittest\nclass TestF(unittest.TestCase):\n    def test(self): self.assertEqual(f(2), double(2))"
    task = Task(
        uid="t", prompt="", setup="def double(x): return 2 * x", hidden_tests=(unit,), entry_point="f", style="unittest"
    )
    assert judged(executor, task, "def f(x): return x + x").passed == 1
    assert judged(executor, task, "def f(x): return 0\ndouble = f").passed == 0


def test_a_check_may_call_itself_and_its_candidate_may_be_called_so(executor: LocalExecutor) -> None:
    text = "def check(candidate):\n    for i in range(3):\n        assert candidate(i) == i\n"
    for entry_point in ("f", "candidate"):
        task = Task(
            uid="t", prompt="", hidden_tests=(f"{text}check({entry_point})\n",), entry_point=entry_point, style="check"
        )
        assert (plan(task).tier, plan(task).total) == ("T1", 1)
        program = f"calls = []\ndef {entry_point}(x):\n    calls.append(x)\n    return x if len(calls) < 4 else 7"
        assert judged(executor, task, program).per_test == (True,), "its parts run once"
        assert judged(executor, task, f"def {entry_point}(x): return 1").per_test == (False,)


def test_a_function_that_is_missing_raises_what_it_would_in_the_program_s_process(executor: LocalExecutor) -> None:
    test = "try:\n  f({}, 'a')\nexcept KeyError:\n  pass\nelse:\n  assert 0"
    assert judged(executor, asserts(test), "x = 1").passed == 0
    assert judged(executor, asserts(test), "def f(d, key): return d[key]").passed == 1


def test_a_program_that_says_the_host_has_gone_loses_that_part_alone(executor: LocalExecutor) -> None:
    task = asserts("assert f(f(1)) == 1", "assert f(f(2)) == 2", "assert f(f(3)) == 3")
    judgement = judged(executor, task, "def f(x):\n    if x == 2: raise EOFError\n    return x")
    assert (judgement.summary, judgement.per_test) == ("fail", (True, False, True))
    unit = """
import unittest
class TestF(unittest.TestCase):
    def test_1(self): self.assertEqual(f(1), 1)
    def test_2(self): self.assertEqual(f(2), 2)
    def test_3(self): self.assertEqual(f(3), 3)
"""
    task = Task(uid="t", prompt="", hidden_tests=(unit,), entry_point="f", style="unittest")
    judgement = judged(executor, task, "def f(x):\n    if x == 2: raise EOFError\n    return x")
    assert judgement.per_test == (True, False, True)


def test_only_objects_of_classes_that_the_tests_name_can_be_held(executor: LocalExecutor) -> None:
    program = (
        "class Any:\n    def __getattr__(self, name): return lambda *args: True\ndef f(x): return Any()\nAny2 = Any"
    )
    for test in ("x = f(1)\nassert x.startswith('a')", "x = f(1)\nassert x.isdigit()", "assert f(1).issubset({1})"):
        assert plan(asserts(test)).tier == "T1"
        assert judged(executor, asserts(test), program).passed == 0
    held = asserts("s = make([1, 2])\nassert s.pop() == 2 and Stack().items == []")
    assert judged(executor, held, STACK + "def make(items): return Stack(items)").passed == 1
    reply = """
import os, json, struct
def f(x):
    body = json.dumps({"v": {"h": ["object", 0]}, "changed": []}).encode()
    os.write(3, struct.pack(">I", len(body)) + body)
    os._exit(0)
"""
    forged = judged(executor, asserts("x = f(1)\nassert x.startswith('a')"), reply)
    assert (forged.summary, forged.passed) == ("protocol", 0)


def test_a_program_that_does_not_load_fails_every_part(executor: LocalExecutor) -> None:
    judgement = judged(executor, asserts("assert f(f(1)) == 1", "assert f(2) == 2"), "raise ValueError('no')")
    assert (judgement.summary, judgement.per_test) == ("load_error", (False, False))
    assert "no" in judgement.detail


def test_the_program_never_sees_what_the_tests_know(executor: LocalExecutor) -> None:
    test = "wanted = 918273645546372819\nassert f(f(1)) == wanted or f(1) is False"
    snoop = """
import gc, sys
def f(x):
    if x is True: return False
    seen, frame = [], sys._getframe()
    while frame is not None:
        seen += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (list, tuple, dict)):
            try: seen.append(repr(thing)[:100_000])
            except Exception: pass
    return '918273645546' + str(372819) in ''.join(seen)
"""
    assert judged(executor, asserts(test), snoop).summary == "pass"  # it passes by finding nothing
    shown = asserts("assert f(918273645546372819) is True and f(f(1)) is not 5")
    assert judged(executor, shown, snoop).summary == "pass"  # and does find what it is given


def test_visible_tests_are_never_run_or_counted(executor: LocalExecutor) -> None:
    shown, hidden = ("assert f(1) == 1", "assert f(2) == 3"), ("assert f(3) == 3",)
    task = Task(uid="t", prompt="", visible_tests=shown, hidden_tests=hidden)
    the_shown_alone = Task(uid="t", prompt="", hidden_tests=shown)
    program = "def f(x): return x"
    judge = Judge(executor, SMALL)
    (judgement, of_shown) = judge.judge_programs([task, the_shown_alone], [program, program])
    assert (judgement.per_test, judgement.pass_rate) == ((True,), 1.0)
    assert of_shown.per_test == (True, False)
    assert len(plan(task).job(program, SMALL).calls) == 1


def test_programs_of_many_kinds_of_tasks_are_judged_in_one_batch(executor: LocalExecutor) -> None:
    tasks = [
        asserts("assert f(f(1)) == 1"),
        asserts("assert f(1) == 1"),
        check("assert candidate(1) == 1"),
        Task(uid="u", prompt="", hidden_tests=(UNIT,), entry_point="f", style="unittest"),
    ] * 5
    judgements = Judge(executor, SMALL).judge_programs(tasks, ["def f(x): return x"] * len(tasks))
    assert [judgement.passed for judgement in judgements] == [1, 1, 1, 0] * 5
    assert [judgement.tier for judgement in judgements] == ["T1", "T0", "T0", "T1"] * 5


SCRIPT = """
import unittest
from unittest.mock import patch
class TestCases(unittest.TestCase):
    @patch("os.getpid")
    def test_mock(self, getpid):
        getpid.return_value = 7
        self.assertEqual(f(), 8)
    def test_file(self):
        with open("x", "w") as file:
            file.write("1")
        self.assertTrue(f() > 1)
"""


def test_tests_that_need_the_program_s_process_are_off_unless_allowed(executor: LocalExecutor) -> None:
    task = Task(uid="bcb/1", prompt="", hidden_tests=(SCRIPT,), entry_point="f", style="script")
    with pytest.raises(UnsupportedTest, match=r"'bcb/1'.*reward\.allow_weak: true"):
        judged(executor, task, "x = 1")
    judgement = judged(executor, task, "import os\ndef f(): return os.getpid() + 1", allow_weak=True)
    assert (judgement.summary, judgement.per_test, judgement.tier) == ("pass", (True, True), "T2")
    assert judgement.is_weak
    assert judged(executor, task, "def f(): return 8", allow_weak=True).per_test == (True, True)
    assert judged(executor, task, "def f(): return 9", allow_weak=True).per_test == (False, True)


CHECKER = """
def check(stdin, expected, printed):
    n = int(stdin)
    left, right = map(int, printed.split())
    return left * right == n and left > 1
"""


def test_a_checker_of_the_dataset_decides_in_a_sandbox_of_its_own(executor: LocalExecutor) -> None:
    from coupled.reward import stdio_test

    tests = (stdio_test("6", "2 3"), stdio_test("15", "3 5"), stdio_test("4", "2 2"))
    task = Task(uid="t", prompt="", style="stdio", hidden_tests=tests, checker=CHECKER)
    program = (
        "n = int(input())\nfor d in range(n - 1, 1, -1):\n    if n % d == 0:\n        print(d, n // d)\n        break"
    )
    judgement = judged(executor, task, program)
    assert (judgement.per_test, judgement.tier) == ((True, True, True), "T1")
    assert judged(executor, task, "print('x' if input() == '15' else '2 3')").per_test == (True, False, False)
    assert judged(executor, task, "print(1, input())").passed == 0


def test_a_checker_that_would_run_what_the_program_printed_is_refused() -> None:
    from coupled.reward import stdio_test

    checker = "def check(stdin, expected, printed):\n    return eval(printed) == 1"
    task = Task(uid="t", prompt="", style="stdio", hidden_tests=(stdio_test("", ""),), checker=checker)
    with pytest.raises(UnsupportedTest, match="it uses eval"):
        plan(task)


@pytest.mark.parametrize(
    ("word", "wanted", "is_same"),
    [
        ("inf", "inf", True),
        ("Infinity", "inf", True),
        ("-inf", "inf", False),
        ("0", "inf", False),
        ("1e400", "inf", True),
        ("inf", "1", False),
        ("nan", "nan", True),
        ("nan", "1", False),
        ("1", "nan", False),
        ("1.0000001", "1", True),
    ],
)
def test_nothing_is_near_an_infinite_number_but_itself(word: str, wanted: str, is_same: bool) -> None:
    assert same_output(word, wanted, 1e-6) is is_same


def test_numbers_in_standard_output_may_differ_by_the_tolerance(executor: LocalExecutor) -> None:
    from coupled.reward import stdio_test

    task = Task(uid="t", prompt="", style="stdio", hidden_tests=(stdio_test("", "a 0.5\n1000000"),), atol=1e-6)
    assert judged(executor, task, "print('a 0.5000001\\n1000000.5')").passed == 1
    for wrong in (
        "'a 0.50001\\n1000000'",
        "'b 0.5\\n1000000'",
        "'a 0.5'",
        "'a 0.5\\nnan'",
        "'a 0.5 1000000'",
        "'a 0.5\\n1000000\\n3'",
    ):
        assert judged(executor, task, f"print({wrong})").passed == 0, wrong
