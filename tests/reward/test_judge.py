from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest

from coupled.reward import Judge, Judgement, Status, Task, UnsupportedTest, stdio_test
from coupled.sandbox import Execution, Isolation, Job, Limits, LocalExecutor, Outcome

SQUARE = Task(
    uid="square",
    prompt="Write f.",
    hidden_tests=("assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1"),
    entry_point="f",
)
SMALL = Limits(cpu_seconds=1, wall_seconds=20.0, memory_mb=128)


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def judged(executor: LocalExecutor, code: str, task: Task = SQUARE) -> Judgement:
    return Judge(executor, SMALL).judge([task], [fenced(code)])[0]


@pytest.mark.parametrize(
    ("code", "per_test", "status", "outcome"),
    [
        ("def f(x): return x * x", (True, True, True), Status.OK, "ok"),
        ("def f(x): return abs(x) ** 3", (False, False, True), Status.OK, "ok"),
        ("def f(x):\n    if x == 3: raise ValueError\n    return x * x", (True, False, True), Status.OK, "ok"),
        ("def f(x):\n    while x == 3: pass\n    return x * x", (True, False, False), Status.TIMEOUT, "timeout"),
        (
            "import os\ndef f(x):\n    if x == 3: os._exit(0)\n    return x * x",
            (True, False, False),
            Status.CRASH,
            "incomplete",
        ),
        ("def g(x): return x * x", (False, False, False), Status.OK, "ok"),
        ("raise ValueError", (False, False, False), Status.CRASH, "load_error"),
        ("def f(x: return 1", (False, False, False), Status.CRASH, "syntax_error"),
    ],
)
def test_each_hidden_test_has_its_own_verdict(
    code: str, per_test: tuple[bool, ...], status: Status, outcome: str, executor: LocalExecutor
) -> None:
    judgement = judged(executor, code)
    assert (judgement.per_test, judgement.status, judgement.outcome) == (per_test, status, outcome)
    assert judgement.pass_rate == sum(per_test) / 3


def test_a_completion_without_code_fails_every_test(executor: LocalExecutor) -> None:
    (judgement,) = Judge(executor).judge([SQUARE], ["def f(x): return x * x"])
    assert (judgement.outcome, judgement.passed, judgement.total) == ("no_code", 0, 3)


def test_judgements_come_in_the_order_of_the_completions(executor: LocalExecutor) -> None:
    right, wrong = fenced("def f(x): return x * x"), fenced("def f(x): return 0")
    judgements = Judge(executor).judge([SQUARE] * 5, [right, "nothing", wrong, right, fenced("def")])
    assert [judgement.passed for judgement in judgements] == [3, 0, 0, 3, 0]
    with pytest.raises(ValueError, match="2 tasks and 1 programs"):
        Judge(executor).judge([SQUARE] * 2, [right])


def test_setup_runs_after_the_program_so_it_may_use_its_classes(executor: LocalExecutor) -> None:
    task = Task(uid="n", prompt="", setup="import math\nroot = Node(5)", hidden_tests=("assert f() == 8",))
    code = "class Node:\n    def __init__(self, v): self.v = v\ndef f(): return root.v + math.floor(3.5)"
    assert judged(executor, code, task).passed == 1


SNOOP = """
import gc, sys
def f(x):
    seen, frame = [], sys._getframe()
    while frame is not None:
        seen += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (list, tuple, dict, str, int)):
            try:
                seen.append(repr(thing)[:100_000])
            except Exception:
                pass
    return '918273645546' + str(372819) in ''.join(seen)  # put together here, or it would find itself
"""


def test_the_expected_value_never_reaches_the_program(executor: LocalExecutor) -> None:
    task = Task(uid="s", prompt="", hidden_tests=("assert f(1) == 918273645546372819 or f(0) is False",))
    assert judged(executor, SNOOP, task).per_test == (True,)
    shown = Task(uid="s", prompt="", hidden_tests=("assert f(918273645546372819) is True",))
    assert judged(executor, SNOOP, shown).per_test == (True,)  # the snoop does find what is there


@pytest.mark.parametrize(
    "code",
    [
        "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
        "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return E(7)",
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 7",
        "def f(x): raise AssertionError",
        "import builtins\nbuiltins.AssertionError = builtins.Exception = int\ndef f(x): return 7",
        "import unittest.mock as m\ndef f(x): return m.ANY",
    ],
)
def test_a_cheat_scores_nothing(code: str, executor: LocalExecutor) -> None:
    assert judged(executor, code).passed == 0


@pytest.mark.parametrize(
    ("printed", "expected", "passes"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \r\n3\n\n", "1 2\n3\n", True),
        ("1 2\n", "1 2\n3\n", False),  # the first line alone is not enough
        ("1 2\n3\n4\n", "1 2\n3\n", False),
        ("1\n2\n3", "1 2\n3", False),
        ("", "", True),
        ("1.0", "1", False),
    ],
)
def test_standard_output_is_compared_line_by_line(
    printed: str, expected: str, passes: bool, executor: LocalExecutor
) -> None:
    tests = (stdio_test("in", expected), stdio_test("no", "never"))
    task = Task(uid="s", prompt="", style="stdio", hidden_tests=tests)
    code = f"import sys\nsys.stdout.write({printed!r} if input() == 'in' else 'no')"
    assert judged(executor, code, task).per_test == (passes, False)


def test_a_stdin_program_that_ends_badly_keeps_the_inputs_it_passed(executor: LocalExecutor) -> None:
    task = Task(uid="s", prompt="", style="stdio", hidden_tests=(stdio_test("1", "1"), stdio_test("0", "0")))
    judgement = judged(executor, "x = int(input())\nprint(x)\n1 / x", task)
    assert (judgement.per_test, judgement.status) == ((True, False), Status.CRASH)


@pytest.mark.parametrize("text", ["assert f(1) == 1", '{"input": "a"}', '{"input": "a", "output": 3}', "[]"])
def test_a_stdio_test_of_another_shape_is_refused(text: str, executor: LocalExecutor) -> None:
    task = Task(uid="s", prompt="", style="stdio", hidden_tests=(text,))
    with pytest.raises(UnsupportedTest, match=r"coupled\.reward\.stdio_test"):
        judged(executor, "x = 1", task)
    assert json.loads(stdio_test("a", "b")) == {"input": "a", "output": "b"}


class Failing:
    """An executor that fails as infrastructure does."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        return [Execution(uid=job.uid, outcome=self.outcome, tier="fake") for job in jobs]

    def isolation(self) -> Isolation:
        raise NotImplementedError

    def close(self) -> None: ...


@pytest.mark.parametrize("outcome", [Outcome.SANDBOX_ERROR, Outcome.OVERLOADED])
def test_infrastructure_gives_no_pass_rate_at_all(outcome: Outcome) -> None:
    (judgement,) = Judge(Failing(outcome)).judge([SQUARE], [fenced("def f(x): return x * x")])
    assert (judgement.status, judgement.per_test) == (Status.INFRA, ())
    with pytest.raises(ValueError, match="leave the sample out"):
        _ = judgement.pass_rate


def test_every_other_outcome_is_the_program_s_own() -> None:
    for outcome in set(Outcome) - {Outcome.SANDBOX_ERROR, Outcome.OVERLOADED}:
        (judgement,) = Judge(Failing(outcome)).judge([SQUARE], [fenced("x = 1")])
        assert judgement.status is not Status.INFRA
        assert judgement.pass_rate == 0.0


def test_128_small_programs_are_judged_within_a_second_of_processor_time(executor: LocalExecutor) -> None:
    completions = [fenced(f"import math\ndef f(x): return x * x + {index % 2}") for index in range(128)]
    Judge(executor).judge([SQUARE], completions[:1])
    start, cpu = time.monotonic(), time.process_time()
    judgements = Judge(executor).judge([SQUARE] * 128, completions)
    print(
        f"128 programs in {time.monotonic() - start:.2f} s, {time.process_time() - cpu:.2f} s of it processor time here"
    )
    assert [judgement.passed for judgement in judgements] == [3, 0] * 64
    assert time.process_time() - cpu < 1.0
    assert sum(judgement.cpu_seconds for judgement in judgements) < 1.5
