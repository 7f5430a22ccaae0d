"""Are verdicts right? Canonical solutions and seeded wrong ones of HumanEval+ and MBPP+, judged on all inputs.

    python benchmarks/verdicts/mutants.py --data ../shared/data/evalplus [--mutants 2] [--every 1] [--json out.json]

Every canonical solution must pass. A mutant is a canonical solution with one operator, comparison or constant
changed; whether it differs on an input is found out apart from the judge, by running it beside the reference in one
process and comparing there, floats with EvalPlus' tolerance. A mutant that differs on an input and passes is a wrong
verdict, and so is an input on which the two disagree. Exit status 1 when there is one, or a solution does not pass.
"""

from __future__ import annotations

import ast
import gzip
import json
import platform
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python itself looks only into the folder that it is started with

from harness.report import commit, whole_help, write_report

from coupled.reward import Judge, Judgement, Task, evalplus_task
from coupled.reward.styles.evalplus import parse_arguments
from coupled.sandbox import Call, Execution, Executor, Job, Limits, open_executor

FILES = {"HumanEval+": "HumanEvalPlus.jsonl.gz", "MBPP+": "MbppPlus.jsonl.gz"}
LIMITS = Limits(cpu_seconds=10, wall_seconds=120.0, memory_mb=2048)
"""Generous: a busy machine is no reason to find a solution wrong."""
_BATCH = 16
WRONG = ("passed_though_differing", "failed_though_same", "disagreements")
"""Counts of mutants that must be 0."""

_FLIPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_BESIDE = """
import copy
def _load(source):
    names = {{}}
    exec(source, names)
    return names[{entry_point!r}]
_right, _other = _load({right!r}), _load({other!r})
def _near(value, expected):
    return value == expected or abs(value - expected) <= 1e-6 + 1e-7 * abs(expected) < float("inf")
def _close(value, expected):
    if value == expected or type(value) is not type(expected):
        return value == expected
    if isinstance(expected, float):
        return _near(value, expected)
    if not (isinstance(expected, (list, tuple)) and len(value) == len(expected)):
        return False
    return all(isinstance(item, float) for item in expected) and all(map(_near, value, expected))
def same(*args):
    expected = _right(*copy.deepcopy(args))
    try:
        return bool(_close(_other(*copy.deepcopy(args)), expected))
    except Exception:
        return False
"""


def load_tasks(path: Path) -> list[Task]:
    """The tasks of an EvalPlus file."""
    with gzip.open(path, "rt") as lines:
        return [evalplus_task(json.loads(line)) for line in lines]


def mutants(source: str, *, seed: str, count: int) -> list[str]:
    """Up to `count` different programs, each with one change; the same for the same seed."""
    sites = len(list(_sites(_parsed(source))))
    chosen = random.Random(seed).sample(range(sites), min(count, sites))
    return [_mutant(source, site) for site in chosen]


def _mutant(source: str, site: int) -> str:
    tree = _parsed(source)
    owner, name, index = list(_sites(tree))[site]
    old = getattr(owner, name)
    if isinstance(old, list):
        old[index] = _FLIPS[type(old[index])]()
    elif isinstance(owner, ast.Constant):
        owner.value = owner.value + 1
    else:
        setattr(owner, name, _FLIPS[type(old)]())
    return ast.unparse(ast.fix_missing_locations(tree))


def _parsed(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "\\w" in a solution of the dataset's
        warnings.simplefilter("ignore", DeprecationWarning)  # the same, before Python 3.12
        return ast.parse(source)


def _sites(tree: ast.Module) -> Iterator[tuple[Any, str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from ((node, "ops", index) for index, op in enumerate(node.ops) if type(op) in _FLIPS)
        elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _FLIPS:
            yield node, "op", 0
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, "value", 0


def beside(task: Task, mutant: str) -> Job:
    """A job that reports for every input whether the mutant gives what the reference gives."""
    source = _BESIDE.format(entry_point=task.entry_point, right=task.reference, other=mutant)
    calls = tuple(Call(function="same", args=parse_arguments(text)) for text in task.hidden_tests)
    return Job(uid=task.uid, source=source, calls=calls, limits=LIMITS)


@dataclass(frozen=True, kw_only=True)
class MutantCount:
    """The mutants of a benchmark by how they were judged."""

    mutants: int = 0
    differing: int = 0
    """They differ from the reference on an input of theirs, or do not end in time."""
    passed_though_differing: int = 0
    failed_though_same: int = 0
    inputs: int = 0
    disagreements: int = 0
    """Inputs on which the judge and the comparison beside the reference do not say the same."""

    def __add__(self, other: MutantCount) -> MutantCount:
        return MutantCount(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def compare(task: Task, judgement: Judgement, run: Execution) -> MutantCount:
    """Hold a verdict against what was found beside the reference. Only for tasks without tolerance."""
    same = [reply.value is True for reply in run.results]
    differs = not (all(same) and len(same) == len(task.hidden_tests))
    passes = judgement.summary == "pass"
    both = min(len(same), judgement.total if judgement.outcome == "ok" else 0)
    return MutantCount(
        mutants=1,
        differing=differs,
        passed_though_differing=passes and differs,
        failed_though_same=not passes and not differs,
        inputs=both,
        disagreements=sum(left != right for left, right in zip(same[:both], judgement.per_test[:both], strict=True)),
    )


def judge_canonical(judge: Judge, tasks: Sequence[Task]) -> list[Judgement]:
    """The judgement of every reference on its own task."""
    judgements: list[Judgement] = []
    for start in range(0, len(tasks), _BATCH):
        batch = tasks[start : start + _BATCH]
        judgements += judge.judge_programs(batch, [task.reference for task in batch])
    return judgements


def judge_mutants(executor: Executor, tasks: Sequence[Task], *, count: int, num_inputs: int) -> MutantCount:
    """Judge mutants of exact tasks on their first inputs, and hold the verdicts against the truth."""
    judge = Judge(executor, replace(LIMITS, cpu_seconds=2))
    total = MutantCount()
    exact = [task for task in tasks if task.oracle == "equal" and task.atol == 0]
    for start in range(0, len(exact), _BATCH):
        pairs = [
            (replace(task, hidden_tests=task.hidden_tests[:num_inputs]), mutant)
            for task in exact[start : start + _BATCH]
            for mutant in mutants(task.reference, seed=task.uid, count=count)
        ]
        judgements = judge.judge_programs([task for task, _ in pairs], [mutant for _, mutant in pairs])
        runs = executor.run([beside(task, mutant) for task, mutant in pairs])
        for (task, _), judgement, run in zip(pairs, judgements, runs, strict=True):
            total += compare(task, judgement, run)
    return total


def main() -> None:
    """Judge everything and print a table. Ends with status 1 when a verdict is wrong."""
    parser = whole_help(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of EvalPlus")
    parser.add_argument("--mutants", type=int, default=2, help="mutants per problem; 0 is none")
    parser.add_argument("--inputs", type=int, default=50, help="inputs per mutant")
    parser.add_argument("--every", type=int, default=1, help="judge every n-th problem only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    given = parser.parse_args()
    rows = []
    with open_executor(num_workers=given.workers) as executor:
        for name, file in FILES.items():
            tasks = load_tasks(given.data / file)[:: given.every]
            start = time.monotonic()
            judgements = judge_canonical(Judge(executor, LIMITS), tasks)
            seconds = time.monotonic() - start
            for task, judgement in zip(tasks, judgements, strict=True):
                if judgement.summary != "pass":
                    print(f"{task.uid}: {judgement.summary}, {judgement.passed}/{judgement.total} {judgement.detail}")
            found = judge_mutants(executor, tasks, count=given.mutants, num_inputs=given.inputs)
            passed = sum(judgement.summary == "pass" for judgement in judgements)
            row = {
                "benchmark": name,
                "problems": len(tasks),
                "passed": passed,
                "inputs": sum(judgement.total for judgement in judgements),
                "inputs_passed": sum(judgement.passed for judgement in judgements),
                "cpu_seconds": round(sum(judgement.usage.cpu_seconds for judgement in judgements), 1),
                "wall_seconds": round(seconds, 1),
                **{f"mutants.{key}": value for key, value in vars(found).items()},
            }
            rows.append(row)
            print("\n".join(f"{key:40} {value}" for key, value in row.items()), end="\n\n", flush=True)
    if given.json:
        machine = f"{platform.processor() or platform.machine()}, {platform.python_version()}"
        write_report({"commit": commit(), "machine": machine, "rows": rows}, given.json, indent=2)
    if any(row["passed"] < row["problems"] or any(row[f"mutants.{key}"] for key in WRONG) for row in rows):
        sys.exit("a verdict is wrong: see above")


if __name__ == "__main__":
    main()
