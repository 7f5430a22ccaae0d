"""The codec against generated values and generated hostile documents."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coupled.sandbox.jail.codec import CodecError, Opaque, decode, encode

SETTINGS = settings(
    max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**300), max_value=2**300),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(st.characters(codec=None), max_size=20),
    st.binary(max_size=20),
    st.builds(range, st.integers(-99, 99), st.integers(-99, 99), st.integers(1, 9)),
)
_HASHABLE = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4)),
    max_leaves=8,
)
VALUES = st.recursive(
    st.one_of(_SCALARS, _HASHABLE),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.sets(_HASHABLE, max_size=5),
        st.dictionaries(_HASHABLE, inner, max_size=5),
    ),
    max_leaves=25,
)
_BUILTINS = {type(None), bool, int, float, complex, str, bytes, range, list, tuple, set, frozenset, dict, Opaque}

_TAGS = st.sampled_from(["t", "s", "S", "d", "i", "f", "b", "c", "r", "o", "x", "v", "", "__class__", "py/object", "D"])
TREES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(["", "nan", "inf", "-inf", "0x10", "-0xff", "0x", "ff", "f", "os.system", "1_0", " 1", "𝟙"]),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(_TAGS, inner, max_size=2),
        st.builds(lambda tag, body: {tag: body}, _TAGS, st.lists(inner, max_size=3)),
        st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3).map(lambda pairs: {"d": pairs}),
    ),
    max_leaves=30,
)


def _shape(value: Any) -> Any:
    """The value with its types at every level; the order of sets does not count, the sign of zero does."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, [(_shape(key), _shape(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return kind, [_shape(item) for item in value]
    if isinstance(value, set | frozenset):
        return kind, sorted(repr(_shape(item)) for item in value)
    return kind, repr(value) if not isinstance(value, int) else value


def _kinds(value: Any) -> set[type]:
    kinds = {type(value)}
    parts = [*value.keys(), *value.values()] if type(value) is dict else value
    if type(value) in (dict, list, tuple, set, frozenset):
        kinds = kinds.union(*map(_kinds, parts))
    return kinds


@SETTINGS
@given(VALUES)
def test_any_builtin_comes_back_equal_and_of_the_same_type(value: object) -> None:
    assert _shape(decode(encode(value))) == _shape(value)


@SETTINGS
@given(VALUES)
def test_a_document_is_one_line_of_ascii(value: object) -> None:
    document = encode(value)
    assert document.isascii()
    assert "\n" not in document


@SETTINGS
@given(TREES)
def test_a_hostile_tree_gives_builtins_or_a_codec_error(tree: object) -> None:
    _decode_hostile(json.dumps(tree))


@SETTINGS
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_text_and_any_bytes_give_builtins_or_a_codec_error(document: str | bytes) -> None:
    _decode_hostile(document)


@SETTINGS
@given(VALUES, st.data())
def test_a_damaged_document_gives_builtins_or_a_codec_error(value: object, data: st.DataObject) -> None:
    document = encode(value)
    start = data.draw(st.integers(0, len(document)))
    end = data.draw(st.integers(start, min(len(document), start + 6)))
    _decode_hostile(
        document[:start] + data.draw(st.text('[]{}",:0123456789abfinrstSodx-.eE\\', max_size=6)) + document[end:]
    )


def _decode_hostile(document: str | bytes) -> None:
    try:
        value = decode(document)
    except CodecError:
        return
    assert _kinds(value) <= _BUILTINS


@SETTINGS
@given(VALUES)
def test_what_was_decoded_encodes_to_a_document_of_the_same_value(value: object) -> None:
    once = decode(encode(value))
    assert _shape(decode(encode(once))) == _shape(once)


_MODULUS = 2**61 - 1
_N = 40_000
BLOW_UPS = {
    "a set of colliding ints": json.dumps({"s": [n * _MODULUS for n in range(_N)]}),
    "a dict of colliding ints": json.dumps({"d": [[n * _MODULUS, 0] for n in range(_N)]}),
    "a set of colliding tuples": json.dumps({"s": [{"t": [n * _MODULUS]} for n in range(_N)]}),
    "a set of colliding sets": json.dumps({"s": [{"S": [n * _MODULUS]} for n in range(_N)]}),
    "sets of few colliding ints": json.dumps([{"s": [n * _MODULUS for n in range(60)]} for _ in range(_N // 60)]),
    "a set of multiples of a power of two": json.dumps({"s": [n << 40 for n in range(_N)]}),
    "a set of floats": json.dumps({"s": [n * 2.0**60 for n in range(_N)]}),
    "a set of minus one and minus two": json.dumps({"s": [-1, -2] * (_N // 2)}),
    "a set of ranges": json.dumps({"s": [{"r": [0, 0, n + 1]} for n in range(_N)]}),
    "a huge hexadecimal number": json.dumps({"i": "0x" + "f" * 2_000_000}),
    "a number of many digits": "[" + "9" * 4_000_000 + "]",
    "a long text of escapes": '"' + "\\ud800" * 300_000 + '"',
    "many brackets": "[" * 1_000_000,
    "many tags": '{"t":[' * 200_000,
    "a set of deep tuples": json.dumps({"s": [json.loads('{"t":[' * 50 + str(n) + "]}" * 50) for n in range(2000)]}),
}


@pytest.mark.parametrize("name", BLOW_UPS)
def test_a_document_made_to_take_long_takes_seconds_at_most(name: str) -> None:
    start = time.process_time()
    _decode_hostile(BLOW_UPS[name])
    assert time.process_time() - start < 5.0


def test_nan_survives_inside_containers() -> None:
    value = decode(encode({"a": [math.nan, (math.nan,)]}))
    assert isinstance(value, dict)
    assert math.isnan(value["a"][0])
    assert math.isnan(value["a"][1][0])
