"""Tasks from the rows of a JSONL file, a Parquet file or a hub dataset.

Columns with a meaning: prompt, hidden_tests, visible_tests, entry_point, setup, solution, uid, style. `data.columns`
maps them to the names in the file. All other columns are passed to the user's reward functions. Rows of HumanEval+,
MBPP+, HumanEval and BigCodeBench are recognised by their columns when hidden_tests is not mapped.
"""

from __future__ import annotations

import warnings
from typing import Any

from coupled.reward import PROGRAM_STYLES, Task, UnsupportedTest, known_task, plan, style_of
from coupled.rl.data.rows import load_rows
from coupled.rl.errors import DataError, nearest
from coupled.rl.recipe.data import COLUMNS, Data


def to_task(
    row: dict[str, Any],
    columns: dict[str, str],
    index: int,
    *,
    num_visible: int = 0,
    needs_tests: bool = True,
) -> Task:
    """One dataset row as a Task. The first `num_visible` tests are shown in the prompt and not scored.

    Raises:
        DataError: a required column is absent or of the wrong type.
    """
    known = known_task(row) if "hidden_tests" not in columns and "hidden_tests" not in row else None
    if known is not None:
        return known
    prompt = _text(row, columns, "prompt")
    style = row.get(columns.get("style", "style")) or _inferred_style(row, columns)
    tests = _tests(row, columns, "hidden_tests", is_required=needs_tests, style=style)
    visible = _tests(row, columns, "visible_tests", is_required=False)
    if num_visible:
        if num_visible >= len(tests):
            raise DataError(
                f"data.num_visible_tests ({num_visible}) must leave a test to score with; row {index} has {len(tests)}"
            )
        shown, tests = tests[:num_visible], tests[num_visible:]
        prompt = "\n".join((prompt, *shown))
        visible = (*visible, *shown)
    uid = row.get(columns.get("uid", "uid"))
    named = {columns.get(ours, ours) for ours in COLUMNS}
    return Task(
        uid=f"row-{index}" if uid is None else str(uid),
        prompt=prompt,
        visible_tests=visible,
        hidden_tests=tests,
        entry_point=row.get(columns.get("entry_point", "entry_point")),
        setup=row.get(columns.get("setup", "setup")) or "",
        style=style,
        columns={k: v for k, v in row.items() if k not in named},
    )


def load_tasks(
    data: Data, path: str | None = None, *, needs_tests: bool = True, allow_weak: bool = False
) -> list[Task]:
    """The tasks of `data.path` (or of `path`, with the same columns).

    A task is left out, with a warning, if its tests cannot be judged, or can be judged only by trusting the program and
    `allow_weak` is not set.

    Raises:
        DataError: the data is unreadable, a row lacks a column, two tasks share a uid, or no task can be judged.
    """
    source = data.path if path is None else path
    rows = load_rows(source, split=data.split)
    tasks = [
        to_task(row, data.columns, i, num_visible=data.num_visible_tests, needs_tests=needs_tests)
        for i, row in enumerate(rows)
    ]
    if len({task.uid for task in tasks}) != len(tasks):
        raise DataError("two tasks have the same uid; map data.columns.uid to a column that is unique, or to none")
    return _judgeable(tasks, source, allow_weak)


def _judgeable(tasks: list[Task], source: str, allow_weak: bool) -> list[Task]:
    kept, reason = [], ""
    for task in tasks:
        try:
            if task.hidden_tests:
                plan(task, allow_weak=allow_weak)
            kept.append(task)
        except UnsupportedTest as error:
            reason = reason or str(error)
    if not kept:
        raise DataError(f"{source}: no task has tests that can be judged. The first: {reason}")
    if reason:
        warnings.warn(
            f"{source}: left out {len(tasks) - len(kept)} of {len(tasks)} tasks whose tests cannot be judged; "
            f"the first: {reason}",
            stacklevel=2,
        )
    return kept


def _text(row: dict[str, Any], columns: dict[str, str], name: str) -> str:
    value = _value(row, columns, name)
    if not isinstance(value, str):
        raise DataError(f"column {columns.get(name, name)!r} must hold text; got {type(value).__name__}")
    return value


def _inferred_style(row: dict[str, Any], columns: dict[str, str]) -> str:
    tests = row.get(columns.get("hidden_tests", "hidden_tests"))
    if isinstance(tests, list) and len(tests) == 1:
        tests = tests[0]
    return style_of(tests) if isinstance(tests, str) else "assert"


def _tests(
    row: dict[str, Any], columns: dict[str, str], name: str, is_required: bool = True, style: str = "assert"
) -> tuple[str, ...]:
    if not is_required and row.get(columns.get(name, name)) is None:
        return ()  # `datasets` fills a column that only some rows have with nulls
    value = _value(row, columns, name)
    if isinstance(value, str):
        value = [value] if style in PROGRAM_STYLES else [line for line in value.splitlines() if line.strip()]
    if not isinstance(value, list) or (is_required and not value) or not all(isinstance(t, str) for t in value):
        raise DataError(
            f"column {columns.get(name, name)!r} must hold a non-empty list of test strings; got {value!r:.80}"
        )
    return tuple(value)


def _value(row: dict[str, Any], columns: dict[str, str], name: str) -> Any:
    column = columns.get(name, name)
    if column not in row:
        raise DataError(
            f"the dataset has no column {column!r} (for {name}); {nearest(column, row)} "
            f"Map it in the recipe, for example data.columns.{name}=NAME"
        )
    return row[column]
