"""The records of rewards: what is asked of a completion, and what came of it."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from coupled.sandbox import Usage


class RewardError(ValueError):
    """A reward function, or a test, breaks a rule; the message has the rule, the value and the remedy."""


class UnsupportedTest(RewardError):
    """A test that cannot be judged without trusting the program, or not at all."""


Style = Literal["assert", "check", "unittest", "evalplus", "stdio", "script"]
"""assert: each test is asserts over calls. check: a program with a function `check(candidate)`. unittest: a program
with test classes over functions of the program. evalplus: arguments of one call each, judged by what the reference
gives. stdio: standard input and output. script: test classes that must share the program's process (tier T2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One programming problem.

    Example: `Task(uid="mbpp/2", prompt="Write f(xs): ...", hidden_tests=("assert f([1]) == 1",),
    entry_point="f")`
    """

    uid: str
    prompt: str
    visible_tests: tuple[str, ...] = ()
    """Tests that the prompt shows; never scored."""
    hidden_tests: tuple[str, ...]
    """Tests that are scored. For `stdio` each is the text that `stdio_test` gives, for `evalplus` that of
    `arguments_test`."""
    entry_point: str | None = None
    """The function that the tests call, or `Class().method`. None: every function that a test calls and that neither
    Python nor the setup gives."""
    setup: str = ""
    """Code of the tests that runs after the program and before the calls. At T0 that is in the program's namespace: a
    program can call everything in it, so a reference must not be there. At T1 it runs where the tests run, and the
    program gets its imports alone."""
    style: Style = "assert"
    reference: str = ""
    """A right program; `evalplus` takes its replies as the expected values."""
    oracle: str = "equal"
    """How `evalplus` compares; see `reward/evalplus.py`."""
    atol: float = 0.0
    """Absolute tolerance of floats, for `evalplus` and `stdio`. 0: the exact text for `stdio`, 1e-6 for replies
    of `evalplus` that are floats."""
    checker: str = ""
    """For `stdio`: a program with `check(stdin, expected, printed)` that returns True for a right output. It runs
    in a sandbox of its own. Empty: all lines are compared."""
    columns: Mapping[str, object] = field(default_factory=dict)
    """The other columns of the dataset, for reward functions of the user."""

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise ValueError(f"style is one of {get_args(Style)}; task {self.uid!r} has {self.style!r}")
        if self.style == "evalplus" and not (self.reference and self.entry_point):
            raise ValueError(f"style 'evalplus' needs reference and entry_point; task {self.uid!r} lacks one: add it")
        if self.checker and self.style != "stdio":
            raise ValueError(f"checker goes with style 'stdio'; task {self.uid!r} has {self.style!r}: drop it")
        if not 0 <= self.atol < float("inf"):
            raise ValueError(f"atol is a finite number, 0 or more; task {self.uid!r} has {self.atol!r}")
        if self.style == "stdio" and self.setup:
            raise ValueError(
                f"setup goes with tests that call the program; task {self.uid!r} has style 'stdio': drop its setup"
            )


class Status(enum.StrEnum):
    """How the judgement ended. INFRA says nothing about the program and never becomes a score."""

    OK = "ok"
    TIMEOUT = "timeout"
    CRASH = "crash"
    INFRA = "infra"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the tests say about one completion. Example: 2 of 3 passed, `per_test=(True, False, True)`."""

    status: Status
    outcome: str
    """An `Outcome` of the sandbox, or `no_code`, `syntax_error`: there was nothing to run."""
    per_test: tuple[bool, ...]
    """One entry per hidden test, or per part of one that is a program; empty for INFRA."""
    visible: tuple[bool, ...] = ()
    """The same for the visible tests, where they were asked for; never counted."""
    tier: str = ""
    """Who compared. T0: the host, over values. T1: the tests, in a sandbox of their own. T2: the tests, in the
    program's process. Empty: nothing was run."""
    usage: Usage = field(default_factory=Usage)
    detail: str = ""
    """One line for people; untrusted where the program caused it."""

    @property
    def is_weak(self) -> bool:
        """True for T2: the program could have forged what its tests said."""
        return self.tier == "T2"

    @property
    def summary(self) -> str:
        """`pass`, `fail`, or the outcome when the run did not end well."""
        if self.outcome != "ok":
            return self.outcome
        return "pass" if self.total and self.passed == self.total else "fail"

    @property
    def cpu_seconds(self) -> float:
        """Processor time of everything that was run for it."""
        return self.usage.cpu_seconds

    @property
    def passed(self) -> int:
        """How many hidden tests passed."""
        return sum(self.per_test)

    @property
    def total(self) -> int:
        """How many hidden tests were judged."""
        return len(self.per_test)

    @property
    def pass_rate(self) -> float:
        """Passed over total, in [0, 1]; ValueError for INFRA, which has none."""
        if self.status is Status.INFRA:
            raise ValueError("a judgement with status INFRA has no pass rate: leave the sample out of the update")
        return self.passed / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The reward of one completion. Example: `Verdict(score=2.5, parts={"code": 1.0, "format": 1.0}, ..)`."""

    score: float | None
    """Weighted sum of the parts; None: the sample must not be trained on (INFRA, or nothing scored it)."""
    parts: Mapping[str, float]
    """What each reward function gave, before its weight; a function that gave None is absent."""
    status: Status
    passed: int = 0
    """Hidden tests passed; 0 when no function asked for the tests."""
    total: int = 0
    """Hidden tests judged; 0 for INFRA and when no function asked for the tests."""
    per_test: tuple[bool, ...] = ()
    """As in `Judgement`; empty when no function asked for the tests."""
    outcome: str = "not_run"
    """As in `Judgement`; `not_run` when no function asked for the tests."""
    tier: str = ""
    """As in `Judgement`: T0, T1 or T2, which is weak; empty when nothing was run."""
    detail: str = ""
    """As in `Judgement`: one line for people; untrusted where the program caused it."""


def stdio_test(stdin: str, stdout: str) -> str:
    """Return the text of one `stdio` test: the program reads `stdin` and must print `stdout`."""
    return json.dumps({"input": stdin, "output": stdout})
