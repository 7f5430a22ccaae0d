"""A small, bounded evaluator of a test's checks over the values that a program returned.

It evaluates the expression of the test over values from the sandbox. These are builtins, but the program chooses their
size and content: every operation here costs at most a little more than its operands' size, and operations that could
cost more (powers, repetition, arithmetic on huge ints, walking a huge range, hashing colliding keys) are refused.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from coupled.sandbox import CallResult
from coupled.sandbox.jail.codec import MAX_NODES, build_set, check_collisions, range_length

MAX_BITS = 1 << 14
"""Largest int, in bits, that arithmetic reads or returns."""

FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)
"""Exceptions of `evaluate` when a value does not allow an operation of the test: the test has failed."""


class NoReply(LookupError):
    """The call that the expression needs raised an exception, or was never answered."""


class TooLarge(ValueError):
    """An operation would cost the host more than a test is worth."""


class Unsupported(ValueError):
    """A construct that this evaluator does not have."""


class Slot(ast.expr):
    """Stands where a test calls the program; `index` counts the calls of the test."""

    _fields = ()

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index


def evaluate(node: ast.expr, replies: Sequence[CallResult]) -> Any:
    """Return the value of an expression; `replies[i]` is the reply to the call in slot i.

    Raises one of FAILURES when the values do not allow the operation, Unsupported for a construct it lacks.
    """
    match node:
        case Slot():
            return _reply(node, replies)
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple() | ast.Set():
            return _DISPLAY[type(node)]([evaluate(item, replies) for item in node.elts])
        case ast.Dict():
            return _dict(node, replies)
        case ast.BoolOp():
            return _bool_op(node, replies)
        case ast.UnaryOp() if type(node.op) in _UNARY:
            return _UNARY[type(node.op)](evaluate(node.operand, replies))
        case ast.BinOp() if type(node.op) in _BINARY:
            return _BINARY[type(node.op)](evaluate(node.left, replies), evaluate(node.right, replies))
        case ast.Compare():
            return _compare(node, replies)
        case ast.Subscript():
            return evaluate(node.value, replies)[_index(node.slice, replies)]
        case ast.Call():
            return _call(node, replies)
        case ast.Attribute(value=ast.Name(id="math")) if node.attr in ("pi", "e", "inf", "nan", "tau"):
            return getattr(math, node.attr)
    raise Unsupported(f"{type(node).__name__} in {ast.unparse(node)[:80]!r}")


def function_name(node: ast.expr) -> str | None:
    """Return the name of a function of this evaluator, or None when the expression names none."""
    name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
    return name if name in FUNCTIONS else None


def _reply(slot: Slot, replies: Sequence[CallResult]) -> object:
    if slot.index >= len(replies):
        raise NoReply(f"call {slot.index} was not answered")
    reply = replies[slot.index]
    if reply.raised is not None:
        raise NoReply(f"call {slot.index} raised {reply.raised.type}")
    return reply.value


def _dict(node: ast.Dict, replies: Sequence[CallResult]) -> dict[Any, Any]:
    if any(key is None for key in node.keys):
        raise Unsupported("** in a dict")
    keys = [evaluate(key, replies) for key in node.keys if key is not None]
    check_collisions(keys)
    return dict(zip(keys, (evaluate(value, replies) for value in node.values), strict=True))


def _bool_op(node: ast.BoolOp, replies: Sequence[CallResult]) -> Any:
    stops_at = isinstance(node.op, ast.Or)
    value: Any = None
    for operand in node.values:
        value = evaluate(operand, replies)
        if bool(value) is stops_at:
            break
    return value


def _compare(node: ast.Compare, replies: Sequence[CallResult]) -> Any:
    pairs = list(zip(node.ops, node.comparators, strict=True))
    if any(isinstance(op, ast.Is | ast.IsNot) and not _is_singleton(right) for op, right in pairs):
        raise Unsupported(f"`is` with anything but None, True or False: {ast.unparse(node)[:80]!r}")
    left = evaluate(node.left, replies)
    result: Any = True
    for op, right_node in pairs:
        right = evaluate(right_node, replies)
        result = _COMPARE[type(op)](left, _walkable(right) if isinstance(op, ast.In | ast.NotIn) else right)
        if not result:
            break
        left = right
    return result


def _is_singleton(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool))


def _index(node: ast.expr, replies: Sequence[CallResult]) -> Any:
    if not isinstance(node, ast.Slice):
        return evaluate(node, replies)
    parts = (node.lower, node.upper, node.step)
    return slice(*(None if part is None else evaluate(part, replies) for part in parts))


def _call(node: ast.Call, replies: Sequence[CallResult]) -> Any:
    name = function_name(node.func)
    if name is None:
        raise Unsupported(f"call of {ast.unparse(node.func)[:80]!r}")
    function, max_args, keywords = FUNCTIONS[name]
    if len(node.args) > max_args or any(word.arg not in keywords for word in node.keywords):
        raise Unsupported(f"arguments of {ast.unparse(node)[:80]!r}")
    args = [_walkable(evaluate(arg, replies)) for arg in node.args]
    return function(*args, **{str(word.arg): evaluate(word.value, replies) for word in node.keywords})


def _walkable(value: Any) -> Any:
    if type(value) is range and range_length(value) > MAX_NODES:
        raise TooLarge("a range this long is not walked")
    return value


def _number(value: Any) -> Any:
    if type(value) is int:
        if value.bit_length() > MAX_BITS:
            raise TooLarge(f"arithmetic on an int of {value.bit_length()} bits")
    elif type(value) not in (bool, float, complex):
        raise TypeError(f"{type(value).__name__} is no number")
    return value


def _arithmetic(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda left, right: apply(_number(left), _number(right))


def _add(left: Any, right: Any) -> Any:
    if type(left) is type(right) and type(left) in (str, bytes, list, tuple):
        if len(left) + len(right) > MAX_NODES:
            raise TooLarge("a sum this long")
        return left + right
    return _number(left) + _number(right)


def _subtract(left: Any, right: Any) -> Any:
    if type(left) in (set, frozenset) and type(right) in (set, frozenset):
        return left - right
    return _number(left) - _number(right)


def _multiply(left: Any, right: Any) -> Any:
    for sequence, count in ((left, right), (right, left)):
        if type(sequence) in (str, bytes, list, tuple) and type(count) is int:
            if _size(sequence) * max(count, 0) > MAX_NODES:
                raise TooLarge("a repetition this long")
            return sequence * count
    return _number(left) * _number(right)


def _size(value: Any) -> int:
    """Return how much a comparison with the value may cost: its characters and members, at every level."""
    if type(value) in (str, bytes):
        return len(value)
    if type(value) is dict:
        return 1 + sum(_size(key) + _size(item) for key, item in value.items())
    return 1 + sum(map(_size, value)) if type(value) in (list, tuple, set, frozenset) else 1


def _power(left: Any, right: Any) -> Any:
    left, right = _number(left), _number(right)
    if type(left) is int and type(right) is int and left.bit_length() * abs(right) > MAX_BITS:
        raise TooLarge("a power this large")
    return left**right


def _bitwise(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def checked(left: Any, right: Any) -> Any:
        if type(left) in (set, frozenset) and type(right) in (set, frozenset):
            return apply(left, right)
        return apply(_number(left), _number(right))

    return checked


def _round(value: Any, digits: int | None = None) -> Any:
    if digits is not None and (type(digits) is not int or abs(digits) > 400):
        raise TooLarge("rounding to more than 400 digits")
    return round(_number(value), digits) if digits is not None else round(_number(value))


def _sum(values: Any) -> Any:
    return sum(map(_number, values))


def _isclose(left: Any, right: Any, **tolerances: Any) -> bool:
    return math.isclose(_number(left), _number(right), **tolerances)


_DISPLAY: dict[type, Callable[[list[Any]], Any]] = {ast.List: list, ast.Tuple: tuple, ast.Set: build_set}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: lambda value: -_number(value),
    ast.UAdd: lambda value: +_number(value),
}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: _add,
    ast.Sub: _subtract,
    ast.Mult: _multiply,
    ast.Pow: _power,
    ast.Div: _arithmetic(operator.truediv),
    ast.FloorDiv: _arithmetic(operator.floordiv),
    ast.Mod: _arithmetic(operator.mod),
    ast.BitAnd: _bitwise(operator.and_),
    ast.BitOr: _bitwise(operator.or_),
    ast.BitXor: _bitwise(operator.xor),
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, values: operator.contains(values, item),
    ast.NotIn: lambda item, values: not operator.contains(values, item),
}
FUNCTIONS: dict[str, tuple[Callable[..., Any], int, tuple[str, ...]]] = {
    "set": (lambda values=(): build_set(values), 1, ()),
    "frozenset": (lambda values=(): frozenset(build_set(values)), 1, ()),
    "sorted": (sorted, 1, ("reverse",)),
    "len": (len, 1, ()),
    "tuple": (tuple, 1, ()),
    "list": (list, 1, ()),
    "abs": (lambda value: abs(_number(value)), 1, ()),
    "round": (_round, 2, ()),
    "sum": (_sum, 1, ()),
    "min": (min, 16, ()),
    "max": (max, 16, ()),
    "all": (all, 1, ()),
    "any": (any, 1, ()),
    "bool": (bool, 1, ()),
    "int": (int, 1, ()),
    "float": (float, 1, ()),
    "str": (str, 1, ()),
    "math.isclose": (_isclose, 2, ("rel_tol", "abs_tol")),
}
"""Functions that a test may call besides the program: the function, its maximum of positional arguments, keywords."""
