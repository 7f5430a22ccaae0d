"""Rows of known benchmarks, recognised by their columns, as tasks."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from coupled.reward.evalplus import evalplus_task
from coupled.reward.types import Style, Task

PROGRAM_STYLES: tuple[Style, ...] = ("check", "unittest", "script")
"""Styles whose one hidden test is a whole program."""


def known_task(row: Mapping[str, Any]) -> Task | None:
    """Return the task of a row of HumanEval+, MBPP+, HumanEval or BigCodeBench; None for any other row."""
    if {"task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol"} <= row.keys():
        return evalplus_task(row)
    if {"task_id", "complete_prompt", "test", "entry_point", "canonical_solution", "libs"} <= row.keys():
        return Task(
            uid=str(row["task_id"]),
            prompt=str(row["complete_prompt"]),
            hidden_tests=(str(row["test"]),),
            entry_point=str(row["entry_point"]),
            style="script",
            reference=f"{row['complete_prompt']}\n{row['canonical_solution']}",
        )
    if {"task_id", "prompt", "entry_point", "canonical_solution", "test"} <= row.keys():
        return _humaneval(row)
    return None


def style_of(text: str) -> Style:
    """Return what a test's text is: a `check(candidate)` function, test classes, or asserts."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "assert"
    if any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in body):
        return "check"
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    if any(ast.unparse(base).endswith("TestCase") for node in classes for base in node.bases):
        return "unittest"
    return "assert"


def _humaneval(row: Mapping[str, Any]) -> Task:
    """Helpers that the prompt defines and the tests use are the tests' own: the program's must not judge it."""
    prompt, test, entry_point = str(row["prompt"]), str(row["test"]), str(row["entry_point"])
    body = ast.parse(prompt).body
    words = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    helpers = [node for node in body if isinstance(node, ast.FunctionDef) and node.name in words - {entry_point}]
    imports = [node for node in body if helpers and isinstance(node, ast.Import | ast.ImportFrom)]
    return Task(
        uid=str(row["task_id"]),
        prompt=prompt,
        hidden_tests=("\n".join([*map(ast.unparse, [*imports, *helpers]), test]),),
        entry_point=entry_point,
        style="check",
        reference=f"{prompt}{row['canonical_solution']}",
    )
