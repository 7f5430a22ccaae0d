from __future__ import annotations

import collections
import enum
import itertools
import json
import math
import random
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from coupled.sandbox.jail.codec import (
    MAX_DEPTH,
    MAX_NODES,
    CodecError,
    Opaque,
    build_set,
    decode,
    decode_tree,
    digest,
    encode,
    encode_tree,
    listed,
    num_parts,
    parse,
    range_length,
)

VALUES: list[object] = [
    None, True, False, 0, -1, 2**53, 2**53 + 1, -(2**400), 0.0, -0.0, 0.1, 1e300, math.inf, -math.inf,
    "", "é\n\0", "\ud800", b"", b"\0\xff", 1j, complex(-0.0, math.inf), range(0), range(5, -3, -2), range(2**62),
    [], [1, [2, [3]]], (), (1, (2,)), ((),), set(), {1, 2.5, "a"}, frozenset(), {frozenset({1})}, {},
    {1: [2], (1, 2): {"a": None}, "k": (1,)}, [{}, set(), frozenset(), (), []], {"t": [1]}, [{"i": "ff"}],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_builtin_comes_back_equal_and_of_the_same_type(value: object) -> None:
    assert _typed(decode(encode(value))) == _typed(value)


def _typed(value: Any) -> Any:
    """The value with its types at every level, and with -0.0 apart from 0.0."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, [(_typed(key), _typed(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return kind, [_typed(item) for item in value]
    if isinstance(value, set | frozenset):
        return kind, sorted(repr(_typed(item)) for item in value)
    return kind, repr(value) if not isinstance(value, int) else value


@pytest.mark.parametrize("value", [*VALUES, VALUES, math.nan, object(), [0] * MAX_NODES], ids=lambda value: type(value))
def test_a_tree_is_what_the_document_says(value: object) -> None:
    assert repr(encode_tree(value)) == repr(parse(encode(value)))


def test_documents_are_written_as_published() -> None:
    assert encode([1, 2**64, 1.5, math.nan, "x", b"\x01", (True,), {3}, frozenset(), {1: None}, 2j, range(3)]) == (
        '[1,{"i":"0x10000000000000000"},1.5,{"f":"nan"},"x",{"b":"01"},{"t":[true]},{"s":[3]},{"S":[]},'
        '{"d":[[1,null]]},{"c":[0.0,2.0]},{"r":[0,3,1]}]'
    )


def test_nan_comes_back_as_nan() -> None:
    value = decode(encode([math.nan]))
    assert isinstance(value, list)
    assert math.isnan(value[0])


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 7

    def __int__(self) -> int:
        return 7

    __index__ = __int__

    def __repr__(self) -> str:
        return "7"


class LiarList(list):
    def __iter__(self) -> Any:
        return iter([7])

    def __len__(self) -> int:
        return 7


class LiarStr(str):
    def __str__(self) -> str:
        return "seven"


class LiarDict(dict):
    def items(self) -> Any:
        return [(7, 7)]


Point = collections.namedtuple("Point", "x y")


class Color(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Liar(3), 3),
        (LiarList([1, 2]), [1, 2]),
        (LiarStr("one"), "one"),
        (LiarDict(a=1), {"a": 1}),
        (Point(1, 2), (1, 2)),
        (Color.RED, 3),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.defaultdict(int, {1: 2}), {1: 2}),
        (collections.OrderedDict([(1, 2)]), {1: 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_subclass_is_flattened_by_its_base_not_by_what_it_says(value: object, plain: object) -> None:
    assert _typed(decode(encode(value))) == _typed(plain)


def test_any_other_type_becomes_opaque_in_its_place() -> None:
    value = decode(encode([1, object(), {"k": print}, memoryview(b"x"), iter([])]))
    assert isinstance(value, list)
    assert [type(item) for item in value] == [int, Opaque, dict, Opaque, Opaque]
    assert value[1] != value[1]
    assert not any(value[1] == other for other in (value[1], value[3], 1, None))
    assert value[1] not in ([1], (2,), "x", None)
    assert [value[3]] != [bytearray(b"x")]


def test_an_opaque_value_keeps_its_truth_where_it_has_one() -> None:
    class Empty:
        def __len__(self) -> int:
            return 0

    class Neither:
        def __bool__(self) -> bool:
            raise ValueError("no")

    assert bool(decode(encode(object())))
    assert not bool(decode(encode(Empty())))
    with pytest.raises(TypeError, match="'Neither' has no truth"):
        bool(decode(encode(Neither())))


def test_a_value_too_deep_too_wide_or_recursive_becomes_opaque_as_a_whole() -> None:
    loop: list[object] = []
    loop.append(loop)
    deep: object = 0
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    wide: object = [0] * 10
    for _ in range(9):
        wide = [wide] * 10
    for value in (loop, deep, wide, [0] * (MAX_NODES + 1)):
        assert type(decode(encode(value))) is Opaque


@pytest.mark.parametrize("make", [lambda x: [x], lambda x: (x,), lambda x: {"k": x}, lambda x: frozenset({x})])
def test_the_deepest_value_that_is_encoded_can_be_decoded(make: Any) -> None:
    value: object = 0
    for _ in range(MAX_DEPTH):
        value = make(value)
    assert decode(encode(value)) == value


@pytest.mark.parametrize(
    "document",
    [
        "", "nope", "[1,]", "NaN", "[Infinity]", '{"i": "0xzz"}', '{"i": 5}', '{"i": "1", "f": "nan"}', "{}",
        '{"f": "1.5"}', '{"x": []}', '{"t": 5}', '{"t": {"t": []}}', '{"s": [[]]}', '{"S": [{"d": []}]}',
        '{"b": "0"}', '{"c": [1.0]}',
        '{"d": [[1]]}', '{"d": [[1, 2, 3]]}', '{"d": [{"t": [1, 2]}]}', '{"d": [[[], 1]]}', '{"d": {}}',
        '{"c": [1, 2]}',
        '{"r": [0, {"i": "0x8000000000000000"}, 1]}', '{"r": [0, 1, {"i": "-0xffffffffffffffff"}]}',
        '{"r":[0,0,' * 5000 + "1" + "]}" * 5000, "[1," * 80_000 + "[[[]]]," * 200_000, "[" + "1," * 4_000_000 + "1]",
        '{"r": [0, 1, 0]}', '{"r": [0, 1.5, 1]}', '{"r": [0, 1]}', '{"o": "x"}', '{"o": ["x", 2]}',
        '{"o": [5, null]}', "[" * 100_000, "[" * 70 + "]" * 70, '{"t":[' * 70 + "]}" * 70, "1" * 5000,
        "[" + "1," * MAX_NODES + "1]",
        b"\xff\xfe", '{"__reduce__": ["os.system"]}',
    ],
    ids=lambda document: str(document)[:20],
)  # fmt: skip
def test_a_document_this_codec_did_not_write_is_refused(document: str | bytes) -> None:
    with pytest.raises(CodecError):
        decode(document)


def test_thousands_of_damaged_documents_give_a_builtin_or_a_codec_error_and_nothing_else() -> None:
    rng = random.Random(5)
    seeds = [encode(value) for value in VALUES] + ['{"o":["x",null]}', encode(VALUES)]
    tokens = [
        "[",
        "]",
        "{",
        "}",
        '"',
        ",",
        ":",
        "null",
        '{"t":',
        '{"d":[[',
        '{"s":[',
        "-",
        "1e999",
        "\\ud800",
        '"i"',
        "0x",
        "NaN",
    ]
    refused = 0
    for _ in range(6000):
        text = rng.choice(seeds)
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(text) + 1)
            text = text[:start] + rng.choice(tokens) + text[start + rng.randint(0, 4) :]
        try:
            kinds = _kinds(decode(text))
        except CodecError:
            refused += 1
            continue
        assert kinds <= _BUILTINS, text
    assert 2000 < refused < 6000  # both ways were taken


_BUILTINS = {type(None), bool, int, float, complex, str, bytes, range, list, tuple, set, frozenset, dict, Opaque}


def _kinds(value: Any) -> set[type]:
    kinds = {type(value)}
    parts = [*value.keys(), *value.values()] if type(value) is dict else value
    if type(value) in (dict, list, tuple, set, frozenset):
        kinds = kinds.union(*map(_kinds, parts))
    return kinds


def test_members_that_share_a_hash_are_refused_before_they_cost_quadratic_time() -> None:
    modulus = 2**61 - 1
    colliding = [index * modulus for index in range(100_000)]
    start = time.process_time()
    for tag, body in (("s", colliding), ("d", [[item, 0] for item in colliding])):
        with pytest.raises(CodecError, match="share a hash"):
            decode(json.dumps({tag: body}))
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize("shift", [20, 30, 40, 50])
def test_members_whose_hashes_agree_in_the_low_bits_do_not_cost_quadratic_time(shift: int) -> None:
    start = time.process_time()
    assert len(build_set([index << shift for index in range(100_000)])) == 100_000
    assert time.process_time() - start < 3.0


def test_equal_members_are_not_mistaken_for_an_attack() -> None:
    assert build_set([5] * 100_000) == {5}


def test_a_range_of_huge_numbers_is_opaque_and_costs_nothing() -> None:
    huge = 1 << 400_000 | 12345
    start = time.process_time()
    for value in (range(0, huge, 3), range(-huge, 0), range(0, 5, huge)):
        assert type(decode(encode(value))) is Opaque
        with pytest.raises(CodecError, match="63 bits"):
            decode(json.dumps({"r": [{"i": hex(part)} for part in (value.start, value.stop, value.step)]}))
    assert decode(encode([range(3), range(2**63)])) != [range(3), range(2**63)]
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("value", "length"), [(range(-(2**62), 2**62), 2**63), (range(5), 5), (range(5, 0, -2), 3), (range(1, 0), 0)]
)
def test_a_range_has_a_length_that_len_may_not_give(value: range, length: int) -> None:
    assert range_length(value) == length


@pytest.mark.parametrize("items", [range(10**13), range(10**13, 0, -1)])
def test_a_range_of_too_many_numbers_becomes_no_set(items: range) -> None:
    with pytest.raises(CodecError, match="is not walked"):
        build_set(items)


def test_a_text_of_millions_of_letters_becomes_a_set_at_once() -> None:
    start = time.process_time()
    assert build_set("ab" * 5_000_000) == {"a", "b"}
    assert build_set(b"ab" * 5_000_000) == {97, 98}
    assert time.process_time() - start < 2.0


def test_numbers_of_other_libraries_are_the_builtin_numbers_that_they_are() -> None:
    numpy = pytest.importorskip("numpy")
    value = [
        numpy.int64(3),
        numpy.bool_(True),
        numpy.float32(0.5),
        numpy.float64(0.1),
        numpy.uint8(200),
        numpy.str_("a"),
    ]
    assert _typed(decode(encode(value))) == _typed([3, True, 0.5, 0.1, 200, "a"])
    assert digest(value) == digest([3, True, 0.5, 0.1, 200, "a"])
    assert _typed(decode(encode({numpy.int64(1): (numpy.bool_(False),)}))) == _typed({1: (False,)})
    for other in (numpy.zeros(2), numpy.longdouble(1.5), numpy.datetime64("2020-01-01")):
        assert type(decode(encode(other))) is Opaque
    fractions = [Fraction(1, 2), Fraction(6, 2), Fraction(10**400), Decimal("0.25"), Decimal(7), Decimal("inf")]
    assert _typed(decode(encode(fractions))) == _typed([0.5, 3, 10**400, 0.25, 7, math.inf])
    assert digest(fractions) == digest([0.5, 3, 10**400, 0.25, 7, math.inf])
    assert type(decode(encode(Fraction(10**400, 3)))) is Opaque


def test_what_travels_as_text_is_built_only_where_that_was_agreed() -> None:
    document = encode(
        [Decimal("1.5"), 2], lambda value: ["Decimal", str(value)] if isinstance(value, Decimal) else None
    )
    assert document == '[{"h":["Decimal","1.5"]},2]'
    with pytest.raises(CodecError):
        decode(document)
    assert decode_tree(json.loads(document), lambda kind, text: (kind, text)) == [("Decimal", "1.5"), 2]
    for wrong in (["Decimal", 1], ["object", "1"], ["eval", "1"], ["object", True], [["Decimal"], "1"]):
        with pytest.raises(CodecError, match="a handle is"):
            decode_tree({"h": wrong}, lambda kind, which: (kind, which))


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ('[1,2,{"t":[]}]', 6),
        (b"1", 1),
        ('"' + "[,{" * 200_000 + '"', 1),
        ('["' + '\\\\"' + "," * 200_000 + '"]', 200_002),
        ('["' + '\\"' + "," * 200_000 + '"]', 2),
        ('"' + "," * 200_000 + "\\", 1),
        ("," * 200_000, 200_001),
    ],
    ids=range(7),
)
def test_values_are_counted_without_being_built(document: str | bytes, parts: int) -> None:
    assert num_parts(document) == parts


@pytest.mark.parametrize("unit", ['"', '"",', '"\\', '\\"', "[],", '"a",', '"\\",'])
def test_counting_the_values_of_a_hostile_document_takes_seconds_at_most(unit: str) -> None:
    document = unit.encode() * (16_000_000 // len(unit))
    start = time.process_time()
    num_parts(document)
    assert time.process_time() - start < 3.0


def test_what_does_not_travel_is_listed_and_what_travels_stays_as_it_is() -> None:
    for value, items in (
        ((n for n in (1, 2)), [1, 2]),
        (map(abs, [-1]), [1]),
        ({1: 2}.keys(), [1]),
        (collections.deque([1, 2]), [1, 2]),
        (reversed([1, 2]), [2, 1]),
    ):
        assert listed(value) == items
    for value in (None, 1, "ab", b"ab", bytearray(b"ab"), [1], (1,), {1}, {1: 2}, range(3), collections.Counter("ab")):
        assert listed(value) is value


def test_a_generator_has_no_number_of_items_and_one_without_end_stays_what_it_is() -> None:
    assert listed(collections.deque([1, 2]), is_counted=True) == [1, 2]
    for value, is_counted in (((n for n in (1, 2)), True), (itertools.count(), False), (object(), False)):
        assert listed(value, is_counted=is_counted) is value


def test_a_bytearray_is_the_bytes_it_is_equal_to() -> None:
    assert decode(encode(bytearray(b"ab"))) == b"ab"
    assert digest(bytearray(b"ab")) == digest(b"ab")
