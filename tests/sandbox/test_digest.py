"""Digests of values: the same exactly for values that python calls equal."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections import Counter, OrderedDict, namedtuple
from enum import IntEnum

import pytest

from coupled.sandbox import Call, CodecError, Digest, Job, LocalExecutor, Opaque, Outcome
from coupled.sandbox.jail.codec import MAX_DOCUMENT, decode, digest, encode, encode_or_digest

Pair = namedtuple("Pair", "left right")


class Colour(IntEnum):
    RED = 1


VALUES: list[object] = [
    *(None, True, False, 0, 1, -1, 2, 0.0, -0.0, 1.0, 1.5, -1.5, 1e300, 10**300, int(1e300), 2**53, 2**53 + 1),
    *(float(2**53), math.inf, -math.inf, 1 + 0j, 1j, 1 - 1j, 0j, Colour.RED, 0.1 + 0.2, 0.3),
    *("", "1", "a", "ab", "\ud800", "é", "é", b"", b"a", b"1", "s1:a"),
    *([], (), [1], (1,), [True], [1.0], [[]], [[], []], [()], ["a", "b"], ["ab"], ["a,b"], Pair(1, 2), (1, 2), [1, 2]),
    *(set(), frozenset(), {1}, {True}, frozenset({1.0}), {1, 2}, {2, 1}, {(1, 2)}, {frozenset({1})}, {"a"}),
    *({}, {1: 2}, {True: 2.0}, {2: 1}, {1: 2, 3: 4}, {3: 4, 1: 2}, OrderedDict({3: 4, 1: 2}), Counter("aab")),
    *({"a": 2, "b": 1}, {"a": [1]}, {"a": (1,)}, {(1, 2): 3}),
    *(range(0), range(2, 1), range(3), range(0, 3, 1), range(0, 5, 5), range(0, 1, 9), range(1, 2), range(0, 4, 3)),
    *(range(-(2**62), 2**62), range(-(2**62), 2**62, 2), range(-(2**62), 2**62 - 1, 2), range(0, 2**62, 2**62)),
]


def test_digests_agree_exactly_where_python_says_equal() -> None:
    for left, right in itertools.combinations_with_replacement(VALUES, 2):
        assert (digest(left) == digest(right)) is (left == right), (left, right)


def test_digests_of_random_nested_values_agree_with_equality() -> None:
    rng = random.Random(0)

    def value(depth: int) -> object:
        kind = rng.randrange(8 if depth else 4)
        if kind < 4:
            return rng.choice([0, 1, True, 1.0, "a", "1", None, (), 0.5, b"a", -0.0])
        items = [value(depth - 1) for _ in range(rng.randrange(3))]
        if kind < 6:
            return items if kind == 4 else tuple(items)
        plain = [item if isinstance(item, int | str) else repr(item) for item in items]
        return set(plain) if kind == 6 else dict(zip(plain, items, strict=False))

    values = [value(3) for _ in range(400)]
    num_equal = 0
    for left, right in itertools.combinations(values, 2):
        assert (digest(left) == digest(right)) is (left == right), (left, right)
        num_equal += left == right
    assert num_equal > 100


def test_a_value_has_the_digest_of_what_the_border_makes_of_it() -> None:
    for value in VALUES:
        assert digest(value) == digest(decode(encode(value)))


class Liar:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("value", [math.nan, [math.nan], {1: Liar()}, Liar(), (1, complex(math.nan, 1)), {math.nan}])
def test_what_is_equal_to_nothing_has_no_digest(value: object) -> None:
    with pytest.raises(CodecError):
        digest(value)
    assert Digest(digest(1)) != value


def test_only_large_values_become_digests() -> None:
    assert encode_or_digest([1, 2]) == ("v", "[1,2]")
    assert encode_or_digest("a" * (MAX_DOCUMENT - 2))[0] == "v"
    for large in (
        "a" * MAX_DOCUMENT,
        list(range(100_000)),
        [[0] * 1000] * 1000,
        "é" * 20_000,
        {i: i for i in range(30_000)},
    ):
        kind, document = encode_or_digest(large)
        assert kind == "d"
        assert Digest(str(decode(document))) == large
        assert Digest(str(decode(document))) != [large]


def test_a_large_value_that_is_equal_to_nothing_is_not_sent() -> None:
    for value in ([math.nan] * 100_000, [[0] * 1000] * 100 + [object()], [range(2**70)] * 100_000):
        kind, document = encode_or_digest(value)
        assert (kind, len(document) < 300, type(decode(document))) == ("v", True, Opaque)


def test_floats_are_kept_where_a_tolerance_may_be_asked_of_them() -> None:
    floats = [index + 0.5 for index in range(50_000)]
    for value in (floats, tuple(floats)):
        kind, document = encode_or_digest(value, keep_floats=True)
        assert (kind, decode(document) == value) == ("v", True)
        assert encode_or_digest(value)[0] == "d"
    for large in ([0.5, *range(50_000)], [floats], list(range(100_000)), [0.5] * 400_000):
        assert encode_or_digest(large, keep_floats=True)[0] == "d"


BIG = "def f(n): return list(range(n))"


def test_a_reply_of_millions_of_values_is_compared_by_its_digest(executor: LocalExecutor) -> None:
    calls = (Call(function="f", args=(1_000_000,), may_digest=True), Call(function="f", args=(3,), may_digest=True))
    (run,) = executor.run([Job(uid="t", source=BIG, calls=calls)])
    assert run.outcome is Outcome.OK
    large, small = (result.value for result in run.results)
    assert isinstance(large, Digest)
    assert large == list(range(1_000_000))
    assert large != list(range(999_999))
    assert small == [0, 1, 2]


def test_without_leave_a_large_reply_stays_a_value(executor: LocalExecutor) -> None:
    (run,) = executor.run([Job(uid="t", source=BIG, calls=(Call(function="f", args=(100_000,)),))])
    assert run.results[0].value == list(range(100_000))


FORGED = """
import os, json, struct
def f(n):
    body = json.dumps({"n": 0, "d": %r}).encode()
    os.write(3, struct.pack(">I", len(body)) + body)
    os._exit(0)
"""


@pytest.mark.parametrize(("sha", "may_digest"), [("0" * 64, False), ("0" * 63, True), (None, True), (["0" * 64], True)])
def test_a_digest_that_was_not_asked_for_breaks_the_protocol(
    sha: object, may_digest: bool, executor: LocalExecutor
) -> None:
    call = Call(function="f", args=(1,), may_digest=may_digest)
    (run,) = executor.run([Job(uid="t", source=FORGED % (sha,), calls=(call,))])
    assert (run.outcome, run.results) == (Outcome.PROTOCOL, ())


def test_a_hostile_value_costs_its_digest_little(executor: LocalExecutor) -> None:
    value: object = []
    for _ in range(70):
        value = [value]
    start = time.process_time()
    assert Digest("0" * 64) != value
    assert Digest("0" * 64) != [index * (2**61 - 1) for index in range(100_000)]
    assert time.process_time() - start < 1.0
