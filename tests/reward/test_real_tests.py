"""Real tests and real solutions: HumanEval+, MBPP+, HumanEval. `benchmarks/verdicts/mutants.py` takes all."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from coupled.reward import Judge, Task, known_task, plan
from coupled.sandbox import LocalExecutor

ROOT = Path(__file__).parents[2]
SHARED = next((p for p in (ROOT / "../shared/data", Path("/work/shared/data")) if p.is_dir()), ROOT / "../shared/data")
DATA = SHARED / "evalplus"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the files of EvalPlus are not at {DATA}; see docs/data.md")


@pytest.fixture(scope="module")
def verdicts(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("verdicts/mutants")


def sample(verdicts: ModuleType, name: str, count: int) -> list[Task]:
    """`count` tasks of a benchmark, the same every time."""
    tasks = verdicts.load_tasks(DATA / verdicts.FILES[name])
    return random.Random(0).sample(tasks, count)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("HumanEval+", 6),
        ("MBPP+", 10),
        pytest.param("HumanEval+", 20, marks=pytest.mark.long),
        pytest.param("MBPP+", 30, marks=pytest.mark.long),
    ],
)
def test_canonical_solutions_pass_on_every_input(
    name: str, count: int, executor: LocalExecutor, verdicts: ModuleType
) -> None:
    tasks = [task for task in sample(verdicts, name, count) if len(task.hidden_tests) < 1200]
    judgements = verdicts.judge_canonical(Judge(executor, verdicts.LIMITS), tasks)
    bad = [(t.uid, j.summary, j.passed, j.total) for t, j in zip(tasks, judgements, strict=True) if j.summary != "pass"]
    assert bad == []


@pytest.mark.parametrize("uid", ["HumanEval/15", "HumanEval/32"])
def test_replies_of_many_megabytes_and_special_oracles_pass_too(
    uid: str, executor: LocalExecutor, verdicts: ModuleType
) -> None:
    (task,) = [t for t in verdicts.load_tasks(DATA / verdicts.FILES["HumanEval+"]) if t.uid == uid]
    (judgement,) = verdicts.judge_canonical(Judge(executor, verdicts.LIMITS), [task])
    assert (judgement.summary, judgement.passed) == ("pass", len(task.hidden_tests))


@pytest.mark.parametrize("name", ["HumanEval+", "MBPP+"])
def test_no_mutant_that_differs_on_an_input_passes(name: str, executor: LocalExecutor, verdicts: ModuleType) -> None:
    found = verdicts.judge_mutants(executor, sample(verdicts, name, 40), count=1, num_inputs=30)
    print(f"{name}: {found}")
    assert found.differing >= 10
    assert (found.passed_though_differing, found.failed_though_same, found.disagreements) == (0, 0, 0)


def test_every_program_of_humaneval_s_tests_is_judged_without_trust(
    executor: LocalExecutor, verdicts: ModuleType
) -> None:
    with gzip.open(SHARED / "humaneval/HumanEval.jsonl.gz", "rt") as lines:
        tasks = [task for task in map(known_task, map(json.loads, lines)) if task is not None]
    tiers = [plan(task).tier for task in tasks]
    print(f"HumanEval: {tiers.count('T0')} tasks at T0, {tiers.count('T1')} at T1")
    assert len(tasks) == 164
    assert set(tiers) == {"T0", "T1"}
    judgements = Judge(executor, replace(verdicts.LIMITS, wall_seconds=60.0)).judge_programs(
        tasks, [task.reference for task in tasks]
    )
    bad = [(t.uid, j.summary, j.detail) for t, j in zip(tasks, judgements, strict=True) if j.summary != "pass"]
    assert bad == []
    nothing = [f"def {task.entry_point}(*args): return None" for task in tasks]
    wrong = Judge(executor).judge_programs(tasks, nothing)
    assert [t.uid for t, j in zip(tasks, wrong, strict=True) if j.summary == "pass"] == []
