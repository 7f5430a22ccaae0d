"""EvalPlus: inputs whose expected values the reference gives, compared as EvalPlus compares.

equal     equal; floats, or everything where the task has a tolerance, within rtol 1e-7 and the tolerance
set       equal as sets
not_none  None where the expected is; True and False stand for not None and None
anything  every reply                              or_zero   equal, or 0
pyramid   equal, or the area with the height as the perpendicular one     digits  equal, or the padded distance
root      the reply is a zero of the polynomial

The tolerance of one input never reaches another: each comparison is a function of its own arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from coupled.reward.types import RewardError, Task, UnsupportedTest
from coupled.sandbox import CodecError
from coupled.sandbox.jail.codec import build_set, decode, encode, is_floats

RTOL = 1e-7
FLOAT_ATOL = 1e-6
"""Absolute tolerance of a reply whose expected value is floats, in a task without one."""

_SET = "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum intersection_array Diff"
ORACLES: dict[str, dict[str, str]] = {
    "humaneval": {"find_zero": "root"},
    "mbpp": dict.fromkeys((*_SET.split(), "find_dissimilar"), "set")
    | dict.fromkeys(("check_str", "text_match_three", "text_starta_endb"), "not_none")
    | {
        "are_equivalent": "anything",
        "sum_div": "or_zero",
        "surface_Area": "pyramid",
        "digit_distance_nums": "digits",
    },
}
"""The tasks that are not compared by `equal`, by benchmark and entry point."""

# JSON has no tuples, sets and complex numbers: which arguments of MBPP+ were some. T: tuple; L: list of the rest;
# *: every item (or argument) alike; ".": as it is.
_SHAPES: dict[str, str] = {
    "*T": "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
    "*LT": "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
    "LT .": "75 413 444 753",
    ". T": "106 750",
    "T .": "250 405 446 617 720 763 808",
    "*TT": "259 401 445",
    "T . .": "307",
    "*N": "580 615 791",
    "*U": "278",
    "DT . .": "722",
    "LS": "115",
    "F C": "124",
    "C": "252",
}
_SHAPE_OF = {number: shape for shape, numbers in _SHAPES.items() for number in numbers.split()}


def evalplus_task(row: Mapping[str, Any]) -> Task:
    """Return the task of a row of HumanEval+ or MBPP+, with every base and plus input a hidden test.

    RewardError when a column is missing.
    """
    missing = [name for name in ("task_id", "prompt", "entry_point", "canonical_solution") if name not in row]
    if missing:
        raise RewardError(f"a row of EvalPlus has a column {missing[0]!r}; received {sorted(row)}")
    benchmark, _, number = str(row["task_id"]).partition("/")
    inputs = [*row["base_input"], *row["plus_input"]]
    if benchmark == "Mbpp":
        inputs = [_shaped(args, _SHAPE_OF.get(number, "*.")) for args in inputs]
    entry_point = str(row["entry_point"])
    return Task(
        uid=str(row["task_id"]),
        prompt=str(row["prompt"]),
        hidden_tests=tuple(arguments_test(args) for args in inputs),
        entry_point=entry_point,
        style="evalplus",
        reference=str(row["prompt"]) + "\n" + str(row["canonical_solution"])
        if benchmark == "HumanEval"
        else str(row["canonical_solution"]),
        oracle=ORACLES.get(benchmark.lower(), {}).get(entry_point, "equal"),
        atol=float(row["atol"]),
    )


def arguments_test(args: Sequence[object]) -> str:
    """Return the text of one `evalplus` test: the arguments of the call."""
    return encode(tuple(args))


@lru_cache(maxsize=1 << 12)
def parse_arguments(text: str) -> tuple[object, ...]:
    """Return the arguments that `arguments_test` was given, or those of a JSON list; UnsupportedTest else."""
    try:
        args = decode(text)
    except CodecError:
        args = None
    if not isinstance(args, list | tuple):
        raise UnsupportedTest(
            f"an evalplus test is the arguments of one call; received {text[:300]!r}: "
            "build it with coupled.reward.arguments_test"
        )
    return tuple(args)


def is_exact(task: Task, expected: object) -> bool:
    """True when only an equal value can be right, so that a digest is enough."""
    return task.oracle == "equal" and task.atol == 0 and not is_floats(expected)


def matches(task: Task, args: Sequence[Any], value: Any, expected: Any) -> bool:
    """True when the reply is right. Never raises, whatever the value; costs little more than its size."""
    try:
        return _matches(task, args, value, expected)
    except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError):
        return False


def _matches(task: Task, args: Sequence[Any], value: Any, expected: Any) -> bool:
    match task.oracle:
        case "root":
            return _is_number(value) and abs(_polynomial(args[0], value)) <= task.atol
        case "anything":
            return True
        case "set":
            return build_set(value) == build_set(expected)
        case "not_none":
            wanted = expected is not None
            return wanted is (value if isinstance(value, bool) else value is not None)
    if value == expected:
        return True
    match task.oracle:
        case "or_zero" if _is_number(value) and value == 0:
            return True
        case "pyramid" if _is_number(value) and abs(value - _surface(*args)) <= task.atol:
            return True
        case "digits" if _is_number(value) and value == _digit_distance(*args):
            return True
    atol = task.atol or (FLOAT_ATOL if is_floats(expected) else 0.0)
    return atol > 0 and type(value) is type(expected) and _is_close(value, expected, atol)


def _is_close(value: Any, expected: Any, atol: float) -> bool:
    """True when shapes agree and every number is within the tolerances; anything but numbers is not close."""
    if isinstance(expected, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(expected)
            and all(_is_close(left, right, atol) for left, right in zip(value, expected, strict=True))
        )
    if not (_is_number(value) and _is_number(expected)):
        return False
    margin = atol + RTOL * abs(expected)
    return bool(value == expected or (margin < math.inf and abs(value - expected) <= margin))


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | float | complex) or (isinstance(value, int) and value.bit_length() <= 1024)


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    return sum(c * math.pow(x, power) for power, c in enumerate(coefficients))


def _surface(base_edge: float, height: float) -> int:
    slant = math.hypot(base_edge / 2, height)
    return round(base_edge**2 + 2 * base_edge * slant)


def _digit_distance(left: int, right: int) -> int:
    width = max(len(str(left)), len(str(right)))
    return sum(abs(int(a) - int(b)) for a, b in zip(str(left).zfill(width), str(right).zfill(width), strict=True))


def _shaped(args: Sequence[Any], shape: str) -> list[Any]:
    if shape.startswith("*"):
        return [_value(arg, shape[1:]) for arg in args]
    return [_value(arg, one) for arg, one in zip(args, shape.split(), strict=True)]


def _value(arg: Any, shape: str) -> Any:
    match shape[0]:
        case ".":
            return arg
        case "C":
            return complex(arg)
        case "F":
            return float(arg)
        case "S":  # the dataset's own author made the empty one a dict
            return set(arg) if isinstance(arg, list) and arg else {}
        case "D":
            return {key: _value(item, shape[1:]) for key, item in arg.items()}
        case "N":
            return tuple(_value(item, "N") for item in arg) if isinstance(arg, list) else arg
        case "U":
            return tuple(tuple(item) if isinstance(item, list) else item for item in arg)
    items = [_value(item, shape[1:]) for item in arg] if len(shape) > 1 else arg
    return tuple(items) if shape[0] == "T" else list(items)
