"""Values across the border: tagged JSON that expresses builtins only.

The program's side encodes, the host decodes (and the reverse for arguments). Decoding builds None, bool, int,
float, complex, str, bytes, range, list, tuple, set, frozenset and dict, nothing else; no byte of a document
is ever executed. Types are exact: a subclass is flattened to its base with the base's own methods, whatever
the subclass overrides. A value of any other type becomes `Opaque`, which is equal to nothing.

null, true, 1, 1.5, "x", [..]   themselves; ints beyond 2**53 as {"i": hex}, nan and inf as {"f": "nan"}
{"t": [..]}  tuple      {"s": [..]}  set      {"S": [..]}  frozenset     {"d": [[key, value], ..]}  dict
{"b": hex}   bytes      {"c": [re, im]} complex     {"r": [start, stop, step]}  range
{"o": [type name, truth or null]}  anything else
{"h": [kind, number or text]}  between two sandboxes that agreed on it: an object that stays where it is, or a number
                               or time of the standard library as text; the host builds none of them

A number of another kind (numpy's scalars, Fraction, Decimal) is flattened to the int or float it is.

A value too large to send is compared by its digest instead: the sha256 of a canonical form that is the same for
two values exactly when python calls them equal. A right digest needs the right value.

This file is also loaded by path inside the sandbox, so it imports the standard library only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

MAX_DEPTH = 64
"""Containers within containers."""
MAX_NODES = 400_000
"""Values in one document, containers included."""
MAX_PARTS = 3 * MAX_NODES
"""Brackets and commas of one document, as many as so many values can need: they are counted before it is parsed,
because parsing a text makes up to thirty times its size of it."""
MAX_COLLISIONS = 64
"""Members of one set or dict that share a hash: more is an attack that makes lookups quadratic."""
MAX_DOCUMENT = 1 << 16
"""Characters of a document; a larger value is sent as its digest where that is allowed."""

_PLAIN_INT = 2**53
_MAX_RANGE_BITS = 63
"""Largest size of a range's numbers: with larger ones, its length costs time that grows with their square."""
_MAX_TEXTS = 1 << 20
"""Texts of one document that are scanned, to separate their commas from the commas between values."""
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
HANDLE_KINDS = ("object", "call", "iter")
"""Kinds of use of a value that stays in its sandbox."""
TEXT_KINDS = ("name", "Decimal", "Fraction", "datetime", "date", "time", "timedelta")
"""Kinds that travel as text between two sandboxes: names of the program, and values of the standard library."""
Refer = Callable[[Any], "list[Any] | None"]
Resolve = Callable[[str, Any], object]


class CodecError(ValueError):
    """A document that this codec did not write, or a value beyond its limits."""


class Opaque:
    """A value the border does not carry. Equal to nothing, not even to itself.

    The program states its truth, which gains a forger nothing: any true value would do as well.
    """

    __slots__ = ("truth", "type_name")

    def __init__(self, type_name: str, truth: bool | None = None) -> None:
        self.type_name = type_name
        self.truth = truth

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __bool__(self) -> bool:
        if self.truth is None:
            raise TypeError(f"a value of type {self.type_name!r} has no truth")
        return self.truth

    def __repr__(self) -> str:
        return f"Opaque({self.type_name!r})"


class Digest:
    """Stands for a value that was too large to send. Equal to every value with that digest."""

    __slots__ = ("sha256",)

    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256

    def __eq__(self, other: object) -> bool:
        if type(other) is Digest:
            return self.sha256 == other.sha256
        try:
            return self.sha256 == digest(other)
        except CodecError:
            return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Digest({self.sha256!r})"


def encode(value: object, refer: Refer | None = None) -> str:
    """Return the document of a value: ASCII JSON on one line.

    A value too deep or too large as a whole becomes opaque; a part of another type becomes opaque in its
    place, unless `refer` gives `[kind, number or text]` for it: then that is sent.
    """
    try:
        tree = _Encoder(refer=refer).tree(value, 0)
    except (CodecError, RuntimeError) as error:  # RuntimeError: a container changed while it was walked
        return _opaque_document(value, error)
    return _dumps(tree)


def encode_tree(value: object) -> Any:
    """Return what `parse` gives for the document of a value, without the way over the text."""
    try:
        return _Encoder().tree(value, 0)
    except (CodecError, RuntimeError) as error:
        return json.loads(_opaque_document(value, error))


def _opaque_document(value: object, why: BaseException) -> str:
    return json.dumps({"o": [f"{type(value).__name__}: {why}"[:200], None]})


def is_floats(value: object) -> bool:
    """True for a float, and for a list or tuple of floats alone: what may be compared with a tolerance."""
    if isinstance(value, list | tuple) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def encode_or_digest(value: object, *, keep_floats: bool = False) -> tuple[str, str]:
    """Return ("v", document) or, for a value larger than MAX_DOCUMENT, ("d", digest as JSON).

    A large value that is equal to nothing has no digest and is opaque. With `keep_floats` floats are sent
    whatever their number: a digest knows no tolerance.
    """
    if keep_floats and is_floats(value) and not (isinstance(value, list | tuple) and len(value) >= MAX_NODES):
        return "v", encode(value)
    is_text = isinstance(value, str | bytes)
    if not (is_text and len(value) > MAX_DOCUMENT):  # type: ignore[arg-type]
        try:
            # A document has more characters than values: more values than that need no counting.
            tree = _Encoder(MAX_DOCUMENT).tree(value, 0)
            document = _dumps(tree)
            if len(document) <= MAX_DOCUMENT:
                return "v", document
        except (CodecError, RuntimeError):
            pass
    try:
        return "d", json.dumps(digest(value))
    except (CodecError, RuntimeError) as error:
        return "v", _opaque_document(value, error)


def listed(value: Any, *, is_counted: bool = False) -> Any:
    """Return the list of what a value gives when it is of a type that does not travel; any other value as it is.

    For a reply of which a test reads nothing but its items (`is_counted`: their number, which a generator does not
    know). One that gives more than MAX_NODES stays what it is.
    """
    kind = type(value)
    if issubclass(kind, _TRAVELS) or not hasattr(kind, "__len__" if is_counted else "__iter__"):
        return value
    items = list(itertools.islice(value, MAX_NODES + 1))
    return value if len(items) > MAX_NODES else items


def digest(value: object) -> str:
    """Return the sha256 of the canonical form, the same for values that python calls equal.

    So 1, 1.0 and True agree, as do a set and a frozenset, or dicts in another order; a list and a tuple do
    not. Raises CodecError for a value with a part that is equal to nothing (nan, an object of another type)
    and for more than MAX_DEPTH levels.
    """
    sha = hashlib.sha256()
    _canonical(value, 0, sha.update)
    return sha.hexdigest()


def decode(document: str | bytes) -> object:
    """Return the value of a document; CodecError for anything that `encode` would not have written."""
    return decode_tree(parse(document))


def parse(document: str | bytes) -> Any:
    """Return the JSON tree of a document; CodecError when it is no JSON, too deep or large, or has NaN in it."""
    if num_parts(document) > MAX_PARTS:
        raise CodecError(f"more than {MAX_NODES} values")
    try:
        # UTF-8 without a mark: that is what is sent, and anything else comes from a program that writes by itself.
        return _loads(document if isinstance(document, str) else document.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise CodecError(f"no JSON document: {type(error).__name__}: {error}"[:200]) from None


def num_parts(document: str | bytes) -> int:
    """Return how many brackets and commas a document has, which is at least the number of its values.

    Those within texts count only where there are more than a million texts.
    """
    body = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document
    count = _count_parts(body)
    return count if count <= MAX_NODES // 8 else _count_parts(_TEXT.sub(b"", body, count=_MAX_TEXTS))


def _count_parts(body: bytes) -> int:
    return 1 + body.count(b"[") + body.count(b"{") + body.count(b",")


def decode_tree(tree: Any, resolve: Resolve | None = None) -> object:
    """Return the value of a tree that `parse` gave; CodecError as for `decode`.

    `resolve(kind, number or text)` gives what stands for an object that stayed in its sandbox, or the value that
    the text is; without it there are none such.
    """
    return _Decoder(resolve).value(tree, 0)


def _refuse_constant(name: str) -> Any:
    raise CodecError(f"{name} is no JSON: nan and inf are tagged")


# Made once: `json.dumps` and `json.loads` with arguments make one per call, which takes longer than a small value.
_dumps = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_loads = json.JSONDecoder(parse_constant=_refuse_constant).decode


class _Encoder:
    """Walks a value; counts nodes, so that a small value that contains itself many times ends."""

    def __init__(self, max_nodes: int = MAX_NODES, refer: Refer | None = None) -> None:
        self.left = self.most = max_nodes
        self.refer = refer

    def tree(self, value: Any, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise CodecError(f"more than {self.most} values")
        if depth > MAX_DEPTH:
            raise CodecError(f"more than {MAX_DEPTH} levels")
        kind = type(value)
        if kind is bool or value is None or kind is str:
            return value
        if kind is int:
            return value if -_PLAIN_INT <= value <= _PLAIN_INT else {"i": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"f": repr(value)}
        if kind is list:
            return [self.tree(item, depth + 1) for item in value]
        if kind is dict:
            return {"d": [[self.tree(k, depth + 1), self.tree(v, depth + 1)] for k, v in value.items()]}
        for base, tag in ((tuple, "t"), (set, "s"), (frozenset, "S")):
            if kind is base:
                return {tag: [self.tree(item, depth + 1) for item in value]}
        if kind is bytes:
            return {"b": value.hex()}
        if kind is complex:
            return {"c": [self.tree(value.real, depth + 1), self.tree(value.imag, depth + 1)]}
        if kind is range and _is_small(value):
            return {"r": [self.tree(part, depth + 1) for part in (value.start, value.stop, value.step)]}
        return self.flattened(value, kind, depth)

    def flattened(self, value: Any, kind: type, depth: int) -> Any:
        handle = self.refer(value) if self.refer else None
        if handle is not None:
            return {"h": handle}
        for base, plain in _FLATTEN:
            if issubclass(kind, base):
                return self.tree(plain(value), depth)
        number = _foreign_number(value)
        if number is not None:
            return self.tree(number, depth)
        try:
            truth = bool(value)
        except Exception:  # whatever the program's `__bool__` raises
            truth = None
        return {"o": [str(kind.__name__)[:80], truth]}


# The base's own methods: a subclass cannot describe itself.
_FLATTEN: tuple[tuple[type, Callable[[Any], object]], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (complex, lambda value: complex(_part(value, "real"), _part(value, "imag"))),
    (str, str.__str__),
    (bytes, lambda value: bytes.__getitem__(value, slice(None))),
    (bytearray, lambda value: bytes(bytearray.__getitem__(value, slice(None)))),
    (tuple, lambda value: tuple(tuple.__iter__(value))),
    (list, lambda value: list(list.__iter__(value))),
    (set, lambda value: set(set.__iter__(value))),
    (frozenset, lambda value: frozenset(frozenset.__iter__(value))),
    (dict, lambda value: dict(dict.items(value))),
)

_TRAVELS = (*(base for base, _ in _FLATTEN), range)


def _foreign_number(value: Any) -> Any:
    """Return the builtin that a number of numpy, fractions or decimal is, to the precision of a float; else None.

    Only of modules that are loaded: a value of a type cannot be there before its module.
    """
    for module, name, plain in _FOREIGN:
        base = getattr(sys.modules.get(module), name, None)
        if isinstance(base, type) and issubclass(type(value), base):
            try:
                number = plain(base, value)
            except Exception:  # whatever the program made of that module
                return None
            return number if type(number) in (bool, int, float, complex, str, bytes) else None
    return None


def _number(base: type, value: Any) -> int | float:
    try:
        whole = int(value)
    except (ValueError, OverflowError):  # nan and the infinities
        return float(value)
    return whole if whole == value else float(value)


_FOREIGN: tuple[tuple[str, str, Callable[[Any, Any], object]], ...] = (
    ("numpy", "generic", lambda base, value: base.item(value)),
    ("fractions", "Fraction", _number),
    ("decimal", "Decimal", _number),
)


def _is_small(value: range) -> bool:
    return all(part.bit_length() <= _MAX_RANGE_BITS for part in (value.start, value.stop, value.step))


def range_length(value: range) -> int:
    """Return how many numbers a range has, which `len` cannot when they are more than 2**63."""
    step = value.step
    return max(0, (value.stop - value.start + step - (1 if step > 0 else -1)) // step)


def _canonical(value: Any, depth: int, feed: Callable[[bytes], object]) -> None:
    """Feed the canonical form of a value: each part with its kind and length, so that no two read alike."""
    if depth > MAX_DEPTH:
        raise CodecError(f"more than {MAX_DEPTH} levels")
    kind = type(value)
    if kind in (bool, int, float, complex):
        feed(_canonical_number(value))
    elif kind is str or kind is bytes:
        body = value.encode("utf-8", "surrogatepass") if kind is str else value
        feed(b"%s%d:" % (b"s" if kind is str else b"b", len(body)))
        feed(body)
    elif value is None:
        feed(b"n;")
    elif kind is list or kind is tuple:
        feed(b"%s%d:" % (b"l" if kind is list else b"t", len(value)))
        for item in value:
            _canonical(item, depth + 1, feed)
    elif kind is set or kind is frozenset:
        feed(b"S%d:" % len(value))
        for member in sorted(_canonical_bytes(item, depth + 1) for item in value):
            feed(member)
    elif kind is dict:
        feed(b"d%d:" % len(value))
        keys = ((_canonical_bytes(key, depth + 1), key) for key in value)
        for text, key in sorted(keys, key=lambda pair: pair[0]):
            feed(text)
            _canonical(value[key], depth + 1, feed)
    elif kind is range and _is_small(value):
        length = range_length(value)
        feed(b"r%d:" % length)  # ranges are equal when they give the same numbers
        feed(b"%d,%d;" % (value.start if length else 0, value.step if length > 1 else 0))
    else:
        for base, plain in _FLATTEN:
            if issubclass(kind, base):
                return _canonical(plain(value), depth, feed)
        number = _foreign_number(value)
        if number is not None:
            return _canonical(number, depth, feed)
        raise CodecError(f"a value of type {kind.__name__} is equal to nothing"[:200])
    return None


def _canonical_bytes(value: Any, depth: int) -> bytes:
    parts = bytearray()
    _canonical(value, depth, parts.extend)
    return bytes(parts)


def _canonical_number(value: Any) -> bytes:
    if type(value) is complex:
        if value.imag != 0:
            return b"c" + _canonical_number(value.real) + _canonical_number(value.imag)
        value = value.real
    if value != value:
        raise CodecError("nan is equal to nothing")
    if type(value) is float and math.isfinite(value) and not value.is_integer():
        return b"f%s;" % value.hex().encode()
    return b"f%s;" % repr(value).encode() if value in (math.inf, -math.inf) else b"i%x;" % int(value)


def _part(value: complex, name: str) -> float:
    part: float = complex.__dict__[name].__get__(value)
    return part


class _Decoder:
    """Builds a value from a hostile tree within the limits."""

    def __init__(self, resolve: Resolve | None = None) -> None:
        self.left = MAX_NODES
        self.resolve = resolve

    def value(self, tree: Any, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise CodecError(f"more than {MAX_NODES} values")
        if depth > MAX_DEPTH:
            raise CodecError(f"more than {MAX_DEPTH} levels")
        if type(tree) is list:
            return [self.value(item, depth + 1) for item in tree]
        if type(tree) is dict:
            if len(tree) != 1:
                raise CodecError(f"an object has one tag; received {len(tree)}")
            ((tag, body),) = tree.items()
            return self.tagged(tag, body, depth)
        return tree

    def items(self, body: Any, depth: int) -> list[Any]:
        if type(body) is not list:
            raise CodecError(f"a container's body is a list; received {type(body).__name__}")
        return [self.value(item, depth + 1) for item in body]

    def tagged(self, tag: str, body: Any, depth: int) -> Any:
        if tag == "t":
            return tuple(self.items(body, depth))
        if tag == "s":
            return build_set(self.items(body, depth))
        if tag == "S":
            return frozenset(build_set(self.items(body, depth)))
        if tag == "d":
            if type(body) is not list or any(type(pair) is not list or len(pair) != 2 for pair in body):
                raise CodecError("a dict's body is a list of pairs")
            pairs = [(self.value(key, depth + 1), self.value(item, depth + 1)) for key, item in body]
            check_collisions([key for key, _ in pairs])
            return dict(pairs)
        if tag == "r" or tag == "c":
            return self.numbers(tag, body, depth)
        if tag == "o":
            if (
                type(body) is not list
                or len(body) != 2
                or type(body[0]) is not str
                or body[1] not in (None, True, False)
            ):
                raise CodecError("an opaque value is a type's name and its truth")
            return Opaque(body[0][:200], None if body[1] is None else bool(body[1]))
        if tag == "h" and self.resolve is not None:
            if type(body) is not list or len(body) != 2 or not _is_handle(*body):
                raise CodecError("a handle is a kind and a number, or a kind and a text")
            return self.resolve(body[0], body[1])
        if type(body) is not str:
            raise CodecError(f"the body of tag {tag[:20]!r} is text; received {type(body).__name__}")
        return self.text(tag, body)

    def text(self, tag: str, body: str) -> Any:
        if tag == "f" and body in ("nan", "inf", "-inf"):
            return float(body)
        try:
            if tag == "i":
                return int(body, 16)
            if tag == "b":
                return bytes.fromhex(body)
        except ValueError as error:
            raise CodecError(f"the body of tag {tag!r} is no hexadecimal number: {error}"[:200]) from None
        raise CodecError(f"unknown tag {tag[:20]!r}")

    def numbers(self, tag: str, body: Any, depth: int) -> Any:
        parts = self.items(body, depth)
        if tag == "c":
            if len(parts) != 2 or any(type(part) is not float for part in parts):
                raise CodecError("a complex number is two floats")
            return complex(*parts)
        if len(parts) != 3 or any(type(part) is not int for part in parts) or parts[2] == 0:
            raise CodecError("a range is three ints, the last not 0")
        if any(part.bit_length() > _MAX_RANGE_BITS for part in parts):
            raise CodecError(f"a number of a range has more than {_MAX_RANGE_BITS} bits")
        return range(*parts)


def _is_handle(kind: Any, which: Any) -> bool:
    if type(which) is str:
        return kind in TEXT_KINDS
    return type(which) is int and kind in HANDLE_KINDS


def build_set(items: Iterable[Any]) -> set[Any]:
    """Return the set of hashable values.

    CodecError when one is unhashable, too many share a hash, or they are a range of more than MAX_NODES.
    """
    if isinstance(items, str | bytes):
        return set(items)  # few different ones, whatever the length
    if type(items) is range and range_length(items) > MAX_NODES:
        raise CodecError(f"a range of more than {MAX_NODES} numbers is not walked")
    items = list(items)
    check_collisions(items)
    return set(items)


def check_collisions(items: list[Any]) -> None:
    """Raise CodecError when a hash table of these values would take quadratic time, or cannot be built."""
    try:
        if len(set(map(hash, items))) + MAX_COLLISIONS >= len(items):
            return
        buckets: dict[int, list[Any]] = {}
        for item in items:
            bucket = buckets.setdefault(hash(item), [])
            if item not in bucket:
                bucket.append(item)
                if len(bucket) > MAX_COLLISIONS:
                    raise CodecError(f"more than {MAX_COLLISIONS} members share a hash")
    except TypeError as error:
        raise CodecError(f"not hashable: {error}"[:200]) from None
