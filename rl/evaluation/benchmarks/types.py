"""The interface of a benchmark: one function from a row to a problem, one from a completion to a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coupled.reward import Task

Prompting = Literal["chat", "completion"]
"""chat: the question is the user's turn of the model's chat template. completion: the model continues the opening."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem of a benchmark, as a model is asked and as its program is judged."""

    task: Task
    """What judges the program; its uid is the benchmark's own."""
    question: str
    """The user's turn, for a model with a chat template."""
    opening: str
    """The text that a model without one continues."""
    num_base_tests: int = 0
    """The first tests are those of the benchmark that this one extends; 0: it extends none."""
    preamble: str = ""
    """Put before the program when it is run, as the benchmark's own harness does."""

    def prompt(self, prompting: Prompting) -> str:
        """What the model reads."""
        return self.question if prompting == "chat" else self.opening


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark as data and two functions."""

    name: str
    files: tuple[str, ...]
    """Where its data lies below `--data`; the first that is there counts."""
    download: str
    """Where to get the file, and its licence."""
    num_problems: int
    """Of the whole benchmark; 0 when not known."""
    problem: Callable[[Mapping[str, Any]], Problem]
    """From a row of the file."""
    program: Callable[[Problem, str, Prompting], str | None]
    """From a completion; None when it holds no program."""
    base: str = ""
    """The name of the benchmark that it extends, whose tests are the first of each problem's."""
    is_weak: bool = False
    """Its tests share the program's process (tier T2), so a program could forge its verdict."""
    is_evalplus: bool = False
    """`samples.jsonl` is written for `evalplus.evaluate`."""
