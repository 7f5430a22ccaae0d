"""Every completion with its verdict, one Parquet file per step, for looking at and for learning from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coupled.rl.parquet import write_parquet
from coupled.rl.types import Group, Rollout


def write_rollouts(run: Path, step: int, made: Sequence[Group] | Sequence[Rollout]) -> Path:
    """Write `rollouts/step_NNNNNN.parquet`, whole or not at all.

    Rollouts that no judge has seen go to `step_NNNNNN.unscored.parquet`.
    """
    groups = [item for item in made if isinstance(item, Group)]
    rows = [_row(r) | _verdict_row(g, i) for g in groups for i, r in enumerate(g.rollouts)]
    rows += [_row(item) for item in made if isinstance(item, Rollout)]
    folder = run / "rollouts"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:06d}{'' if groups else '.unscored'}.parquet"
    write_parquet(path, rows)
    return path


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
    }


def _verdict_row(group: Group, index: int) -> dict[str, object]:
    verdict = group.verdicts[index]
    return {
        "task": group.prompt.task.uid,
        "prompt": group.prompt.task.prompt,
        "score": verdict.score,
        "status": str(verdict.status),
        "outcome": verdict.outcome,
        "tier": verdict.tier,
        "passed": verdict.passed,
        "total": verdict.total,
        "rewards": [{"name": name, "value": value} for name, value in sorted(verdict.parts.items())],
    }
