"""Run folders for the tests of reports: small, whole, and made without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coupled.reward import Status, Task, Verdict
from coupled.rl.evaluation.held_out import Evaluation, PassRates
from coupled.rl.recipe.read import dump_recipe
from coupled.rl.run_folder.rollout_log import write_rollouts
from coupled.rl.types import Group, Prompt, Rollout
from helpers.toys import make_likelihood_recipe, make_recipe

CANVAS = 6
FIRST_LETTER = 4
"""Id of the token `a` of the tiny tokenizer."""
HOSTILE = "</script><script>window.hacked = 1</script><!-- <img src=x onerror=alert(1)> & \u2028 é"
TESTS = ("assert f(1) == 1", "assert f(2) < 3")


def metrics_row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "reward": 0.5 + 0.1 * step,
        "reward/code": 0.2 * step,
        "reward/format": 1.0,
        "pass_rate": 0.1 * step,
        "kl": 0.01 * step,
        "clip_fraction_low": 0.0,
        "clip_fraction_high": 0.25,
        "group_diversity": 0.75,
        "time/rollout_seconds": 2.0,
        "time/update_seconds": 1.0,
        "time/step_seconds": 3.0,
        "tokens_per_second": 100.0,
    }


def make_rollout(step: int, place: int, text: str, commit_step: Sequence[int] = (2, 0, 1, 3, 4, 5)) -> Rollout:
    """Letters a, b, c, … of the tiny tokenizer; the last position is after the end token, which is the fifth."""
    ids = np.array([FIRST_LETTER + k for k in range(CANVAS)])
    ids[4] = 1
    return Rollout(
        uid=f"step-{step}/0-task/{place}",
        prompt_ids=(5,),
        canvas_ids=ids,
        completion_length=5,
        text=text,
        finish_reason="end" if place % 2 == 0 else "length",
        commit_step=np.array(commit_step, dtype=np.int32),
        commit_logp=np.log(np.linspace(0.5, 1.0, CANVAS)).astype(np.float32),
        commit_entropy=np.linspace(0.0, 1.0, CANVAS).astype(np.float32),
        num_forwards=6,
        weight_version=step - 1,
        sampler_hash="h",
    )


def make_verdict(num_passed: int | None) -> Verdict:
    """A verdict on two tests; `passed` None: the sandbox failed."""
    if num_passed is None:
        return Verdict(score=None, parts={}, status=Status.INFRA, outcome="sandbox_error")
    return Verdict(
        score=float(num_passed),
        parts={"code": num_passed / 2},
        status=Status.OK,
        passed=num_passed,
        total=2,
        per_test=(num_passed > 0, num_passed > 1),
        outcome="ok",
        tier="T0",
    )


def make_group(step: int, texts: Sequence[str], passed: Sequence[int | None]) -> Group:
    task = Task(uid=f"task-{step}", prompt=f"Write f. {HOSTILE}", hidden_tests=TESTS)
    return Group(
        prompt=Prompt(task=task, token_ids=(5,)),
        rollouts=tuple(make_rollout(step, place, text) for place, text in enumerate(texts)),
        verdicts=tuple(make_verdict(count) for count in passed),
    )


def make_evaluation(step: int, rates: Sequence[float], uids: Sequence[str] = ("a", "b", "c", "d")) -> Evaluation:
    sampled = PassRates(temperature=1.0, num_samples=2, uids=tuple(uids), rates=tuple(map(float, rates)))
    greedy = PassRates(temperature=0.0, num_samples=1, uids=tuple(uids), rates=tuple(float(r > 0.4) for r in rates))
    return Evaluation(step=step, sampled=sampled, greedy=greedy)


def write_run(
    folder: Path,
    *,
    num_steps: int = 3,
    tokenizer: Any = None,
    evaluations: Sequence[Evaluation] = (),
    rows: Sequence[Mapping[str, Any]] | None = None,
    texts: Sequence[str] = ("```python\ndef f(x): return x\n```", f"no code {HOSTILE}", "needle"),
    passed: Sequence[int | None] = (2, 1, None),
    **recipe: Any,
) -> Path:
    """A run folder of `num_steps` steps, with as many rollouts in each as there are texts."""
    folder.mkdir(parents=True)
    make = make_recipe if recipe.get("stage", "rl") == "rl" else make_likelihood_recipe
    (folder / "recipe.yaml").write_text(dump_recipe(make(num_steps=num_steps, **recipe)))
    written = rows if rows is not None else [metrics_row(step) for step in range(1, num_steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    if evaluations:
        text = "".join(json.dumps(evaluation.to_row()) + "\n" for evaluation in evaluations)
        (folder / "evaluation.jsonl").write_text(text)
    for step in range(1, num_steps + 1) if texts else ():
        write_rollouts(folder, step, [make_group(step, texts, passed)])
    if tokenizer is not None:
        checkpoint = folder / "checkpoints" / f"step_{num_steps:06d}"
        checkpoint.mkdir(parents=True)
        tokenizer.save_pretrained(checkpoint)
    return folder
