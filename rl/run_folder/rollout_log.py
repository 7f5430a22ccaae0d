"""Every completion with its verdict, one Parquet file per step, for reading and for further training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coupled.rl.data.parquet import write_parquet
from coupled.rl.types import Group, Rollout

NUM_TESTS = 100
"""Limit on the tests of a task that are written with their text; the verdict on each test is always written."""
TEST_LENGTH = 400
"""Characters of a test's text that are written: the inputs of some benchmarks are megabytes."""


def write_rollouts(run: Path, step: int, made: Sequence[Group] | Sequence[Rollout]) -> Path:
    """Write `rollouts/step_NNNNNN.parquet`, which appears complete or not at all.

    Rollouts without verdicts go to `step_NNNNNN.unscored.parquet`.
    """
    groups = [item for item in made if isinstance(item, Group)]
    rows = [_row(r) | _verdict_row(g, i) for g in groups for i, r in enumerate(g.rollouts)]
    rows += [_row(item) for item in made if isinstance(item, Rollout)]
    folder = run / "rollouts"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:06d}{'' if groups else '.unscored'}.parquet"
    write_parquet(path, rows)
    return path


def rollout_files(run: Path) -> dict[int, Path]:
    """Step → the file of its scored rollouts, in order."""
    found = [p for p in (run / "rollouts").glob("step_*.parquet") if p.name.count(".") == 1]
    return dict(sorted((int(p.stem.removeprefix("step_")), p) for p in found))


def _row(rollout: Rollout) -> dict[str, object]:
    return {
        "uid": rollout.uid,
        "completion": rollout.text,
        "finish_reason": rollout.finish_reason,
        "completion_length": rollout.completion_length,
        "canvas_ids": rollout.canvas_ids.tolist(),
        "commit_step": rollout.commit_step.tolist(),
        "commit_logp": rollout.commit_logp.tolist(),
        "commit_entropy": rollout.commit_entropy.tolist(),
        "num_forwards": rollout.num_forwards,
        "weight_version": rollout.weight_version,
        "sampler_hash": rollout.sampler_hash,
        "kl_bound": rollout.kl_bound,
        "fill_bound": rollout.fill_bound,
    }


def _cut(text: str) -> str:
    return text if len(text) <= TEST_LENGTH else text[: TEST_LENGTH - 1] + "…"


def _verdict_row(group: Group, index: int) -> dict[str, object]:
    verdict = group.verdicts[index]
    return {
        "task": group.prompt.task.uid,
        "prompt": group.prompt.task.prompt,
        "score": verdict.score,
        "status": str(verdict.status),
        "outcome": verdict.outcome,
        "tier": verdict.tier,
        "detail": verdict.detail,
        "passed": verdict.passed,
        "total": verdict.total,
        "tests": [_cut(text) for text in group.prompt.task.hidden_tests[:NUM_TESTS]],
        "per_test": list(verdict.per_test),
        "rewards": [{"name": name, "value": value} for name, value in sorted(verdict.parts.items())],
    }
