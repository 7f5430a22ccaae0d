"""EvalPlus inputs: expected values from the reference, and its comparisons without its leak."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from coupled.reward import Judge, Status, Task, UnsupportedTest, arguments_test, evalplus_task
from coupled.reward.styles.evalplus import matches, parse_arguments
from coupled.sandbox import Digest, Execution, Job, Limits, LocalExecutor, Opaque, Outcome
from coupled.sandbox.jail.codec import digest


def task(oracle: str = "equal", atol: float = 0.0, **fields: Any) -> Task:
    given = {"reference": "def f(x): return x", "entry_point": "f", "hidden_tests": (arguments_test([1]),)} | fields
    return Task(uid="t", prompt="", style="evalplus", oracle=oracle, atol=atol, **given)


LIAR = Opaque("Liar", True)

# (oracle, atol, arguments, expected, values that pass, values that fail)
TABLE: list[tuple[str, float, list[Any], Any, list[Any], list[Any]]] = [
    ("equal", 0, [], 1, [1, 1.0, True], [1.0000001, 2, "1", None, [1], LIAR]),
    ("equal", 0, [], 1.0, [1.0, 1, 1.0 + 1e-6, 1 - 1e-7], [1 + 1e-5, "1", LIAR, None, math.nan, [1.0]]),
    (
        "equal",
        0,
        [],
        [1.0, 2.0],
        [[1.0, 2.0], [1, 2], [1.0, 2.0000005]],
        [(1.0, 2.0000005), [1.0], [1.0, "2"], LIAR, [1.0, LIAR]],
    ),
    ("equal", 0, [], [1, 2], [[1, 2.0]], [[1, 2.0000001], (1, 2), [2, 1]]),
    ("equal", 0, [], [], [[]], [(), None, {}]),
    ("equal", 0, [], math.inf, [math.inf], [-math.inf, 1e308, math.nan]),
    ("equal", 0, [], math.nan, [], [math.nan, 0.0]),
    ("equal", 1e-4, [], 2, [2, 2.0, True + True], [2.00005, 3, LIAR]),  # with a tolerance the types must agree
    ("equal", 1e-4, [], 2.0, [2.00005, 2], [2.001]),
    ("equal", 1e-4, [], [(1.0, 2.0)], [[(1.0, 2.00005)]], [[(1.0, 2.1)], [(1.0,)]]),
    ("equal", 1e-4, [], 1j, [1j, 1.00005j], [1.1j, "1j"]),
    ("equal", 1e-4, [], "a", ["a"], ["b", 1]),
    ("equal", 1e-4, [], 10**400, [10**400], [1.0, 10**400 + 1]),
    ("equal", 1e-6, [], 1e10, [1e10 + 500], [1e10 + 5000]),  # rtol 1e-7
    (
        "set",
        0,
        [],
        (1, 2),
        [[2, 1], {1, 2}, (1, 1, 2), range(1, 3)],
        [[1], 3, None, LIAR, [[1], [2]], range(10**13), range(-(2**62), 2**62), "12" * 5_000_000, b"12"],
    ),
    ("not_none", 0, [], Opaque("Match", True), [Opaque("Match", True), 1, "x", True], [None, False]),
    ("not_none", 0, [], None, [None, False], [Opaque("Match", True), True, 0]),
    ("anything", 0, [], True, [False, None, LIAR], []),
    ("or_zero", 0, [], 12, [12, 0], [1, None, "0", LIAR]),
    ("pyramid", 0, [3, 4], 33, [33, 35], [34, "33", LIAR]),
    ("digits", 0, [23, 56], 6, [6], [7, LIAR]),
    ("digits", 0, [123, 4], 5, [5, 1 + 2 + 1], [3]),
    ("root", 1e-4, [[-6, 3]], 2.0, [2.0, 2, 2.00001], [2.1, "2", LIAR, None, 10**400, math.nan, [2.0]]),
    ("root", 1e-4, [[-6, 11, -6, 1]], 1.0, [1.0, 2.0, 3.0], [4.0]),
]


@pytest.mark.parametrize(("oracle", "atol", "args", "expected", "good", "bad"), TABLE, ids=range(len(TABLE)))
def test_a_reply_is_right_exactly_for_these_values(
    oracle: str, atol: float, args: list[Any], expected: Any, good: list[Any], bad: list[Any]
) -> None:
    of = task(oracle, atol)
    assert [value for value in good if not matches(of, args, value, expected)] == []
    assert [value for value in bad if matches(of, args, value, expected)] == []


def test_a_digest_is_as_good_as_its_value_and_no_better() -> None:
    value = list(range(50_000))
    for expected in (value, Digest(digest(value))):
        assert matches(task(), [], value, expected)
        assert matches(task(), [], Digest(digest(value)), expected)
        assert not matches(task(), [], Digest(digest(value[1:])), expected)
        assert not matches(task(), [], LIAR, expected)
    assert not matches(task("set"), [], Digest(digest([1])), [1])


def test_the_tolerance_of_one_input_does_not_reach_the_next(executor: LocalExecutor) -> None:
    """EvalPlus sets 1e-6 at the first reply that is a float and keeps it: 10**9 + 1 then passes for 10**9."""
    reference = "def f(x): return 0.5 if x == 0 else [10**9]"
    of = task(reference=reference, hidden_tests=tuple(arguments_test([x]) for x in (0, 1, 0)))
    program = "def f(x): return 0.5000001 if x == 0 else [10**9 + 1]"
    (judgement,) = Judge(executor).judge_programs([of], [program])
    assert judgement.per_test == (True, False, True)


def test_arguments_come_back_as_they_went_in() -> None:
    args = [(1, 2), {1: (2,)}, {3}, 1j, math.inf, "x", None]
    assert parse_arguments(arguments_test(args)) == tuple(args)
    assert parse_arguments("[1, [2]]") == (1, [2])
    for text in ("f(1)", "3", '{"d": []}', '{"?": 1}'):
        with pytest.raises(UnsupportedTest, match=r"coupled\.reward\.arguments_test"):
            parse_arguments(text)


@pytest.mark.parametrize(
    ("uid", "given", "args"),
    [
        ("Mbpp/2", [[1, 2], [3]], ((1, 2), (3,))),
        ("Mbpp/63", [[[1, 2], [3, 4]]], ([(1, 2), (3, 4)],)),
        ("Mbpp/75", [[[1, 2]], 3], ([(1, 2)], 3)),
        ("Mbpp/106", [[1], [2]], ([1], (2,))),
        ("Mbpp/115", [[[1], [], {}]], ([{1}, {}, {}],)),
        ("Mbpp/124", ["0", "1j"], (0.0, 1j)),
        ("Mbpp/252", ["1+2j"], (1 + 2j,)),
        ("Mbpp/259", [[[1, 2]], [[3]]], (((1, 2),), ((3,),))),
        ("Mbpp/278", [[1, [2, 3], "a"]], ((1, (2, 3), "a"),)),
        ("Mbpp/307", [[1], 2, 3], ((1,), 2, 3)),
        ("Mbpp/580", [[1, [2, [3]]]], ((1, (2, (3,))),)),
        ("Mbpp/722", [{"a": [1, 2]}, 1.0, 2], ({"a": (1, 2)}, 1.0, 2)),
        ("Mbpp/3", [[1]], ([1],)),
        ("HumanEval/2", [[1]], ([1],)),
    ],
)
def test_arguments_that_json_cannot_say_are_restored(uid: str, given: list[Any], args: tuple[Any, ...]) -> None:
    row = {
        "task_id": uid,
        "prompt": "",
        "entry_point": "f",
        "canonical_solution": "x",
        "base_input": [given],
        "plus_input": {} if uid == "Mbpp/3" else [],
        "atol": 0,
    }
    (text,) = evalplus_task(row).hidden_tests
    restored = parse_arguments(text)
    assert repr(restored) == repr(args)


class Counting:
    """Passes jobs on and remembers them; the first `num_outages` runs fail as infrastructure does."""

    def __init__(self, inner: LocalExecutor, num_outages: int = 0) -> None:
        self.inner, self.num_outages, self.uids = inner, num_outages, list[str]()

    def run(self, jobs: Sequence[Job]) -> list[Execution]:
        self.uids += [job.uid for job in jobs]
        self.num_outages -= 1
        if self.num_outages >= 0:
            return [Execution(uid=job.uid, outcome=Outcome.OVERLOADED, tier="fake") for job in jobs]
        return self.inner.run(jobs)

    def isolation(self) -> Any:
        raise NotImplementedError

    def close(self) -> None: ...


def test_a_reference_runs_once_and_alone(executor: LocalExecutor) -> None:
    counting = Counting(executor)
    judge = Judge(counting)
    for _ in range(2):
        judgements = judge.judge_programs([task()] * 3, ["def f(x): return x", None, "def f(x): return -x"])
        assert [judgement.summary for judgement in judgements] == ["pass", "no_code", "fail"]
    assert counting.uids == ["t reference", "t", "t", "t", "t"]


def test_a_reference_that_the_sandbox_failed_on_is_tried_again(executor: LocalExecutor) -> None:
    judge = Judge(Counting(executor, num_outages=1))
    (first,) = judge.judge_programs([task()], ["def f(x): return x"])
    assert (first.status, first.per_test) == (Status.INFRA, ())
    (second,) = judge.judge_programs([task()], ["def f(x): return x"])
    assert second.summary == "pass"


@pytest.mark.parametrize("reference", ["def f(x): raise ValueError", "x = 1", "def f(", "import os\nos._exit(0)"])
def test_a_reference_that_gives_no_value_is_refused_by_name(reference: str, executor: LocalExecutor) -> None:
    with pytest.raises(
        UnsupportedTest, match="the reference of a task replies to every input; task 't' has one that fails on input 0"
    ):
        Judge(executor).judge_programs([task(reference=reference)], ["def f(x): return x"])


def test_a_slow_reference_gives_its_programs_time(executor: LocalExecutor) -> None:
    slow = "def f(x):\n    return sum(i % 7 for i in range(15_000_000))"
    of = task(reference=slow, hidden_tests=tuple(arguments_test([x]) for x in range(4)))
    limits = Limits(cpu_seconds=1, wall_seconds=60.0)
    (judgement,) = Judge(executor, limits).judge_programs([of], [slow])
    assert judgement.summary == "pass"
    assert judgement.usage.cpu_seconds > 1


def test_large_replies_are_judged_by_digest(executor: LocalExecutor) -> None:
    of = task(reference="def f(n): return 'ab' * n", hidden_tests=(arguments_test([10_000_000]), arguments_test([2])))
    judge = Judge(executor)
    programs = ["def f(n): return ''.join(['ab'] * n)", "def f(n): return 'ab' * (n - 1) + 'a'"]
    assert [j.per_test for j in judge.judge_programs([of] * 2, programs)] == [(True, True), (False, False)]


FLOATS = "def f(n): return [index / 3 for index in range(n)]"


def test_many_floats_keep_their_tolerance(executor: LocalExecutor) -> None:
    """A digest knows no tolerance, so the expected floats must not come as one."""
    of = task(reference=FLOATS, hidden_tests=(arguments_test([20_000]), arguments_test([2])))
    programs = [
        "def f(n): return [index / 3 + 1e-9 for index in range(n)]",
        "def f(n): return [index / 3 + 1e-3 * (index == n - 1) for index in range(n)]",
    ]
    judgements = Judge(executor).judge_programs([of] * 2, programs)
    assert [j.per_test for j in judgements] == [(True, True), (False, False)]


def test_numbers_of_numpy_are_right_where_equal_ones_of_python_are(numpy_executor: LocalExecutor) -> None:
    of = task(reference="def f(x): return [x, x > 1, x * 0.5]", hidden_tests=(arguments_test([1]), arguments_test([2])))
    right = "import numpy as np\ndef f(x): return [np.int64(x), np.bool_(x > 1), np.float32(x * 0.5)]"
    wrong = "import numpy as np\ndef f(x): return [np.int64(x), np.bool_(x > 1), np.float32(x * 0.25)]"
    judgements = Judge(numpy_executor).judge_programs([of] * 2, [right, wrong])
    assert [j.per_test for j in judgements] == [(True, True), (False, False)]
