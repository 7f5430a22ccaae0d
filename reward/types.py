"""The records of rewards: what is asked of a completion, and what came of it."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


class RewardError(ValueError):
    """A reward function, or a test, breaks a rule; the message has the rule, the value and the remedy."""


class UnsupportedTest(RewardError):
    """A test that cannot be turned into calls of the program and a check on the host."""


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
    """Tests that are scored. For `stdio` each is the text that `stdio_test` gives."""
    entry_point: str | None = None
    """The function that the tests call; None: every name in a test that is not one of the checker's own."""
    setup: str = ""
    """Code of the tests that runs after the program and before the calls."""
    style: Literal["assert", "stdio"] = "assert"
    columns: Mapping[str, object] = field(default_factory=dict)
    """The other columns of the dataset, for reward functions of the user."""

    def __post_init__(self) -> None:
        if self.style not in ("assert", "stdio"):
            raise ValueError(f"style is 'assert' or 'stdio'; task {self.uid!r} has {self.style!r}")
        if self.style == "stdio" and self.setup:
            raise ValueError(f"setup goes with assert tests; task {self.uid!r} has style 'stdio': drop its setup")


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
    """One entry per hidden test; empty for INFRA."""
    cpu_seconds: float = 0.0

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
    outcome: str = "not_run"
    """As in `Judgement`; `not_run` when no function asked for the tests."""


def stdio_test(stdin: str, stdout: str) -> str:
    """Return the text of one `stdio` test: the program reads `stdin` and must print `stdout`."""
    return json.dumps({"input": stdin, "output": stdout})
