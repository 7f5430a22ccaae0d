from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coupled.reward import Status, Task, Verdict
from coupled.rl.rollout_log import write_rollouts
from coupled.rl.types import Group, Prompt, Rollout

pq = pytest.importorskip("pyarrow.parquet")


def test_a_rollout_is_written_with_its_verdict_and_who_compared(tmp_path: Path) -> None:
    rollout = Rollout(
        uid="u",
        prompt_ids=(1,),
        canvas_ids=np.array([2, 3]),
        completion_length=2,
        text="x",
        finish_reason="end",
        commit_step=np.zeros(2, dtype=np.int32),
        commit_logp=np.zeros(2, dtype=np.float32),
        commit_entropy=np.zeros(2, dtype=np.float32),
        num_forwards=1,
        weight_version=0,
        sampler_hash="h",
    )
    verdicts = tuple(
        Verdict(score=1.0, parts={"code": 1.0}, status=Status.OK, passed=1, total=1, outcome="ok", tier=tier)
        for tier in ("T0", "T2")
    )
    task = Task(uid="t", prompt="p", hidden_tests=())
    group = Group(prompt=Prompt(task=task, token_ids=(1,)), rollouts=(rollout, rollout), verdicts=verdicts)
    rows = pq.read_table(write_rollouts(tmp_path, 3, [group])).to_pylist()
    assert [(row["task"], row["score"], row["tier"]) for row in rows] == [("t", 1.0, "T0"), ("t", 1.0, "T2")]
