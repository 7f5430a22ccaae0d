"""Our verdicts beside the verdicts of evalplus, program by program.

    python -m venv /tmp/ep && /tmp/ep/bin/pip install evalplus==0.3.1
    python benchmarks/verdicts/evalplus_agreement.py --data ../shared/data --evalplus /tmp/ep/bin/python --out /tmp/ag

Of every problem of HumanEval+ and MBPP+ three programs go through `coupled eval` itself, with an engine that recites
them: the canonical solution, a mutant of it (one operator, comparison or constant changed), and one that is wrong on
purpose. The `samples.jsonl` that it writes is given to `evalplus.evaluate` in a process of its own. Compared are, of
every program, base and base + plus. Writes docs/results/evalplus.{json,md}; an interrupted run continues.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python itself looks only into the folder that it is started with

import numpy as np
from harness.report import RESULTS, ROOT, environment, short_help, write_report
from harness.tables import table

from coupled.rl.evaluation.benchmarks import BENCHMARKS, Benchmark, Problem, data_file, load_problems
from coupled.rl.evaluation.benchmarks.run import Arm, EvaluationPlan, evaluate_benchmark, read_evaluation
from coupled.rl.model.loading import load_tokenizer
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.engine import HasWeights
from coupled.rl.rollout.sampler import Request
from coupled.rl.types import Rollout
from coupled.sandbox import open_executor
from verdicts.mutants import mutants

NAMES = {"humaneval+": ("humaneval", "HUMANEVAL_OVERRIDE_PATH"), "mbpp+": ("mbpp", "MBPP_OVERRIDE_PATH")}
KINDS = ("canonical", "mutant", "wrong")
WRONG = (
    "def {name}(*args):\n    return None\n",
    "def {name}(*args):\n    raise ValueError('no')\n",
    "def {name}(*args):\n    return args[0]\n",
    "def {name}(*args:\n    return 1\n",
    "import sys\nsys.exit(0)\n",
    "def another(*args):\n    return 1\n",
    "def {name}(*args):\n    return float('nan')\n",
    "class Same:\n    def __eq__(self, other):\n        return True\n\ndef {name}(*args):\n    return Same()\n",
)
"""Programs that fail; the last one forges equality."""
FORGED = "Its value says that it equals everything: evalplus compares in the program's process, we compare outside"
EXPLAINED = {
    "HumanEval/32": "evalplus 0.3.1 passes no program: its check of find_zero does not record that an input passed "
    "(mended after the release)",
}


class Reciter:
    """An engine that gives prepared completions."""

    def __init__(self, problems: list[Problem]) -> None:
        self._programs = {problem.task.uid: programs_of(problem, i) for i, problem in enumerate(problems)}

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int) -> list[Rollout]:
        return [self._rollout(request) for request in requests]

    def _rollout(self, request: Request) -> Rollout:
        task, _, sample = request.uid.rpartition("/")
        nothing = np.zeros(1, dtype=np.float32)
        return Rollout(
            uid=request.uid,
            prompt_ids=request.prompt_ids,
            canvas_ids=np.zeros(1, dtype=np.int64),
            completion_length=1,
            text=f"```python\n{self._programs[task][int(sample)]}\n```",
            finish_reason="end",
            commit_step=np.zeros(1, dtype=np.int32),
            commit_logp=nothing,
            commit_entropy=nothing,
            num_forwards=1,
            weight_version=0,
            sampler_hash="recited",
        )

    def load_weights(self, policy: HasWeights, version: int) -> None:
        """Nothing is computed."""

    def close(self) -> None:
        """Nothing is held."""


def programs_of(problem: Problem, index: int) -> tuple[str, ...]:
    """The canonical solution, a mutant (the solution again where it has nothing to change), and a wrong program."""
    task = problem.task
    (mutant,) = mutants(task.reference, seed=task.uid, count=1) or [task.reference]
    return task.reference, mutant, WRONG[index % len(WRONG)].format(name=task.entry_point)


def judge_here(benchmark: Benchmark, data: Path, out: Path, every: int, workers: int) -> Path:
    """Our verdicts; returns the folder of the evaluation."""
    file = data_file(benchmark, data)
    problems = load_problems(benchmark, file)[::every]
    folder = out / benchmark.name
    folder.mkdir(parents=True, exist_ok=True)
    # A file of exactly these problems, which evalplus reads as well: it refuses samples that leave any out.
    chosen = {problem.task.uid for problem in problems}
    subset = folder / Path(benchmark.files[1]).name.removesuffix(".gz")
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    subset.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["task_id"] in chosen))
    arm = Arm(
        engine=Reciter(problems),
        tokenizer=load_tokenizer(ROOT / "recipes" / "tiny" / "checkpoint"),
        kind="diffusion",
        checkpoint="recited",
        fingerprint="recited",
        max_positions=None,
    )
    settings = EvaluationPlan(
        sampler=Sampler(canvas=1, denoising_steps=1, temperature=1.0), num_samples=len(KINDS), batch_size=24
    )
    with closing(open_executor(num_workers=workers)) as executor:
        evaluate_benchmark(arm, benchmark, folder, settings, executor, folder / "ours", show=print)
    return folder


def judge_there(name: str, folder: Path, python: Path) -> dict[str, list[dict[str, Any]]]:
    """The verdicts of evalplus on the same samples: task → one entry per sample."""
    dataset, variable = NAMES[name]
    result = folder / "ours" / "samples_eval_results.json"
    if not result.is_file():
        subset = folder / Path(BENCHMARKS[name].files[1]).name.removesuffix(".gz")
        environment = {**os.environ, variable: str(subset), "XDG_CACHE_HOME": str(folder / "cache")}
        samples = str(folder / "ours" / "samples.jsonl")
        command = [str(python), "-m", "evalplus.evaluate", "--dataset", dataset, "--samples", samples]
        command += ["--parallel", "1", "--min-time-limit", "8", "--gt-time-limit-factor", "8"]
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    evaluated: dict[str, list[dict[str, Any]]] = json.loads(result.read_text())["eval"]
    return evaluated


def compare(name: str, folder: Path, theirs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Counts per kind of program, and every program on which the two do not say the same."""
    _, rows, tasks = read_evaluation(folder / "ours")
    ours = {(row["task"], row["sample"]): row for row in rows}
    counts = {kind: {"programs": 0, "passed_here": 0, "base_agree": 0, "plus_agree": 0} for kind in KINDS}
    differing = []
    for task in tasks:
        for sample, kind in enumerate(KINDS):
            mine, other = ours[task, sample], theirs[task][sample]
            base = other["base_status"] == "pass"
            plus = base and other["plus_status"] == "pass"
            count = counts[kind]
            count["programs"] += 1
            count["passed_here"] += mine["is_pass"]
            count["base_agree"] += mine["is_base_pass"] == base
            count["plus_agree"] += mine["is_pass"] == plus
            if (mine["is_base_pass"], mine["is_pass"]) != (base, plus):
                differing.append(
                    {
                        "task": task,
                        "kind": kind,
                        "here": [mine["is_base_pass"], mine["is_pass"], mine["outcome"], mine["first_failed"]],
                        "evalplus": [other["base_status"], other["plus_status"]],
                        "program": mine["program"],
                    }
                )
    return {"benchmark": name, "problems": len(tasks), "counts": counts, "differing": differing}


def page(report: dict[str, Any], notes: dict[str, str]) -> str:
    """docs/results/evalplus.md"""
    lines = [
        "# Our verdicts and the verdicts of evalplus",
        "",
        "Made by `benchmarks/verdicts/evalplus_agreement.py`: the canonical solution of every problem, a mutant of it, "
        "and a",
        "program that is wrong on purpose went through `coupled eval`, and the `samples.jsonl` that it wrote through",
        f"`evalplus.evaluate` {report['evalplus']}. It had 8 s and 8 times the reference per test, so that a busy",
        "machine decides nothing.",
        "",
        f"* command: `{report['command']}`",
        f"* commit: {report['commit']}; Python {report['python']}, {report['machine']}",
        "",
        *table(
            ("benchmark", "programs", "number", "pass here", "base verdicts agree", "base + plus verdicts agree"),
            [
                (row["benchmark"], kind, *(count[n] for n in ("programs", "passed_here", "base_agree", "plus_agree")))
                for row in report["benchmarks"]
                for kind, count in row["counts"].items()
            ],
        ),
    ]
    if report["every"] > 1:
        lines += ["", f"Only every {report['every']}th problem was taken; `--every 1` takes all."]
    lines += ["", "## Where they differ", ""]
    differing = [each for row in report["benchmarks"] for each in row["differing"]]
    for each in differing:
        base, plus, outcome, first = each["here"]
        here = f"base {'pass' if base else 'fail'}, plus {'pass' if plus else 'fail'} ({outcome}, first failed {first})"
        there = f"base {each['evalplus'][0]}, plus {each['evalplus'][1]}"
        lines.append(f"* {each['task']}, {each['kind']}: here {here}; evalplus {there}.")
        reason = FORGED if "__eq__" in (each["program"] or "") else notes.get(each["task"])
        if reason:
            lines[-1] += f" {reason}."
    if not differing:
        lines.append("Nowhere.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = short_help(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the benchmarks' files")
    parser.add_argument("--evalplus", type=Path, required=True, help="a Python that has evalplus")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--every", type=int, default=1, help="only every n-th problem")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--report", type=Path, default=RESULTS / "evalplus.json")
    given = parser.parse_args()
    version = "import importlib.metadata as m; print(m.version('evalplus'))"
    rows = []
    for name in given.names:
        started = time.monotonic()
        folder = judge_here(BENCHMARKS[name], given.data, given.out, given.every, given.workers)
        middle = time.monotonic()
        rows.append(compare(name, folder, judge_there(name, folder, given.evalplus)))
        rows[-1]["seconds"] = {"here": round(middle - started, 1), "evalplus": round(time.monotonic() - middle, 1)}
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "differing"}))
    found = subprocess.run([str(given.evalplus), "-c", version], capture_output=True, text=True, check=True)
    made = environment()
    report = {
        "evalplus": found.stdout.strip(),
        "command": made["command"],
        "every": given.every,
        "commit": made["commit"],
        "python": made["python"],
        "machine": platform.machine(),
        "benchmarks": rows,
    }
    write_report(report, given.report, lambda report: page(report, EXPLAINED))
    print(f"wrote {given.report} and .md")


if __name__ == "__main__":
    main()
