"""Rollouts ahead of training: how far the policy has moved from them, under which weights, and when it is too far."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest
import torch
from helpers.engines import cluster_engine
from helpers.toys import MakePolicy, make_batch, make_recipe

from coupled.reward import Task
from coupled.rl.errors import RolloutError
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.judging.grader import Grader
from coupled.rl.model.policy import Policy
from coupled.rl.model.weights import digest_of, trainable_state
from coupled.rl.rollout.sampler import Request
from coupled.rl.rollout.workers import ClusterEngine
from coupled.rl.run import Run
from coupled.rl.run_folder.folder import RunFolder
from coupled.rl.types import Group, Prompt, Rollout


def toy_run(policy: Policy, folder: Path, **sections: object) -> Run:
    rollout = {"canvas": 6, "denoising_steps": 6, "num_prompts": 2, "group_size": 2, "workers": "process"}
    recipe = make_recipe(**({"rollout": rollout, "cluster": {"lag": 1, "max_policy_drift": 0.1}} | sections))
    tasks = [Task(uid=f"task-{n}", prompt="", hidden_tests=("assert f(1)",)) for n in range(2)]
    prompts = [Prompt(task=task, token_ids=(4, 5, 6)) for task in tasks]
    engine = cluster_engine(policy, folder, lag=1)
    return Run(recipe, policy, prompts, [], Grader.__new__(Grader), RunFolder(folder, keep=1), engine)


def test_policy_drift_is_the_k3_estimate_over_valid_tokens(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    run, batch = toy_run(tiny_policy(), tmp_path), make_batch((3,), (2,))
    old = torch.zeros((1, 6))
    present = torch.tensor([[0.0, log(2), 9.0, 9.0, 9.0, 9.0]])
    run._watch_policy_drift(old, present, batch)
    assert run._metrics.row()["cluster/policy_drift"] == pytest.approx((0 + 2 - 1 - log(2)) / 2, rel=1e-5)


def test_the_lag_falls_to_zero_after_two_steps_of_too_large_a_policy_drift_in_a_row(
    tiny_policy: MakePolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, batch = toy_run(tiny_policy(), tmp_path), make_batch((3,), (6,))
    near, far = torch.full((1, 6), 0.1), torch.full((1, 6), 2.0)
    for present, lag in ((far, 1), (near, 1), (far, 1), (far, 0)):
        run._watch_policy_drift(torch.zeros((1, 6)), present, batch)
        assert run._engine.lag == lag
    assert "rollouts run ahead no more (lag 0)" in " ".join(capsys.readouterr().out.split())


@torch.no_grad()
def test_old_is_scored_under_the_weights_that_rolled_out_and_the_policy_is_left_as_it_was(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, earlier = tiny_policy(seed=1), tiny_policy(seed=0)
    run, batch = toy_run(policy, tmp_path, loss={"kl_beta": 0.0}), make_batch()
    masks = draw_masks(batch, run.recipe.estimator, (0, "mask", 1, 0))
    monkeypatch.setattr(ClusterEngine, "state_of", lambda self, version: trainable_state(earlier))
    wanted = run.learner.scores(earlier, batch, masks)
    before = digest_of(trainable_state(policy))
    run._version, run._staleness = 3, 1
    for is_first in (True, False):
        old = run.anchor(batch, masks, is_first=is_first).old
        assert old is not None
        assert torch.equal(old, wanted)
    assert digest_of(trainable_state(policy)) == before
    assert not torch.equal(wanted, run.learner.scores(policy, batch, masks))
    run._staleness = 0
    assert run.anchor(batch, masks, is_first=True).old is None, "on-policy, the update's own scores serve"


def test_groups_whose_rollouts_could_not_be_made_are_left_out_and_said(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = toy_run(tiny_policy(), tmp_path)
    judged: list[tuple[str, ...]] = []

    def judge(self: Run, step: int, prompts: list[Prompt], made: list[Rollout], **_: object) -> list[Group]:
        judged.append(tuple(r.uid for r in made))
        raise KeyboardInterrupt  # what comes after is not looked at here

    monkeypatch.setattr(Run, "_judge", judge)
    requests: list[Request] = run._schedule.requests_of(1)
    made = {r.uid: r for r in run._engine.generate(requests, run.recipe.rollout.sampler, seed=0)}
    lost = requests[1].uid
    monkeypatch.setattr(ClusterEngine, "rollouts", lambda self, step: {u: r for u, r in made.items() if u != lost})
    with pytest.raises(KeyboardInterrupt):
        run.rollouts(1)
    assert judged == [tuple(r.uid for r in requests[2:])]
    assert f"no rollouts of {lost.split('-', 2)[2].rpartition('/')[0]}" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(ClusterEngine, "rollouts", lambda self, step: {requests[0].uid: made[requests[0].uid]})
    with pytest.raises(RolloutError, match="in step 1 no prompt has all of its completions"):
        run.rollouts(1)


def test_a_digest_names_names_shapes_and_values() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 1)}
    assert digest_of(one) == digest_of({"b": torch.zeros(2, 1), "a": torch.tensor([1.0, 2.0])})
    others = [one | {"a": torch.tensor([1.0, 2.5])}, one | {"b": torch.zeros(1, 2)}, {"a": one["a"], "c": one["b"]}]
    assert len({digest_of(state) for state in (one, *others)}) == 4
