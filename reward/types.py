"""The records of rewards: the task a completion answers, the judgement of its program, and the verdict."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from coupled.sandbox import Usage


class RewardError(ValueError):
    """A reward function, or a test, breaks a rule; the message has the rule, the value and the remedy."""


class UnsupportedTest(RewardError):
    """A test that cannot be judged without trusting the program, or not at all."""


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
    """Tests that are scored. For `stdio` each is a text built by `stdio_test`, for `evalplus` one built by
    `arguments_test`."""
    entry_point: str | None = None
    """The function that the tests call, or `Class().method`. None: every function that a test calls and that neither
    Python nor the setup defines."""
    setup: str = ""
    """Code of the tests that runs after the program and before the calls. At T0 it runs in the program's namespace: a
    program can call everything in it, so a reference must not be there. At T1 it runs where the tests run, and the
    program gets its imports alone."""
    style: str = "assert"
    """A name in `reward/styles`. assert: each test is asserts over calls. check: a program with a function
    `check(candidate)`. unittest: a program with test classes over functions of the program. evalplus: arguments of one
    call each, compared with the replies of the reference. stdio: standard input and output. script: test classes that
    must share the program's process (tier T2)."""
    reference: str = ""
    """A right program; `evalplus` takes its replies as the expected values."""
    oracle: str = "equal"
    """Comparison of `evalplus`; see `reward/styles/evalplus.py`."""
    atol: float = 0.0
    """Absolute tolerance of floats, for `evalplus` and `stdio`. 0: the exact text for `stdio`, 1e-6 for replies
    of `evalplus` that are floats."""
    checker: str = ""
    """For `stdio`: a program with `check(stdin, expected, printed)` that returns True for a right output. It runs
    in a sandbox of its own. Empty: all lines are compared."""
    columns: Mapping[str, object] = field(default_factory=dict)
    """The other columns of the dataset, for reward functions of the user."""

    def __post_init__(self) -> None:
        from coupled.reward.styles import STYLES  # not above: styles read tasks, so they import this module

        names = tuple(STYLES)
        if self.style not in names:
            raise ValueError(f"style is one of {names}; task {self.uid!r} has {self.style!r}")
        style = STYLES[self.style]
        if self.checker and not style.has_checker:
            takers = ", ".join(repr(name) for name in names if STYLES[name].has_checker)
            raise ValueError(f"checker goes with style {takers}; task {self.uid!r} has {self.style!r}: drop it")
        if not 0 <= self.atol < float("inf"):
            raise ValueError(f"atol is a finite number, 0 or more; task {self.uid!r} has {self.atol!r}")
        if style.validate is not None:
            style.validate(self)


class Status(enum.StrEnum):
    """How the judgement ended. INFRA is a failure of the sandbox, not of the program, and never becomes a score."""

    OK = "ok"
    TIMEOUT = "timeout"
    CRASH = "crash"
    INFRA = "infra"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Result of the tests on one completion. Example: 2 of 3 passed, `per_test=(True, False, True)`."""

    status: Status
    outcome: str
    """An `Outcome` of the sandbox, or `no_code`, `syntax_error` when there was nothing to run."""
    per_test: tuple[bool, ...]
    """One entry per hidden test, or per part of one that is a program; empty for INFRA."""
    tier: str = ""
    """Where values were compared. T0: on the host. T1: by the tests, in a sandbox of their own. T2: by the tests, in
    the program's process. Empty: nothing was run."""
    usage: Usage = field(default_factory=Usage)
    detail: str = ""
    """One line for people; untrusted where the program caused it."""

    @property
    def is_weak(self) -> bool:
        """True for T2: the program could have forged the result of its tests."""
        return self.tier == "T2"

    @property
    def summary(self) -> str:
        """`pass`, `fail`, or the outcome when the run did not end well."""
        if self.outcome != "ok":
            return self.outcome
        return "pass" if self.total and self.passed == self.total else "fail"

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the program and its checker, in seconds."""
        return self.usage.cpu_seconds

    @property
    def passed(self) -> int:
        """Number of hidden tests that passed."""
        return sum(self.per_test)

    @property
    def total(self) -> int:
        """Number of hidden tests that were judged."""
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
    """Score of each reward function, before its weight; a function that returned None is absent."""
    status: Status
    passed: int = 0
    """Hidden tests passed; 0 when no reward function needs the tests."""
    total: int = 0
    """Hidden tests judged; 0 for INFRA and when no reward function needs the tests."""
    per_test: tuple[bool, ...] = ()
    """As in `Judgement`; empty when no reward function needs the tests."""
    outcome: str = "not_run"
    """As in `Judgement`; `not_run` when no reward function needs the tests."""
    tier: str = ""
    """As in `Judgement`: T0, T1 or T2, which is weak; empty when nothing was run."""
    detail: str = ""
    """As in `Judgement`: one line for people; untrusted where the program caused it."""
