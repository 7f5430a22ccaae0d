"""Rows of known benchmarks, recognised by their columns, as tasks.

They are known here, and not where datasets are read, because they decide how tests are meant: which arguments are
tuples, which comparison a task needs. The proofs of this package run on them without PyTorch.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from coupled.reward.styles.evalplus import arguments_test
from coupled.reward.types import RewardError, Task

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
