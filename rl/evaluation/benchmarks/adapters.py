"""Known benchmarks: conversion of a row to a problem, and of a completion to a program.

The questions are worded here; the problems, their tests and the comparison are the benchmark's own.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from coupled.reward import RewardError, Task, evalplus_task, known_task
from coupled.rl.evaluation.benchmarks.programs import blocks, chat_program, continued_program, parsed
from coupled.rl.evaluation.benchmarks.types import Benchmark, Problem, Prompting

_EVALPLUS = "https://github.com/evalplus/{0}/releases/download/{1}/{2} (Apache-2.0)"


def write_program(problem: Problem, completion: str, prompting: Prompting) -> str | None:
    """The program in a completion of a benchmark that requests one."""
    entry_point = problem.task.entry_point
    if prompting == "completion":
        code: str | None = continued_program(completion, entry_point, problem.opening)
    else:
        code = chat_program(completion, entry_point, problem.opening)
    return code if code is None or not problem.preamble else f"{problem.preamble}\n{code}"


def fenced_program(problem: Problem, completion: str, prompting: Prompting) -> str | None:
    """The program for tasks whose prompt requests a fenced block, whether or not the model has a chat template."""
    return chat_program(completion, problem.task.entry_point, problem.opening)


# --- EvalPlus -------------------------------------------------------------------------------------------------------


def evalplus_problem(row: Mapping[str, Any]) -> Problem:
    """Problem of a HumanEval+ or MBPP+ row; its first tests are the tests of HumanEval or MBPP."""
    task = evalplus_task(row)
    code = task.prompt.strip() + "\n"
    return Problem(
        task=task,
        question="Solve the following problem in Python. Answer with one fenced python block that holds the whole "
        f"program: the function, its imports and what else it needs.\n\n```python\n{code}```",
        opening=code,
        num_base_tests=len(row["base_input"]),
    )


# --- CRUXEval -------------------------------------------------------------------------------------------------------


def cruxeval_problem(row: Mapping[str, Any], *, asks: Literal["input", "output"]) -> Problem:
    """Problem of a CRUXEval row: predict what f returns, or find arguments for which it returns a value."""
    code, given, output = (str(row[name]) for name in ("code", "input", "output"))
    shown = f"Here is a Python function:\n\n```python\n{code}\n```\n\n"
    if asks == "output":
        question = f"{shown}What does f({given}) return? Answer with the value alone, as a Python literal, in one "
        opening, reference = f"{code}\n\nassert f({given}) == ", output
    else:
        question = (
            f"{shown}Find arguments for which f returns {output}. Answer with one call of f, such as f(1), in one "
        )
        opening, reference = f"{code}\n\nassert {output} == f(", f"f({given})"
    return Problem(
        task=Task(
            uid=str(row["id"]),
            prompt=code,
            hidden_tests=(f"assert answer() == {output}",),
            entry_point="answer",
            reference=_answer("" if asks == "output" else code, reference),
        ),
        question=f"{question}fenced python block.",
        opening=opening,
    )


def predicted_output(problem: Problem, completion: str, prompting: Prompting) -> str | None:
    """A program that returns the value that a completion states. It does not contain f, so it cannot call f."""
    for text in _answers(completion, prompting):
        for candidate in _prefixes(text):
            value = _stated(candidate, is_call=False)
            if value is not None:
                return _answer("", ast.unparse(value))
    return None


def predicted_input(problem: Problem, completion: str, prompting: Prompting) -> str | None:
    """A program that calls f with the arguments of a completion: one call of f and nothing around it."""
    for text in _answers(completion, prompting):
        for candidate in _prefixes(text if prompting == "chat" else f"f({text}"):
            call = _stated(candidate, is_call=True)
            if call is not None:
                return _answer(problem.task.prompt, ast.unparse(call))
    return None


def _answers(completion: str, prompting: Prompting) -> list[str]:
    if prompting == "completion":
        return [completion]
    return [text.strip() for text in (blocks(completion) or [completion])]


def _prefixes(text: str) -> list[str]:
    """The text and its beginnings up to each line, longest first: text after an answer is not part of it."""
    lines = text.split("\n")
    return ["\n".join(lines[:end]) for end in range(len(lines), 0, -1)]


def _stated(text: str, *, is_call: bool) -> ast.expr | None:
    """The answer's expression, alone or as a side of an assertion; a call of f exactly if `is_call`."""
    tree = parsed(text.strip())
    if tree is None or len(tree.body) != 1:
        return None
    (node,) = tree.body
    sides: list[ast.expr] = []
    if isinstance(node, ast.Expr):
        sides = [node.value]
    elif isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and len(node.test.ops) == 1:
        sides = [node.test.left, *node.test.comparators]
    return next((side for side in sides if _calls_f(side) is is_call), None)


def _calls_f(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "f"


def _answer(code: str, expression: str) -> str:
    return f"{code}\n\ndef answer():\n    return ({expression})\n".lstrip()


# --- BigCodeBench ---------------------------------------------------------------------------------------------------


def bigcodebench_problem(row: Mapping[str, Any], *, is_instruct: bool) -> Problem:
    """Problem of a BigCodeBench row. Its harness puts the task's imports and an empty function before the program."""
    task = known_task(row)
    if task is None:
        raise RewardError(f"a row of BigCodeBench must have libs, test and complete_prompt; received {sorted(row)}")
    complete = str(row["complete_prompt"]).strip() + "\n"
    ask = "Answer with one fenced python block that holds the whole program.\n\n"
    return Problem(
        task=task,
        question=ask + str(row["instruct_prompt"]) if is_instruct else f"{ask}```python\n{complete}```",
        opening=complete,
        preamble=f"{row['code_prompt']}\n    pass\n" if row.get("code_prompt") else "",
    )


# --- CanItEdit ------------------------------------------------------------------------------------------------------


def canitedit_problem(row: Mapping[str, Any], *, instruction: str) -> Problem:
    """Problem of a CanItEdit row: change a program by an instruction; the tests are a script over the changed one."""
    before, wish = str(row["before"]), str(row[instruction])
    return Problem(
        task=Task(
            uid=str(row["full_name"]),
            prompt=wish,
            hidden_tests=(str(row["tests"]),),
            reference=str(row["after"]),
        ),
        question=f"Here is a Python program:\n\n```python\n{before}\n```\n\nChange it as follows. {wish}\n\n"
        "Answer with the whole changed program in one fenced python block.",
        opening=f'"""The program before:\n\n{before}\n\nThe change: {wish}\n"""\n\n# The program after the change:\n',
    )


_Asks = Literal["input", "output"]
_CRUXEVAL: tuple[tuple[str, _Asks, Callable[[Problem, str, Prompting], str | None]], ...] = (
    ("i", "input", predicted_input),
    ("o", "output", predicted_output),
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="humaneval+",
            files=("evalplus/HumanEvalPlus.jsonl.gz", "HumanEvalPlus.jsonl.gz", "HumanEvalPlus.jsonl"),
            download=_EVALPLUS.format("humanevalplus_release", "v0.1.10", "HumanEvalPlus.jsonl.gz"),
            num_problems=164,
            problem=evalplus_problem,
            program=write_program,
            base="humaneval",
            is_evalplus=True,
        ),
        Benchmark(
            name="mbpp+",
            files=("evalplus/MbppPlus.jsonl.gz", "MbppPlus.jsonl.gz", "MbppPlus.jsonl"),
            download=_EVALPLUS.format("mbppplus_release", "v0.2.0", "MbppPlus.jsonl.gz"),
            num_problems=378,
            problem=evalplus_problem,
            program=write_program,
            base="mbpp",
            is_evalplus=True,
        ),
        *(
            Benchmark(
                name=f"cruxeval-{letter}",
                files=("cruxeval/cruxeval.jsonl", "cruxeval.jsonl"),
                download="https://github.com/facebookresearch/cruxeval/raw/main/data/cruxeval.jsonl (MIT)",
                num_problems=800,
                problem=partial(cruxeval_problem, asks=asks),
                program=program,
            )
            for letter, asks, program in _CRUXEVAL
        ),
        *(
            Benchmark(
                name=f"bigcodebench-hard{'-instruct' if is_instruct else ''}",
                files=(
                    "bigcodebench/bigcodebench_hard.json.gz",
                    "bigcodebench_hard.json.gz",
                    "bigcodebench_hard.jsonl",
                    "bigcodebench_hard.parquet",
                ),
                download="the data set bigcode/bigcodebench-hard of the Hugging Face hub, as JSONL (Apache-2.0)",
                num_problems=148,
                problem=partial(bigcodebench_problem, is_instruct=is_instruct),
                program=write_program,
                is_weak=True,
            )
            for is_instruct in (False, True)
        ),
        *(
            Benchmark(
                name=f"canitedit-{kind}",
                files=("canitedit/canitedit.jsonl", "canitedit.jsonl", "canitedit.parquet"),
                download="the data set nuprl/CanItEdit of the Hugging Face hub, split test, as JSONL (MIT)",
                num_problems=105,
                problem=partial(canitedit_problem, instruction=f"instruction_{kind}"),
                program=write_program,
            )
            for kind in ("descriptive", "lazy")
        ),
    )
}
FAMILIES: dict[str, tuple[str, ...]] = {
    "cruxeval": ("cruxeval-i", "cruxeval-o"),
    "canitedit": ("canitedit-descriptive", "canitedit-lazy"),
}
"""Names that stand for several benchmarks."""
