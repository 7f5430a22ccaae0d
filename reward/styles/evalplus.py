"""Style `evalplus`: inputs whose expected values the reference gives, compared as EvalPlus compares (tier T0).

`Task.oracle` names the comparison:

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
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from coupled.reward.styles.style import Expected, Plan, ReferenceRun, TestStyle
from coupled.reward.types import Task, UnsupportedTest
from coupled.sandbox import Call, CodecError, Execution, Job, Limits
from coupled.sandbox.jail.codec import build_set, decode, encode, is_floats

REFERENCE_LIMITS = Limits(cpu_seconds=120, wall_seconds=600.0, memory_mb=4096, output_kb=1 << 18)
"""Limits of a reference, which comes from the dataset and runs once per task."""
SLOWDOWN = 4
"""A program may take this many times the processor time of the reference, on top of the limits."""
OUTPUT_KB = 1 << 16
"""Bound of all replies together, for tasks with hundreds of inputs."""

RTOL = 1e-7
FLOAT_ATOL = 1e-6
"""Absolute tolerance of a reply whose expected value is floats, in a task without one."""


def plan(task: Task, expected: Expected | None = None) -> Plan:
    """Return how the task is judged, input by input. `expected` is needed to run the plan, not to make it."""
    arguments = tuple(map(parse_arguments, task.hidden_tests))

    def job(program: str, limits: Limits) -> Job:
        assert expected is not None
        calls = tuple(
            _call(task, text, is_exact(task, value))
            for text, value in zip(task.hidden_tests, expected.values, strict=True)
        )
        limits = replace(
            limits,
            cpu_seconds=limits.cpu_seconds + math.ceil(SLOWDOWN * expected.cpu_seconds),
            wall_seconds=limits.wall_seconds + SLOWDOWN * expected.wall_seconds,
            output_kb=max(limits.output_kb, OUTPUT_KB),
        )
        return Job(uid=task.uid, source=program, setup=task.setup, calls=calls, limits=limits)

    def verdicts(run: Execution) -> tuple[bool, ...]:
        assert expected is not None
        return tuple(
            reply.raised is None and matches(task, args, reply.value, value)
            for args, reply, value in zip(arguments, run.results, expected.values, strict=False)
        )

    return Plan(tier="T0", total=len(arguments), job=job, verdicts=verdicts)


def reference_job(task: Task) -> Job:
    """Return the job that gives the expected values: the reference, called with every input."""
    may_digest = task.oracle == "equal" and task.atol == 0
    calls = tuple(replace(_call(task, text, may_digest), keep_floats=may_digest) for text in task.hidden_tests)
    limits = REFERENCE_LIMITS
    return Job(uid=f"{task.uid} reference", source=task.reference, setup=task.setup, calls=calls, limits=limits)


def read_reference(task: Task, run: Execution) -> Expected:
    """Return the expected values; UnsupportedTest when the reference does not give one for every input."""
    bad = next((index for index, reply in enumerate(run.results) if reply.raised), len(run.results))
    if bad < len(task.hidden_tests):
        raised = run.results[bad].raised if bad < len(run.results) else None
        raise UnsupportedTest(
            f"the reference of a task replies to every input; task {task.uid!r} has one that fails on input {bad} "
            f"({raised or run.outcome}, {run.detail[:200]!r}): drop the task, or fix its reference"
        )
    values = tuple(reply.value for reply in run.results)
    return Expected(values=values, cpu_seconds=run.usage.cpu_seconds, wall_seconds=run.usage.wall_seconds)


def validate(task: Task) -> None:
    """Raise ValueError for a task without the reference and the function that give the expected values."""
    if not (task.reference and task.entry_point):
        raise ValueError(f"style 'evalplus' needs reference and entry_point; task {task.uid!r} lacks one: add it")


def arguments_test(args: Sequence[object]) -> str:
    """Return the text of one `evalplus` test: the arguments of the call."""
    return encode(tuple(args))


@lru_cache(maxsize=1 << 12)
def parse_arguments(text: str) -> tuple[object, ...]:
    """Return the arguments in a text of `arguments_test`, or in a JSON list; UnsupportedTest for any other text."""
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


def _call(task: Task, text: str, may_digest: bool) -> Call:
    assert task.entry_point is not None
    return Call(function=task.entry_point, args=parse_arguments(text), may_digest=may_digest)


STYLE = TestStyle(
    name="evalplus", plan=plan, validate=validate, reference=ReferenceRun(job=reference_job, read=read_reference)
)
