"""The interface of a benchmark: one function from a row to a problem, one from a completion to a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coupled.reward import Task

Prompting = Literal["chat", "completion"]
"""chat: the question is the user's turn in the model's chat template. completion: the model continues the opening."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem of a benchmark: its prompts for a model, and the task that judges the program."""

    task: Task
    """Task that judges the program; its uid is the benchmark's own."""
    question: str
    """The user's turn, for a model with a chat template."""
    opening: str
    """The text that a model without a chat template continues."""
    num_base_tests: int = 0
    """Number of leading tests that belong to the benchmark that this one extends; 0: it extends none."""
    preamble: str = ""
    """Code that is put before the program when it runs, as in the benchmark's own harness."""

    def prompt(self, prompting: Prompting) -> str:
        """The prompt in the given form."""
        return self.question if prompting == "chat" else self.opening


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark as data and two functions."""

    name: str
    files: tuple[str, ...]
    """Paths of its data below `--data`; the first that exists is read."""
    download: str
    """Source and licence of the file."""
    num_problems: int
    """Number of problems of the whole benchmark; 0 when unknown."""
    problem: Callable[[Mapping[str, Any]], Problem]
    """Makes a problem from a row of the file."""
    program: Callable[[Problem, str, Prompting], str | None]
    """Makes a program from a completion; None when it holds none."""
    base: str = ""
    """The name of the benchmark that it extends, whose tests come first in each problem."""
    is_weak: bool = False
    """Its tests share the program's process (tier T2), so a program could forge its verdict."""
    is_evalplus: bool = False
    """`samples.jsonl` is written for `evalplus.evaluate`."""
