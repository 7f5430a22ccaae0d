"""Evaluates a checkpoint on a benchmark and writes everything that reproduces the result; resumable.

settings.json    inputs of the result: benchmark and its data's hash, checkpoint and its hash, sampler, seed, limits
environment.jsonl  versions, machine and command, one line per start
prompts.jsonl    prompts of the model, problem by problem
results.jsonl    every completion with its program and verdict; appended batch by batch
score.json       pass@k with intervals, made from results.jsonl alone
samples.jsonl    for EvalPlus benchmarks: input of `evalplus.evaluate --samples`
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from coupled.reward import Judge, Judgement, Status, UnsupportedTest, plan
from coupled.rl.data.prompts import render_prompt
from coupled.rl.errors import DataError
from coupled.rl.evaluation.benchmarks import Benchmark, Problem, Prompting, data_file, file_sha256, load_problems
from coupled.rl.evaluation.benchmarks.score import score_of
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.engine import RolloutEngine, request_chunks
from coupled.rl.rollout.sampler import Request
from coupled.rl.run_folder.folder import atomic_write, read_rows
from coupled.rl.types import Rollout
from coupled.sandbox import Executor, Limits
from coupled.sandbox.pool import require_runnable

LIMITS = Limits(cpu_seconds=10, wall_seconds=60.0, memory_mb=2048)
"""Limits of every program, generous so that a busy machine does not fail a correct program; for EvalPlus four times the
time of the reference is added."""
_PACKAGES = ("coupled", "torch", "transformers", "numpy", "safetensors")
_NUM_JUDGED = 3
"""Attempts at a program before a failure of the sandbox is recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """An engine with its tokenizer, and the identity of its checkpoint."""

    engine: RolloutEngine
    tokenizer: Any
    kind: str
    """`diffusion` or `autoregressive`."""
    checkpoint: str
    fingerprint: str
    """Hash of the checkpoint's files: equal files have equal fingerprints."""
    max_positions: int | None
    """Limit on the length of prompt and canvas together; None: unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """Settings of an evaluation. Example: 10 samples per problem at temperature 0.8, seed 0."""

    sampler: Sampler
    num_samples: int = 1
    seed: int = 0
    prompting: Prompting = "chat"
    batch_size: int = 32
    limit: int | None = None
    """Number of problems, from the first; None: all."""


def evaluate_benchmark(
    arm: Arm,
    benchmark: Benchmark,
    data: Path,
    settings: EvaluationPlan,
    executor: Executor,
    folder: Path,
    *,
    show: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run a benchmark into `folder`, or finish an interrupted evaluation there; returns `score.json`.

    Batches do not depend on interruptions, so a resumed evaluation gives the same result as an uninterrupted one.

    Raises:
        DataError: no data, or the folder holds an evaluation with different settings.
        SandboxUnavailable: the sandbox's tier cannot run the tests of this benchmark.
    """
    file = data_file(benchmark, data)
    problems, left_out = _judgeable(load_problems(benchmark, file)[: settings.limit], executor.isolation().tier)
    if not problems:
        raise DataError(f"no problem of {benchmark.name} can be judged: {next(iter(left_out.values()))}")
    for uid, reason in left_out.items():
        show(f"left out {uid}: {reason}")
    _open_folder(folder, _identity(arm, benchmark, file, settings, left_out), executor)
    prompts = _prompts(arm, problems, settings)
    _write_prompts(folder, problems, prompts, settings)
    by_task = {problem.task.uid: problem for problem in problems}
    requests = [
        Request(uid=f"{uid}/{sample}", prompt_ids=ids)
        for uid, ids in prompts.items()
        for sample in range(settings.num_samples)
    ]
    chunks = request_chunks(requests, settings.batch_size)
    rows = _finished(folder, chunks)
    judge = Judge(executor, LIMITS, allow_weak=benchmark.is_weak)
    with (folder / "results.jsonl").open("a") as out:
        for number, chunk in enumerate(chunks, 1):
            if chunk[0].uid in rows:
                continue
            made = _chunk_rows(arm, benchmark, by_task, chunk, settings, judge)
            out.write("".join(json.dumps(row) + "\n" for row in made))
            out.flush()
            rows |= {row["uid"]: row for row in made}
            passed = sum(row["is_pass"] for row in rows.values())
            show(f"{benchmark.name}: {len(rows)} of {len(requests)} completions, {passed} pass, batch {number}")
    ordered = [rows[request.uid] for request in requests]
    score = {
        "benchmark": benchmark.name,
        "of_problems": benchmark.num_problems or len(problems),
        "left_out": len(left_out),
        "arm": arm.kind,
        "checkpoint": arm.checkpoint,
        "num_samples": settings.num_samples,
        "temperature": settings.sampler.temperature,
        "denoising_steps": settings.sampler.denoising_steps,
        **score_of(ordered, list(by_task), name=benchmark.name, base=benchmark.base),
    }
    atomic_write(folder / "score.json", json.dumps(score, indent=1) + "\n")
    if benchmark.is_evalplus:
        samples = [{"task_id": row["task"], "solution": row["program"] or ""} for row in ordered]
        atomic_write(folder / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    return score


def read_evaluation(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """score.json, the last row of every completion, and the problems in order, of a finished evaluation.

    Raises:
        DataError: the folder holds no finished evaluation.
    """
    if not (folder / "score.json").is_file():
        raise DataError(f"{folder} holds no finished evaluation (score.json): run coupled eval with --out {folder}")
    rows = {row["uid"]: row for row in read_rows(folder / "results.jsonl")}
    tasks = [row["task"] for row in read_rows(folder / "prompts.jsonl")]
    score: dict[str, Any] = json.loads((folder / "score.json").read_text())
    return score, list(rows.values()), tasks


def fingerprint(checkpoint: Path) -> str:
    """Hash of a checkpoint folder's configuration, tokenizer and weights, in hexadecimal."""
    digests = [
        f"{file.name} {file_sha256(file)}"
        for file in sorted(checkpoint.iterdir())
        if file.suffix in (".json", ".safetensors", ".jinja", ".bin") and not file.name.startswith("state")
    ]
    return sha256("\n".join(digests).encode()).hexdigest()[:16]


def _judgeable(problems: Sequence[Problem], tier: str) -> tuple[list[Problem], dict[str, str]]:
    kept, left_out = [], {}
    for problem in problems:
        try:
            planned = plan(problem.task, allow_weak=True)
            # An EvalPlus plan needs its expected values to make a job; calls run in every tier.
            if planned.tier != "T0":
                require_runnable(planned.job("", LIMITS), tier)
            kept.append(problem)
        except UnsupportedTest as error:
            left_out[problem.task.uid] = str(error)
    return kept, left_out


def _prompts(arm: Arm, problems: Sequence[Problem], settings: EvaluationPlan) -> dict[str, tuple[int, ...]]:
    texts = [problem.prompt(settings.prompting) for problem in problems]
    if settings.prompting == "chat":
        texts = [render_prompt(text, arm.tokenizer) for text in texts]
    encoded = arm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {problem.task.uid: tuple(ids) for problem, ids in zip(problems, encoded, strict=True)}


def _write_prompts(
    folder: Path, problems: Sequence[Problem], prompts: dict[str, tuple[int, ...]], settings: EvaluationPlan
) -> None:
    rows = [
        {
            "task": problem.task.uid,
            "prompting": settings.prompting,
            "prompt": problem.prompt(settings.prompting),
            "num_tokens": len(prompts[problem.task.uid]),
        }
        for problem in problems
    ]
    atomic_write(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _finished(folder: Path, chunks: Sequence[Sequence[Request]]) -> dict[str, dict[str, Any]]:
    """Rows of the complete and judged batches. The others are repeated, so the file is rewritten without them."""
    path = folder / "results.jsonl"
    known = {row["uid"]: row for row in read_rows(path)} if path.is_file() else {}
    whole = [chunk for chunk in chunks if all(r.uid in known and known[r.uid]["status"] != Status.INFRA for r in chunk)]
    rows = {request.uid: known[request.uid] for chunk in whole for request in chunk}
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows.values()))
    return rows


def _chunk_rows(
    arm: Arm,
    benchmark: Benchmark,
    by_task: dict[str, Problem],
    chunk: Sequence[Request],
    settings: EvaluationPlan,
    judge: Judge,
) -> list[dict[str, Any]]:
    room = None if arm.max_positions is None else arm.max_positions - settings.sampler.canvas
    asked = [request for request in chunk if room is None or len(request.prompt_ids) <= room]
    started = time.perf_counter()
    made = {r.uid: r for r in arm.engine.generate(asked, settings.sampler, seed=settings.seed)} if asked else {}
    seconds = (time.perf_counter() - started) / max(1, len(asked))
    problems = [by_task[request.uid.rpartition("/")[0]] for request in chunk]
    programs = [
        benchmark.program(problem, made[request.uid].text, settings.prompting) if request.uid in made else None
        for request, problem in zip(chunk, problems, strict=True)
    ]
    judgements = _judge(judge, problems, programs)
    return [
        _row(request, problem, made.get(request.uid), program, judgement, seconds)
        for request, problem, program, judgement in zip(chunk, problems, programs, judgements, strict=True)
    ]


def _judge(judge: Judge, problems: Sequence[Problem], programs: Sequence[str | None]) -> list[Judgement]:
    tasks = [problem.task for problem in problems]
    judgements = judge.judge_programs(tasks, programs)
    for _ in range(_NUM_JUDGED - 1):
        failed = [i for i, judgement in enumerate(judgements) if judgement.status is Status.INFRA]
        if not failed:
            break
        again = judge.judge_programs([tasks[i] for i in failed], [programs[i] for i in failed])
        for index, judgement in zip(failed, again, strict=True):
            judgements[index] = judgement
    return judgements


def _row(
    request: Request,
    problem: Problem,
    rollout: Rollout | None,
    program: str | None,
    judgement: Judgement,
    seconds: float,
) -> dict[str, Any]:
    """One line of results.jsonl. A prompt that is too long for the model counts as a failed completion."""
    task, _, sample = request.uid.rpartition("/")
    per_test, length = judgement.per_test, 0 if rollout is None else rollout.completion_length
    base = per_test[: problem.num_base_tests]
    return {
        "uid": request.uid,
        "task": task,
        "sample": int(sample),
        "completion": "" if rollout is None else rollout.text,
        "program": program,
        "is_pass": bool(per_test) and all(per_test),
        "is_base_pass": bool(base) and all(base),
        "passed": judgement.passed,
        "total": judgement.total,
        "first_failed": next((i for i, passed in enumerate(per_test) if not passed), None),
        "status": str(judgement.status),
        "outcome": "prompt_too_long" if rollout is None else judgement.outcome,
        "tier": judgement.tier,
        "detail": judgement.detail[:300],
        "cpu_seconds": round(judgement.cpu_seconds, 4),
        "finish_reason": "none" if rollout is None else rollout.finish_reason,
        "completion_length": length,
        "num_forwards": 0 if rollout is None else rollout.num_forwards,
        "generation_seconds": 0.0 if rollout is None else round(seconds, 6),
        "commit_step": [] if rollout is None else rollout.commit_step[:length].tolist(),
    }


def _identity(
    arm: Arm, benchmark: Benchmark, file: Path, settings: EvaluationPlan, left_out: dict[str, str]
) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "data": {"file": file.name, "sha256": file_sha256(file), "source": benchmark.download},
        "arm": arm.kind,
        "checkpoint": {"path": arm.checkpoint, "fingerprint": arm.fingerprint},
        **asdict(settings),
        "sampler": settings.sampler.model_dump(),
        "limits": asdict(LIMITS),
        "left_out": sorted(left_out),
    }


def _open_folder(folder: Path, identity: dict[str, Any], executor: Executor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text())
        now = json.loads(json.dumps(identity))
        # The same weights may have been moved to another path.
        differing = [key for key in now if _without_path(before.get(key)) != _without_path(now[key])]
        if differing:
            raise DataError(
                f"{folder} holds an evaluation with different settings: {differing[0]} was {before.get(differing[0])} "
                f"and is {now[differing[0]]} now. Give another --out, or the same settings to continue it"
            )
    else:
        atomic_write(path, json.dumps(identity, indent=1) + "\n")
    with (folder / "environment.jsonl").open("a") as out:
        out.write(json.dumps(_environment(executor)) + "\n")


def _without_path(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "path"} if isinstance(value, dict) else value


def _environment(executor: Executor) -> dict[str, Any]:
    isolation = executor.isolation()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "sandbox": {"tier": isolation.tier, "filesystem": isolation.filesystem},
    }


def _commit() -> str | None:
    """The commit of the source tree; None when the package does not run from a git checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
