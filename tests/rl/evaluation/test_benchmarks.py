"""Benchmarks: rows as problems, completions as programs, scores, and evaluations that are interrupted."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coupled.reward import Judge, plan
from coupled.rl.errors import CoupledError, DataError
from coupled.rl.evaluation.benchmarks import BENCHMARKS, Benchmark, data_file, find_benchmarks, load_problems
from coupled.rl.evaluation.benchmarks.programs import chat_program, continued_program
from coupled.rl.evaluation.benchmarks.run import LIMITS, Arm, EvaluationPlan, evaluate_benchmark, read_evaluation
from coupled.rl.evaluation.benchmarks.score import compare_rows, pass_at, passes_by_task, score_of
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import completion_length
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import Rollout
from coupled.sandbox import Executor, open_executor
from tests.conftest import build_tokenizer

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
if not SHARED.is_dir():
    SHARED = Path("/work/shared/data")
needs_data = pytest.mark.skipif(not (SHARED / "cruxeval").is_dir(), reason="the shared data are not on this machine")


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    opened = open_executor(num_workers=1)
    yield opened
    opened.close()


# --- programs -------------------------------------------------------------------------------------------------------

OPENING = 'from math import pi\n\ndef area(r):\n    """Area of a circle."""\n'


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Sure:\n```python\ndef area(r):\n    return 3\n```\nDone.", "def area(r):\n    return 3\n"),
        ("```\ndef area(r):\n    return 3\n```", "def area(r):\n    return 3\n"),
        # The first block that has the entry point, not the first block.
        ("```python\nhelp()\n```\n```python\narea = abs\n```", "area = abs\n"),
        ("```python\ndef area(r):\n    return 3", "def area(r):\n    return 3"),
        ("def area(r):\n    return 3", "def area(r):\n    return 3"),
        ("```python\n    return pi * r * r\n```", OPENING.rstrip() + "\n    return pi * r * r\n"),
        ("```bash\nls\n```\n```python\nx = 1\n```", "x = 1\n"),
        ("I do not know.", None),
    ],
    ids=["fenced", "no language", "second block", "unclosed", "no fence", "body", "without entry point", "prose"],
)
def test_the_program_of_a_chat_model(completion: str, expected: str | None) -> None:
    assert chat_program(completion, "area", OPENING) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("    return pi * r * r\n", "    return pi * r * r\n"),
        ("    return pi\n\nprint(area(1))\nx = 1\n", "    return pi\n\n"),
        ("    return pi\n\nassert area(1)\n", "    return pi\n\n"),
        (
            "    return half(r)\n\ndef half(r):\n    return r / 2\n",
            "    return half(r)\n\ndef half(r):\n    return r / 2\n",
        ),
        ("    return pi\n```\nThis is it.", "    return pi"),
        ("    return pi\n\ndef broken(", "    return pi\n"),
    ],
    ids=["body", "print", "assert", "helper", "fence", "cut off"],
)
def test_the_program_of_a_model_that_continues(completion: str, expected: str) -> None:
    assert continued_program(completion, "area", OPENING).rstrip() == (OPENING + expected).rstrip()


def test_a_continuation_that_is_no_program_stays_as_it_is() -> None:
    assert continued_program("    return (((", "area", "def area(r):\n") == "def area(r):\n    return ((("


# --- names and files ------------------------------------------------------------------------------------------------


def test_names_of_benchmarks_are_found_and_families_stand_for_theirs() -> None:
    assert [b.name for b in find_benchmarks("humaneval+, cruxeval")] == ["humaneval+", "cruxeval-i", "cruxeval-o"]


def test_an_unknown_benchmark_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"unknown benchmark 'humanevalplus'; did you mean 'humaneval\+'"):
        find_benchmarks("humanevalplus")
    with pytest.raises(DataError, match="at least one of"):
        find_benchmarks(" ,")


def test_missing_data_says_what_to_download_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"(?s)no data of mbpp\+.*MbppPlus\.jsonl\.gz \(Apache-2\.0\).*put it at .*--data"
    ):
        data_file(BENCHMARKS["mbpp+"], tmp_path)


def test_a_file_that_is_cut_off_or_of_something_else_is_said_so(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"task_id": "HumanEval/0"}\n')
    (tmp_path / "HumanEvalPlus.jsonl.gz").write_bytes(whole[:-6])
    with pytest.raises(DataError, match="download it again"):
        load_problems(BENCHMARKS["humaneval+"], tmp_path / "HumanEvalPlus.jsonl.gz")
    (tmp_path / "HumanEvalPlus.jsonl.gz").write_bytes(whole)
    with pytest.raises(DataError, match=r"row 0 .* is not a row of humaneval\+"):
        load_problems(BENCHMARKS["humaneval+"], tmp_path / "HumanEvalPlus.jsonl.gz")


def test_a_file_of_tasks_is_a_benchmark(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "hidden_tests": ["assert f(1) == 1"]}, {"prompt": "two", "hidden_tests": ["assert f(2)"]}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (mine,) = find_benchmarks(str(tmp_path / "mine.jsonl"))
    problems = load_problems(mine, data_file(mine, Path("elsewhere")))
    assert mine.name == "mine"
    assert [problem.question for problem in problems] == ["one", "two"]
    assert len({problem.task.uid for problem in problems}) == 2
    with pytest.raises(DataError, match=r"did you mean 'mine\.jsonl'"):
        find_benchmarks(str(tmp_path / "mime.jsonl"))


# --- the benchmarks themselves --------------------------------------------------------------------------------------

CRUX = {"id": "sample_0", "code": "def f(xs):\n    return [x + 1 for x in xs]", "input": "[1, 2]", "output": "[2, 3]"}


@pytest.mark.parametrize(
    ("benchmark", "completion", "passes"),
    [
        ("cruxeval-o", "```python\n[2, 3]\n```", True),
        ("cruxeval-o", "[2, 3]", True),
        ("cruxeval-o", "```python\nassert f([1, 2]) == [2, 3]\n```", True),
        ("cruxeval-o", "```python\n[2, 4]\n```", False),
        # Asking f itself is no prediction.
        ("cruxeval-o", "```python\nf([1, 2])\n```", False),
        ("cruxeval-i", "```python\nf([1, 2])\n```", True),
        ("cruxeval-i", "```python\nassert f(range(1, 3)) == [2, 3]\n```", True),
        ("cruxeval-i", "```python\nf([1, 1])\n```", False),
        # Nothing but one call of f counts.
        ("cruxeval-i", "```python\nf([]) or [2, 3]\n```", False),
        ("cruxeval-i", "```python\n[2, 3]\n```", False),
    ],
)
def test_cruxeval_judges_predictions_and_nothing_else(
    executor: Executor, benchmark: str, completion: str, passes: bool
) -> None:
    found = BENCHMARKS[benchmark]
    problem = found.problem(CRUX)
    program = found.program(problem, completion, "chat")
    (judgement,) = Judge(executor, LIMITS).judge_programs([problem.task], [program])
    assert (judgement.summary == "pass") is passes, judgement
    assert judgement.tier in ("T0", "")


@pytest.mark.parametrize(
    ("benchmark", "continuation", "program"),
    [
        ("cruxeval-o", "[2, 3]\n\nassert f([9]) == [10]", "def answer():\n    return ([2, 3])\n"),
        ("cruxeval-i", "[1, 2])\nassert x", f"{CRUX['code']}\n\ndef answer():\n    return (f([1, 2]))\n"),
    ],
)
def test_cruxeval_reads_what_a_model_without_a_template_wrote_on(
    benchmark: str, continuation: str, program: str
) -> None:
    found = BENCHMARKS[benchmark]
    problem = found.problem(CRUX)
    assert problem.opening.endswith(" == " if benchmark == "cruxeval-o" else "== f(")
    assert found.program(problem, continuation, "completion") == program


EDIT = {
    "full_name": "1_add",
    "before": "def add(a, b):\n    return a - b\n",
    "after": "def add(a, b):\n    return a + b\n",
    "tests": "assert add(1, 2) == 3\nassert add(0, 0) == 0\n",
    "instruction_descriptive": "Make add return the sum.",
    "instruction_lazy": "Fix add.",
}


def test_an_edit_is_judged_by_the_benchmarks_script(executor: Executor) -> None:
    lazy, descriptive = (BENCHMARKS[f"canitedit-{kind}"] for kind in ("lazy", "descriptive"))
    problem = lazy.problem(EDIT)
    assert "Fix add." in problem.question
    assert EDIT["before"] in problem.question
    assert "Make add return the sum." in descriptive.problem(EDIT).question
    good, bad = (lazy.program(problem, f"```python\n{EDIT[side]}```", "chat") for side in ("after", "before"))
    judgements = Judge(executor, LIMITS).judge_programs([problem.task] * 2, [good, bad])
    assert [judgement.summary for judgement in judgements] == ["pass", "fail"]


@needs_data
def test_every_cruxeval_reference_passes_and_no_prediction_of_none_does(executor: Executor) -> None:
    for name in ("cruxeval-i", "cruxeval-o"):
        problems = load_problems(BENCHMARKS[name], data_file(BENCHMARKS[name], SHARED))
        assert len(problems) == BENCHMARKS[name].num_problems
        assert {plan(problem.task).tier for problem in problems} == {"T0"}
        some = problems[::40]
        tasks = [problem.task for problem in some]
        judgements = Judge(executor, LIMITS).judge_programs(tasks, [task.reference for task in tasks])
        assert [judgement.summary for judgement in judgements] == ["pass"] * len(some)


@needs_data
@pytest.mark.parametrize("name", ["humaneval+", "mbpp+", "bigcodebench-hard", "bigcodebench-hard-instruct"])
def test_the_published_files_are_read_whole(name: str) -> None:
    benchmark = BENCHMARKS[name]
    problems = load_problems(benchmark, data_file(benchmark, SHARED))
    assert len(problems) == benchmark.num_problems
    assert all(problem.question and problem.opening.endswith("\n") for problem in problems)
    assert all(0 < p.num_base_tests <= len(p.task.hidden_tests) for p in problems) or not benchmark.base


# --- scores ---------------------------------------------------------------------------------------------------------


def row(task: str, sample: int, is_pass: bool, **others: Any) -> dict[str, Any]:
    values = {
        "uid": f"{task}/{sample}",
        "task": task,
        "is_pass": is_pass,
        "is_base_pass": True,
        "status": "ok",
        "outcome": "ok",
        "tier": "T0",
        "completion_length": 4,
        "generation_seconds": 0.5,
        "finish_reason": "end",
        "commit_step": [0, 1, 2, 3],
    }
    return values | others


def test_a_score_of_one_completion_each_has_wilsons_interval() -> None:
    rows = [row(f"t{i}", 0, i == 0) for i in range(10)]
    score = score_of(rows, [f"t{i}" for i in range(10)], name="x", base="y")
    assert score["scores"]["x"]["pass@1"]["mean"] == pytest.approx(0.1)
    assert score["scores"]["x"]["pass@1"]["high"] == pytest.approx(0.4042, abs=1e-4)
    assert score["scores"]["x"]["pass@1"]["interval"] == "wilson"
    assert score["scores"]["y"]["pass@1"]["mean"] == 1.0
    assert score["tokens_per_second"] == pytest.approx(8.0)
    assert score["arness"]["global@1"]["mean"] == 1.0
    assert score["arness"]["local@1"]["mean"] == pytest.approx(3 / 4)
    assert score["outcomes"] == {"fail": 9, "pass": 1}


def test_pass_at_k_is_unbiased_and_its_interval_is_over_problems() -> None:
    found = pass_at([[True, False, False, False], [False] * 4])
    assert found["pass@1"]["mean"] == pytest.approx(1 / 8)
    assert found["pass@2"]["mean"] == pytest.approx(1 / 4)
    assert found["pass@4"]["mean"] == pytest.approx(1 / 2)
    assert found["pass@4"]["interval"] == "bootstrap over problems"
    assert (found["pass@4"]["low"], found["pass@4"]["high"]) == (0.0, 1.0)


def test_what_the_sandbox_failed_on_is_no_failure_of_the_model() -> None:
    rows = [row("t", 0, True), row("t", 1, False, status="infra"), row("u", 0, False, status="infra")]
    assert passes_by_task(rows, ["t"]) == [[True]]
    with pytest.raises(CoupledError, match="1 problems have no judged completion, the first is u"):
        passes_by_task(rows, ["t", "u"])


def test_two_evaluations_are_compared_problem_by_problem() -> None:
    tasks = [f"t{i}" for i in range(8)]
    first = [row(task, 0, False) for task in tasks]
    second = [row(task, 0, task != "t0") for task in reversed(tasks)]
    found = compare_rows(first, second, tasks, name="x")["x"]
    assert (found.wins, found.losses, found.test) == (7, 0, "exact McNemar")
    assert found.p_value == pytest.approx(2 / 2**7)
    with pytest.raises(CoupledError, match="same problems"):
        compare_rows(first, second[1:], tasks, name="x")


# --- whole evaluations ----------------------------------------------------------------------------------------------


class Scripted:
    """An engine that answers from a list, and can be made to stop in the middle."""

    def __init__(self, answers: Callable[[Request], str]) -> None:
        self.answers = answers
        self.num_asked = 0
        self.stop_after: int | None = None

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        if self.stop_after is not None and self.num_asked >= self.stop_after:
            raise KeyboardInterrupt
        self.num_asked += len(requests)
        return [self._rollout(request, sampler) for request in requests]

    def _rollout(self, request: Request, sampler: Sampler) -> Rollout:
        import numpy as np

        step = np.arange(sampler.canvas, dtype=np.int32)
        zeros = np.zeros(sampler.canvas, dtype=np.float32)
        return Rollout(
            uid=request.uid,
            prompt_ids=request.prompt_ids,
            canvas_ids=np.ones(sampler.canvas, dtype=np.int64),
            completion_length=completion_length(np.ones(sampler.canvas, dtype=np.int64), (9,))[0],
            text=self.answers(request),
            finish_reason="length",
            commit_step=step,
            commit_logp=zeros,
            commit_entropy=zeros,
            num_forwards=4,
            weight_version=0,
            sampler_hash=sampler.hash,
        )

    def load_weights(self, policy: Policy, version: int) -> None:
        raise AssertionError("an evaluation loads no weights")

    def close(self) -> None:
        pass


def right_for_even(request: Request) -> str:
    _, number, sample = request.uid.split("/")
    shown = int(number) if (int(number) + int(sample)) % 2 == 0 else -1
    return f"```python\ndef f():\n    return {shown}\n```"


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    rows = [
        {"uid": f"q/{i}", "prompt": "ask " + "x" * i, "hidden_tests": [f"assert f() == {i}"], "entry_point": "f"}
        for i in range(5)
    ]
    (tmp_path / "five.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (found,) = find_benchmarks(str(tmp_path / "five.jsonl"))
    return found


def arm_of(engine: Scripted, **others: Any) -> Arm:
    values: dict[str, Any] = {"kind": "diffusion", "checkpoint": "c", "fingerprint": "1", "max_positions": None}
    return Arm(engine=engine, tokenizer=build_tokenizer(), **(values | others))


SETTINGS = EvaluationPlan(
    sampler=Sampler(canvas=4, denoising_steps=4, temperature=1.0), num_samples=2, prompting="completion", batch_size=3
)


def test_an_evaluation_leaves_everything_behind(benchmark: Benchmark, executor: Executor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    score = evaluate_benchmark(arm_of(Scripted(right_for_even)), benchmark, tmp_path, SETTINGS, executor, out)
    assert score["scores"]["five"]["pass@1"]["mean"] == pytest.approx(0.5)
    assert score["scores"]["five"]["pass@2"]["mean"] == 1.0
    assert score["num_problems"] == score["of_problems"] == 5
    found, rows, tasks = read_evaluation(out)
    assert found == json.loads(json.dumps(score))
    assert tasks == [f"q/{i}" for i in range(5)]
    assert len(rows) == 10
    assert all(each["program"].startswith("def f") and each["outcome"] == "ok" for each in rows)
    assert {each["is_pass"] for each in rows} == {True, False}
    settings = json.loads((out / "settings.json").read_text())
    assert settings["sampler"]["temperature"] == 1.0
    assert settings["seed"] == 0
    assert len(settings["data"]["sha256"]) == 64
    environment = json.loads((out / "environment.jsonl").read_text())
    assert environment["versions"]["torch"]
    prompts = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [each["prompt"] for each in prompts] == ["ask " + "x" * i for i in range(5)]


def test_an_interrupted_evaluation_continues_where_it_was(
    benchmark: Benchmark, executor: Executor, tmp_path: Path
) -> None:
    def go(engine: Scripted, folder: str) -> dict[str, Any]:
        return evaluate_benchmark(arm_of(engine), benchmark, tmp_path, SETTINGS, executor, tmp_path / folder)

    whole = go(Scripted(right_for_even), "whole")
    engine = Scripted(right_for_even)
    engine.stop_after = 6
    with pytest.raises(KeyboardInterrupt):
        go(engine, "parts")
    results = tmp_path / "parts" / "results.jsonl"
    assert len(results.read_text().splitlines()) == 6
    assert not (tmp_path / "parts" / "score.json").exists()
    # The last batch was cut off by a crash: a whole row of it and half of the next.
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:4]) + lines[4][:20])
    engine.stop_after, engine.num_asked = None, 0
    resumed = go(engine, "parts")
    assert engine.num_asked == 7, "the first batch of three is kept"
    untimed = ("generation_seconds", "cpu_seconds")
    one, two = (
        [{k: v for k, v in each.items() if k not in untimed} for each in read_evaluation(tmp_path / name)[1]]
        for name in ("whole", "parts")
    )
    assert one == two
    assert resumed["scores"] == whole["scores"]
    engine.num_asked = 0
    assert go(engine, "parts")["scores"] == whole["scores"]
    assert engine.num_asked == 0, "a finished evaluation is not done again"


def test_what_the_sandbox_failed_on_is_done_again_next_time(
    benchmark: Benchmark, executor: Executor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate_benchmark(arm_of(Scripted(right_for_even)), benchmark, tmp_path, SETTINGS, executor, out)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    rows[1]["status"] = "infra"
    (out / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    engine = Scripted(right_for_even)
    evaluate_benchmark(arm_of(engine), benchmark, tmp_path, SETTINGS, executor, out)
    assert engine.num_asked == 3
    assert {each["status"] for each in read_evaluation(out)[1]} == {"ok"}


@pytest.mark.parametrize(
    ("arm", "settings", "names"),
    [
        ({"fingerprint": "2"}, SETTINGS, "checkpoint"),
        ({}, replace(SETTINGS, seed=1), "seed"),
        ({}, replace(SETTINGS, sampler=SETTINGS.sampler.changed(temperature=0.5)), "sampler"),
    ],
)
def test_a_folder_of_another_evaluation_is_not_continued(
    benchmark: Benchmark, executor: Executor, tmp_path: Path, arm: dict[str, Any], settings: EvaluationPlan, names: str
) -> None:
    out = tmp_path / "out"
    evaluate_benchmark(arm_of(Scripted(right_for_even)), benchmark, tmp_path, SETTINGS, executor, out)
    with pytest.raises(DataError, match=f"different settings: {names} was .* Give another --out"):
        evaluate_benchmark(arm_of(Scripted(right_for_even), **arm), benchmark, tmp_path, settings, executor, out)


def test_a_prompt_for_which_the_model_has_no_room_counts_as_failed(
    benchmark: Benchmark, executor: Executor, tmp_path: Path
) -> None:
    """Prompts have 4 to 8 tokens; with a canvas of 4 only those of up to 6 fit."""
    arm = arm_of(Scripted(right_for_even), max_positions=10)
    score = evaluate_benchmark(arm, benchmark, tmp_path, SETTINGS, executor, tmp_path / "out")
    assert score["num_problems"] == 5
    assert score["scores"]["five"]["pass@1"]["mean"] == pytest.approx(0.3)
    assert score["outcomes"]["prompt_too_long"] == 4


@needs_data
def test_evalplus_gets_one_solution_per_completion_and_base_and_plus_are_told_apart(
    executor: Executor, tmp_path: Path
) -> None:
    """Each of two problems is answered with its reference once, and once with prose."""
    source = SHARED / "evalplus" / "HumanEvalPlus-Mini.jsonl.gz"
    if not source.is_file():
        pytest.skip("the shared data are not on this machine")
    (tmp_path / "HumanEvalPlus.jsonl.gz").write_bytes(source.read_bytes())
    benchmark = BENCHMARKS["humaneval+"]
    problems = {p.task.uid: p for p in load_problems(benchmark, tmp_path / "HumanEvalPlus.jsonl.gz")[:2]}

    def answer(request: Request) -> str:
        task, _, sample = request.uid.rpartition("/")
        reference = problems[task].task.reference
        return f"```python\n{reference}\n```" if sample == "0" else "I would rather not."

    settings = replace(SETTINGS, prompting="chat", limit=2)
    out = tmp_path / "out"
    score = evaluate_benchmark(arm_of(Scripted(answer)), benchmark, tmp_path, settings, executor, out)
    assert score["scores"]["humaneval+"]["pass@1"]["mean"] == pytest.approx(0.5)
    assert score["scores"]["humaneval"]["pass@1"]["mean"] == pytest.approx(0.5)
    assert (score["num_problems"], score["of_problems"]) == (2, 164)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["task_id"] for sample in samples] == ["HumanEval/0"] * 2 + ["HumanEval/1"] * 2
    assert "def has_close_elements" in samples[0]["solution"]
    assert samples[1]["solution"] == ""
