from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.report_runs import TESTS, make_group

from coupled.reward import Status, Task, Verdict
from coupled.rl.data.parquet import count_rows, read_chosen
from coupled.rl.run_folder.rollout_log import NUM_TESTS, TEST_LENGTH, rollout_files, write_rollouts
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


def test_the_verdict_on_every_test_is_written_and_long_tests_are_cut(tmp_path: Path) -> None:
    group = make_group(1, ["x", "y"], [1, None])
    rows = pq.read_table(write_rollouts(tmp_path, 1, [group])).to_pylist()
    assert [row["per_test"] for row in rows] == [[True, False], []]
    assert [row["tests"] for row in rows] == [list(TESTS)] * 2
    task = Task(uid="t", prompt="p", hidden_tests=("a" * 1000,) * (NUM_TESTS + 5))
    long = Group(prompt=Prompt(task=task, token_ids=(1,)), rollouts=group.rollouts, verdicts=group.verdicts)
    (row, _) = pq.read_table(write_rollouts(tmp_path, 2, [long])).to_pylist()
    assert row["tests"] == ["a" * (TEST_LENGTH - 1) + "…"] * NUM_TESTS


def test_rows_are_read_back_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coupled.rl.data.parquet.BATCH_ROWS", 3)
    path = write_rollouts(tmp_path, 7, [make_group(7, [f"text {i}" for i in range(8)], [2] * 8)])
    assert count_rows(path) == 8
    assert [row["completion"] for row in read_chosen(path, [7, 0, 3])] == ["text 0", "text 3", "text 7"]
    assert read_chosen(path, []) == []
    write_rollouts(tmp_path, 2, list(make_group(2, ["not judged"], [2]).rollouts))
    assert rollout_files(tmp_path) == {7: path}
