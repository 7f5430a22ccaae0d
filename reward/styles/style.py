"""The records of test styles: `TestStyle`, and the `Plan` that a style makes for one task."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

from coupled.reward.types import Task
from coupled.sandbox import Execution, Job, Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The replies of a task's reference, and the time they took."""

    values: tuple[object, ...]
    """One per hidden test."""
    cpu_seconds: float
    wall_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the programs of one task are judged."""

    tier: str
    """T0, T1 or T2; see `Judgement.tier`."""
    total: int
    """Number of tests, or parts of one, that are judged."""
    job: Callable[[str, Limits], Job]
    """From a program and its limits to the job to run."""
    verdicts: Callable[[Execution], tuple[bool, ...]]
    """From the execution of that job to one bool per test; shorter than `total` when not all were reached."""
    checker: Callable[[Execution, Limits], Job] | None = None
    """Where a checker of the dataset decides: from the execution to the checker's job. `verdicts` then reads the
    execution of the checker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRun:
    """How a style runs a task's reference for the expected values. It runs once per task, and no other program."""

    job: Callable[[Task], Job]
    read: Callable[[Task, Execution], Expected]
    """Raises UnsupportedTest when the reference does not give one value for every test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestStyle:
    """Everything the package knows of one style of tests.

    Example: `TestStyle(name="stdio", plan=plan, has_run_per_test=True, has_checker=True, validate=validate)`
    """

    __test__ = False  # pytest: this is no test class

    name: str
    """The value of `Task.style`, and of the dataset column `style`."""
    plan: Callable[[Task, Expected | None], Plan]
    """Reads the hidden tests of a task. Raises UnsupportedTest for a test that cannot be judged. The second argument
    is None unless the style has a `reference` that has run."""
    validate: Callable[[Task], None] | None = None
    """Raises ValueError for a task whose fields do not fit the style; called when a `Task` is made, after the rules
    that hold for every style. None: no rule of its own."""
    recognises: Callable[[ast.Module], bool] | None = None
    """True for the parsed text of a test of this style, for dataset rows that name no style. None: a row must name
    it."""
    reference: ReferenceRun | None = None
    """None: the tests state the expected values."""
    is_program: bool = False
    """The one hidden test is a whole program; a text is not split into one test per line."""
    is_weak: bool = False
    """The tests run in the program's own process, where it can forge them (tier T2); needs `allow_weak`."""
    has_run_per_test: bool = False
    """The program is started, and its wall time limited, once per test instead of once per task."""
    has_checker: bool = False
    """`Task.checker` may decide in place of the comparison."""
