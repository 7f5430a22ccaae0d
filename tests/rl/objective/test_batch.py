from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.toys import MakePolicy

from coupled.reward import Status, Task, Verdict
from coupled.rl.errors import RolloutError
from coupled.rl.monitoring.metrics import StepMetrics
from coupled.rl.objective.advantage import filter_groups, group_advantages
from coupled.rl.objective.batch import collate, micro_batches, passes_of, refuse_identical_groups, rewards_of
from coupled.rl.types import Group, Prompt, Rollout


def rollout(uid: str, prompt_ids: tuple[int, ...], canvas: list[int], length: int, logp: float = 0.0) -> Rollout:
    size = len(canvas)
    return Rollout(
        uid=uid,
        prompt_ids=prompt_ids,
        canvas_ids=np.array(canvas),
        completion_length=length,
        text=uid,
        finish_reason="end" if length < size else "length",
        commit_step=np.zeros(size, dtype=np.int32),
        commit_logp=np.full(size, logp, dtype=np.float32),
        commit_entropy=np.ones(size, dtype=np.float32),
        num_forwards=3,
        weight_version=0,
        sampler_hash="x",
    )


def verdict(score: float | None, passed: int = 0) -> Verdict:
    status = Status.INFRA if score is None else Status.OK
    parts = {} if score is None else {"code": score}
    return Verdict(score=score, parts=parts, status=status, passed=passed, total=0 if score is None else 2)


def group(
    name: str, prompt_ids: tuple[int, ...], canvases: list[list[int]], scores: list[float | None], logp: float = 0.0
) -> Group:
    task = Task(uid=name, prompt="p", hidden_tests=("assert f(1) == 1",))
    made = [
        rollout(f"{name}/{i}", prompt_ids, c, c.index(1) + 1 if 1 in c else len(c), logp)
        for i, c in enumerate(canvases)
    ]
    return Group(
        prompt=Prompt(task=task, token_ids=prompt_ids),
        rollouts=tuple(made),
        verdicts=tuple(verdict(s, passed=2 if s == 1 else 0) for s in scores),
    )


LONG = group("long", (10, 11, 12), [[20, 21, 1, 2], [22, 23, 24, 25]], [0.0, 1.0])
SHORT = group("short", (13,), [[26, 1, 2, 2], [27, 28, 1, 0]], [3.0, None])


def test_groups_become_one_left_padded_batch_ordered_by_prompt_length(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    rewards = rewards_of([LONG, SHORT])
    assert rewards[0].tolist() == [0.0, 1.0]
    assert rewards[1, 0] == 3.0
    assert rewards[1, 1].isnan()
    batch = collate([LONG, SHORT], torch.tensor([[-0.5, 0.5], [0.25, 0.0]]), policy)
    assert batch.uids == ("short/0", "short/1", "long/0", "long/1")
    assert batch.ids.tolist() == [
        [0, 0, 13, 26, 1, 2, 2],
        [0, 0, 13, 27, 28, 1, 0],
        [10, 11, 12, 20, 21, 1, 2],
        [10, 11, 12, 22, 23, 24, 25],
    ]
    assert batch.pad_lengths.tolist() == [2, 2, 0, 0]
    assert batch.valid.int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.advantages.tolist() == [0.25, 0.0, -0.5, 0.5]
    assert batch.is_scored.tolist() == [True, False, True, True]
    assert batch.canvas_length == 4
    assert len(batch) == 4


def test_rows_of_a_batch_stay_together(tiny_policy: MakePolicy) -> None:
    batch = collate([LONG, SHORT], torch.tensor([[-0.5, 0.5], [0.25, 0.0]]), tiny_policy())
    part = batch.rows(slice(1, 3))
    assert part.uids == ("short/1", "long/0")
    assert part.ids.tolist() == batch.ids.tolist()[1:3]
    assert part.advantages.tolist() == [0.0, -0.5]
    assert part.pad_lengths.tolist() == [2, 0]
    assert part.is_scored.tolist() == [False, True]


@pytest.mark.parametrize(
    ("num_rows", "size", "expected"),
    [
        (5, 2, [(0, 2), (2, 4), (4, 5)]),
        (4, 4, [(0, 4)]),
        (3, 10, [(0, 3)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
        (0, 4, []),
    ],
)
def test_micro_batches_cover_every_row_once(num_rows: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert [(s.start, s.stop) for s in micro_batches(num_rows, size)] == expected


def test_a_sampler_whose_completions_repeat_against_all_odds_is_refused() -> None:
    """Two groups of two: one completion of log-probability -10.4 each was drawn twice, which has odds of e^-20.8."""
    same = [[20, 21, 22, 1]] * 2
    unlikely = [group(name, (5,), same, [0.0, 0.0], logp=-2.6) for name in "ab"]
    with pytest.raises(RolloutError, match=r"each of 2 groups holds one completion 2 times over.* e\^21 .*ignores"):
        refuse_identical_groups(unlikely)
    refuse_identical_groups([*unlikely, LONG])
    refuse_identical_groups(unlikely[:1])
    refuse_identical_groups([group(name, (5,), same, [0.0, 0.0], logp=-2.4) for name in "ab"])
    refuse_identical_groups([group(name, (5,), same, [0.0, 0.0], logp=-0.01) for name in "abcdefgh"])


def test_metrics_are_those_of_the_batch() -> None:
    metrics = StepMetrics()
    forgeable = replace(LONG, verdicts=(replace(LONG.verdicts[0], tier="T2"), *LONG.verdicts[1:]))
    metrics.of_groups([forgeable, SHORT])
    metrics.of_advantages(group_advantages(rewards_of([LONG, SHORT]), "mean"))
    metrics.of_update(
        {"tokens": 10.0, "kl": 5.0, "ratio": 9.0, "clip_low": 1.0, "clip_high": 2.0, "loss": 0.5}, 0.3, 1e-3
    )
    metrics.of_update(
        {"tokens": 10.0, "kl": 7.0, "ratio": 11.0, "clip_low": 3.0, "clip_high": 0.0, "loss": 1.5}, 0.5, 1e-3
    )
    metrics.add_seconds("rollout", 2.0)
    metrics.add_seconds("update", 1.0)
    metrics.add_seconds("rollout", 1.0)
    row = metrics.row()
    expected = {
        "reward": 4 / 3,  # 0, 1 and 3; the fourth has no verdict
        "reward/code": 4 / 3,
        "unscored": 1.0,
        "weak_verdicts": 1 / 3,
        "completion_length": (3 + 4 + 2 + 3) / 4,
        "end_rate": 0.75,
        "entropy": 1.0,
        "num_forwards": 3.0,
        "group_diversity": 1.0,
        "zero_advantage_groups": 0.5,
        "loss": 1.0,
        "kl": 0.6,
        "ratio": 1.0,
        "clip_fraction_low": 0.2,
        "clip_fraction_high": 0.1,
        "grad_norm": 0.4,
        "learning_rate": 1e-3,
        "time/rollout_seconds": 3.0,
        "time/update_seconds": 1.0,
        "time/step_seconds": 4.0,
        "tokens_per_second": 3.0,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_entropy_length_and_end_rate_are_means_over_completions_of_different_lengths() -> None:
    """Positions after the end token do not count, and a long completion weighs as much as a short one."""
    made = [
        replace(r, commit_entropy=np.array(entropy, dtype=np.float32))
        for r, entropy in zip(
            (*LONG.rollouts, *SHORT.rollouts),
            ([1, 2, 3, 90], [1, 1, 1, 5], [4, 2, 90, 90], [0, 0, 3, 90]),
            strict=True,
        )
    ]
    groups = [
        replace(LONG, rollouts=tuple(made[:2])),
        replace(SHORT, rollouts=tuple(made[2:])),
    ]
    metrics = StepMetrics()
    metrics.of_groups(groups)
    row = metrics.row()
    assert row["entropy"] == pytest.approx((2.0 + 2.0 + 3.0 + 1.0) / 4)
    assert row["completion_length"] == (3 + 4 + 2 + 3) / 4
    assert row["end_rate"] == 3 / 4


def test_passes_are_read_from_the_tests_and_not_from_the_reward() -> None:
    """A completion without verdict has none; LONG has a pass (score 1), SHORT a high score without one."""
    assert passes_of([LONG]).tolist() == [[0.0, 1.0]]
    passes = passes_of([SHORT])
    assert passes[0, 0] == 0
    assert passes[0, 1].isnan()


def test_what_a_filter_drops_is_counted_and_the_rest_of_the_metrics_are_of_what_is_kept() -> None:
    easy = group("easy", (5,), [[20, 21, 1, 2], [22, 23, 24, 1]], [1.0, 1.0])
    hard = group("hard", (5,), [[20, 21, 1, 2], [22, 23, 24, 1]], [0.0, 0.0])
    groups = [easy, LONG, hard, hard]
    found = filter_groups(rewards_of(groups), passes_of(groups), "accuracy", (0.0, 1.0))
    kept = [g for g, is_kept in zip(groups, found.is_kept.tolist(), strict=True) if is_kept]
    assert kept == [LONG]
    metrics = StepMetrics()
    metrics.of_filter(found)
    metrics.of_advantages(group_advantages(rewards_of(groups), "mean"))
    row = metrics.row()
    assert row["dropped_groups"] == 3
    assert row["dropped_groups/too_easy"] == 1
    assert row["dropped_groups/too_hard"] == 2
    assert row["zero_advantage_groups"] == 3 / 4
