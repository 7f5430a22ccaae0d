from __future__ import annotations

import math
import time
from typing import Any

import pytest

from coupled.reward import ParsedTest, Task, UnsupportedTest, parse_test, parse_tests
from coupled.sandbox import Call, CallResult, Opaque, Raised


def replies(*values: object) -> list[CallResult]:
    return [CallResult(value=value) for value in values]


def holds(text: str, *values: object) -> bool:
    return parse_test(text, "f").holds(replies(*values))


def test_a_test_becomes_calls_without_the_expected_value() -> None:
    test = parse_test("assert set(f([1, -2], key='a', d={1: (2,)})) == {1, 2}, 'message'", "f")
    assert test.calls == (Call(function="f", args=([1, -2],), kwargs={"key": "a", "d": {1: (2,)}}, items="walked"),)
    assert test.holds(replies([2, 1, 1]))
    assert not test.holds(replies([2, 1, 3]))


# (test, values that pass, values that fail)
TABLE: list[tuple[str, list[Any], list[Any]]] = [
    ("assert f(1) == 2", [2, 2.0], [3, "2", None, [2], Opaque("E", True)]),
    ("assert 2 == f(1)", [2], [3]),
    ("assert f(1) == True", [True, 1, 1.0], [False, "True"]),
    ("assert f(1) == [1, (2, 3)]", [[1, (2, 3)]], [(1, (2, 3)), [1, [2, 3]], [1, (2, 3), 4], [Opaque("E"), (2, 3)]]),
    ("assert f(1) == {'a': {1, 2}}", [{"a": {2, 1}}, {"a": frozenset({1, 2})}], [{"a": [1, 2]}, {"b": {1, 2}}]),
    ("assert f(1) == float('inf')", [math.inf], [1e308]),
    ("assert f(1) == (5.0, -2+2.5j)", [(5.0, complex(-2, 2.5))], [(5.0, complex(2, 2.5))]),
    ("assert f(1) != 3", [4], [3]),
    ("assert f(1) < 3 <= 3", [2], [3, "2", None]),
    ("assert 1 < f(1) < 3", [2], [1, 3]),
    ("assert f(1) >= 0.5", [0.5], [0.4, math.nan]),
    ("assert f(1) in [1, 'a']", [1, "a", True], [2, Opaque("E")]),
    ("assert 3 in f(1)", [[3], {3: 1}, range(5)], [[4], 3, None]),
    ("assert 3 not in f(1)", [[4]], [[3], 3]),
    ("assert f(1) is None", [None], [0, False, Opaque("E")]),
    ("assert f(1) is not None", [0, Opaque("E")], [None]),
    ("assert f(1) is True", [True], [1, "True"]),
    ("assert f(1)", [1, "x", [0], Opaque("Match", True)], [0, "", [], None, Opaque("Empty", False), Opaque("E", None)]),
    ("assert not f(1)", [0, None, Opaque("E", False)], [1, Opaque("E", True), Opaque("E", None)]),
    ("assert f(1) == 2 or f(2) == 3", [], []),
    ("assert len(f(1)) == 2", [[1, 2], "ab", {1: 1, 2: 2}], [[1], 2, None]),
    ("assert sorted(f(1)) == [1, 2]", [[2, 1], {1, 2}], [[1], [1, "2"]]),
    ("assert sorted(f(1), reverse=True) == [2, 1]", [[2, 1]], [[3]]),
    ("assert tuple(f(1)) == (1, 2)", [[1, 2]], [[2, 1]]),
    ("assert list(f(1)) == [0, 1]", [range(2), (0, 1)], [range(3), 5]),
    ("assert abs(f(1) - 3) < 1e-6", [3, 3.0000001], [3.1, "3", Opaque("E")]),
    ("assert round(f(1), 2) == 3.14", [3.14159], [3.15, "3.14"]),
    ("assert sum(f(1)) == 6", [[1, 2, 3]], [[1, 2], ["a"]]),
    ("assert min(f(1)) == 1 and max(f(1)) == 3", [], []),
    ("assert all(f(1)) and any([f(2)])", [], []),
    ("assert math.isclose(f(1), 4188.79, rel_tol=0.001)", [4188.8, 4190], [4200, "4188.79", Opaque("E")]),
    ("import math\nassert f(1) == math.pi", [math.pi], [3.14]),
    ("assert int(f(1)) == 35", [35, 35.9, "35"], ["x", None]),
    ("assert f(1)[0] == 'a'", [["a"], "abc", {0: "a"}], [[], None, {1: "a"}]),
    ("assert f(1)[-2:] == [2, 3]", [[1, 2, 3]], [[2]]),
    ("assert -f(1) == 2 ** 3 + 4 * 2 - 10 // 3 % 2", [-15], [15]),
    ("assert f(1) | {3} == {1, 3} and f(2) - {1} == set()", [], []),
    ("assert f(1) == 'a' * 3 + 'b'", ["aaab"], ["aaa"]),
    ("assert f(1) == [0] * 3", [[0, 0, 0]], [[0]]),
    ("assert f(1) == set()", [set(), frozenset()], [[], {}]),
]


@pytest.mark.parametrize(("text", "good", "bad"), TABLE, ids=[text for text, _, _ in TABLE])
def test_a_check_passes_exactly_for_these_values(text: str, good: list[Any], bad: list[Any]) -> None:
    test = parse_test(text, "f")
    assert [value for value in good if not test.holds(replies(value))] == []
    assert [value for value in bad if test.holds(replies(value))] == []


def test_several_calls_have_replies_of_their_own() -> None:
    assert holds("assert f(1) == 2 or f(2) == 3", 0, 3)
    assert not holds("assert f(1) == 2 or f(2) == 4", 0, 3)
    assert holds("assert f(1) == f(2)", [1], [1])
    assert not holds("assert f(1) == f(2)", Opaque("E"), Opaque("E"))
    assert not holds("assert f(1) == f(2)", [Opaque("E")], [Opaque("E")])
    assert holds("assert min(f(1)) == 1 and max(f(1)) == 3", [1], [3])
    assert holds("assert all(f(1)) and any([f(2)])", [1], 1)
    assert holds("assert f(1) | {3} == {1, 3} and f(2) - {1} == set()", {1}, {1})
    assert parse_test("assert f(1) == 1\nassert f(2) == 2", "f").holds(replies(1, 2))
    assert not parse_test("assert f(1) == 1\nassert f(2) == 2", "f").holds(replies(1, 1))


def test_a_reply_that_is_missing_or_an_exception_fails_only_the_check_that_needs_it() -> None:
    either = parse_test("assert f(1) == 2 or f(2) == 3", "f")
    raised = CallResult(raised=Raised(type="ValueError", text=""))
    assert either.holds([CallResult(value=2), raised])
    assert not either.holds([raised, CallResult(value=3)])
    assert not parse_test("assert f(1) is None", "f").holds([raised])
    assert not parse_test("assert not f(1)", "f").holds([])


@pytest.mark.parametrize(
    ("text", "entry_point", "function"),
    [
        ("assert f(1) == 1", None, "f"),
        ("assert sum(10, 15) == 6", "sum", "sum"),
        ("assert Solution().twoSum(nums=[1], target=2) == [0]", "Solution().twoSum", "Solution().twoSum"),
        ("assert Solution().twoSum(nums=[1], target=2) == [0]", "twoSum", "Solution().twoSum"),
        ("assert Stack().size() == 0", None, "Stack().size"),
        ("assert Diff([1], [2]) == [1]", None, "Diff"),
        ("assert Counter([1, 1]) == 1", None, "Counter"),  # nothing else is called: it is the program's
    ],
)
def test_these_calls_go_to_the_program(text: str, entry_point: str | None, function: str) -> None:
    assert [call.function for call in parse_test(text, entry_point).calls] == [function]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("assert f(1) ==", "does not parse"),
        ("f(1) == 1", "Expr statement"),
        ("import os\nassert f(1) == 1", "Import statement"),
        ("def check(c): assert c(1) == 1", "FunctionDef statement"),
        ("assert True", "calls nothing of the program"),
        ("assert sorted([2, 1]) == [1, 2]", "calls nothing of the program"),
        ("assert f(root) == 1", "the argument 'root' is no literal"),
        ("assert f(g(1)) == 1", "the argument 'g(1)' is no literal"),
        ("assert f(*[1]) == 1", "* or ** in the arguments"),
        ("assert f(1) == x", "Name in 'x'"),
        ("assert f(1).upper() == 'A'", "call of"),
        ("assert f(1) == sys.getsizeof(2)", "sys.getsizeof"),
        ("assert f(1) is 5", "`is` with anything but"),
        ("assert [x for x in f(1)] == [1]", "ListComp"),
        ("assert (lambda: f(1))() == 1", "call of 'lambda: '"),
        ("assert f(1) == f'{1}'", "JoinedStr"),
        ("assert sorted(f(1), key=len) == []", "arguments of"),
        ("assert f(1) == __import__('os').system('id')", "call of"),
        ("assert set().union(f(1)) == {1}", "call of"),
        ("assert f(1) << 70 == 0", "BinOp"),
        ("assert '%.2f' % f(1) == '0.33'", "Mod of anything but numbers"),
        ("assert f(1) | {1: 2} == {1: 2}", "BitOr of anything but numbers"),
        ("assert f(1) == 3 ** 100_000 % 7", "a power this large"),
        # Names that the program could give another meaning, or that only some right programs have.
        ("assert f(3) == list(range(3))", "call of 'range'"),
        ("assert f(2) == pow(2, 3)", "call of 'pow'"),
        ("assert f(1) == complex(1, 2)", "call of 'complex'"),
        ("assert f(1) == dict(a=1)", "call of 'dict'"),
        ("assert f(1) == Counter({'a': 1})", "call of 'Counter'"),
        ("assert f(2) == ref(2)", "call of 'ref'"),
        ("assert f().startswith('a')", "call of"),
        ("assert f().isdigit()", "call of"),
    ],
)
def test_a_test_that_cannot_be_split_is_refused_by_name_and_reason(text: str, reason: str) -> None:
    with pytest.raises(UnsupportedTest) as caught:
        parse_test(text, "f")
    message = str(caught.value)
    assert reason in message
    assert repr(text) in message
    assert "drop the task, or rewrite the test" in message


def test_the_hidden_tests_of_a_task_are_parsed_and_the_visible_ones_are_not() -> None:
    task = Task(uid="t", prompt="", visible_tests=("not python",), hidden_tests=("assert f(1) == 1",), entry_point="f")
    (test,) = parse_tests(task)
    assert isinstance(test, ParsedTest)
    assert test.text == "assert f(1) == 1"


BIG = 1 << 3_000_000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("assert f(1) ** 9 == 1", BIG),
        ("assert 9 ** f(1) == 1", 10**9),
        ("assert f(1) * f(2) == 1", BIG),
        ("assert 'a' * f(1) == 'a'", 10**12),
        ("assert [0] * f(1) == [0]", 10**12),
        ("assert f(1) * 1000 == f(2) * 1000", [[[0] * 50_000]]),
        ("assert round(5, f(1)) == 5", -(10**9)),
        ("assert round(f(1), 2) == 5", BIG),
        ("assert list(f(1)) == []", range(10**15)),
        ("assert sum(f(1)) == 0", range(10**15)),
        ("assert sorted(f(1)) == []", range(0, -(10**15), -1)),
        ("assert all(f(1))", range(1, 10**15)),
        ("assert 1.5 in f(1)", range(10**15)),
        ("assert max(f(1)) == 0", range(10**15)),
        ("assert sum(f(1)) == 0", [BIG] + [1] * 200_000),
        ("assert set(f(1)) == {1}", [index * (2**61 - 1) for index in range(100_000)]),
        ("assert frozenset(f(1)) == {1}", [(index * (2**61 - 1),) for index in range(100_000)]),
        ("assert str(f(1)) == '1'", BIG),
        ("assert f(1) % 7 == 'x'", "%999999999d"),
        ("assert abs(f(1)) + 1 == 1", BIG),
        ("assert set(f(1)) == {1}", range(10**13)),
        ("assert list(f(1)) == [1]", range(-(2**62), 2**62)),
        ("assert set(f(1)) == {1}", "ab" * 5_000_000),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_no_returned_value_makes_the_check_expensive(text: str, value: object) -> None:
    test = parse_test(text, "f")
    start = time.process_time()
    assert not test.holds(replies(value, value))
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("text", "setup"),
    [
        ("assert f(2) == ref(2)", "def ref(x): return 7 * x"),
        ("assert f(2) == g(2)", "from math import gcd as g"),
        ("assert f(2) == sqrt(2)", "from math import *"),
        ("assert f(2) == range(2)", ""),
        ("assert f('ab') == Counter('ab')", ""),
        ("assert f(1) == Helper().value()", "class Helper: pass"),
    ],
)
@pytest.mark.parametrize("entry_point", [None, "f"])
def test_what_the_setup_or_python_gives_is_not_the_program_s(text: str, setup: str, entry_point: str | None) -> None:
    with pytest.raises(UnsupportedTest, match="call of"):
        parse_test(text, entry_point, setup)


def test_the_program_is_asked_for_nothing_but_the_entry_point() -> None:
    text = "assert f(1) == g(1)"
    assert [call.function for call in parse_test(text, None).calls] == ["f", "g"]
    with pytest.raises(UnsupportedTest, match="call of 'g'"):
        parse_test(text, "f")


def test_a_setup_that_does_not_parse_or_hides_its_names_is_refused() -> None:
    for setup, reason in (("def ref(", "does not parse"), ("from numpy import *", "imports \\* from 'numpy'")):
        with pytest.raises(UnsupportedTest, match=reason):
            parse_test("assert f(1) == 1", "f", setup)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("assert list(f(1)) == [1]", "walked"),
        ("assert 3 == max(f(1))", "walked"),
        ("assert 3 in f(1)", "walked"),
        ("assert len(f(1)) == 2", "counted"),
        ("assert f(1) == [1]", ""),
        ("assert f(1) in [1]", ""),
        ("assert max(f(1), 3) == 3", ""),
        ("assert abs(f(1)) == 3", ""),
        ("assert f(1)", ""),
    ],
)
def test_a_reply_of_which_only_the_items_are_asked_may_come_as_its_items(text: str, items: str) -> None:
    (call,) = parse_test(text, "f").calls
    assert call.items == items
