"""The reference that the KL pulls towards: frozen, moving, or the rollout policy; and resuming restores it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.toys import MakePolicy, make_batch, make_recipe

from coupled.rl.errors import CheckpointError
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.judging.grader import Grader
from coupled.rl.model.loading import add_adapter, load_policy
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import keep_reference, reference_kind
from coupled.rl.model.weights import save_policy, trainable_state
from coupled.rl.recipe.objective import Loss, Optimizer
from coupled.rl.rollout.engine import policy_engine
from coupled.rl.run import Run
from coupled.rl.run_folder.folder import RunFolder
from coupled.rl.trainer.checkpoint import REFERENCE, read_checkpoint, write_checkpoint
from coupled.rl.trainer.optimizer import make_optimizer
from coupled.rl.types import TrainBatch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ADAPTER = [False, True]
IDS = ["full", "lora"]
MOVING = {"kl_beta": 0.1, "reference": "synced", "sync_every": 2, "sync_mix": 0.6}


def with_adapter(policy: Policy) -> Policy:
    return add_adapter(policy, rank=2, alpha=4.0, targets=("q_proj", "v_proj"), seed=0)


def make(tiny_policy: MakePolicy, is_adapted: bool) -> Policy:
    return with_adapter(tiny_policy()) if is_adapted else tiny_policy()


@torch.no_grad()
def perturb(policy: Policy, seed: int) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters():
        parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.1)
    return {name: tensor.clone() for name, tensor in trainable_state(policy).items()}


@torch.no_grad()
def logp(policy: Policy, batch: TrainBatch) -> torch.Tensor:
    rows = torch.zeros_like(batch.ids, dtype=torch.bool)
    rows[:, -batch.canvas_length :] = True
    return policy.logp_at(batch.ids.masked_fill(rows, policy.mask_id), batch.pad_lengths, rows, batch.ids)


@pytest.mark.parametrize("is_adapted", ADAPTER, ids=IDS)
def test_a_moving_reference_follows_by_the_share_that_is_asked_for(tiny_policy: MakePolicy, is_adapted: bool) -> None:
    policy = make(tiny_policy, is_adapted)
    start = {name: tensor.clone() for name, tensor in trainable_state(policy).items()}
    reference = keep_reference(policy, "moving")
    one = perturb(policy, 1)
    reference.mix(0.6)
    two = perturb(policy, 2)
    reference.mix(0.25)
    found = reference.state()
    assert found.keys() == start.keys()
    for name, tensor in found.items():
        by_hand = 0.25 * two[name] + 0.75 * (0.6 * one[name] + 0.4 * start[name])
        torch.testing.assert_close(tensor, by_hand, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(trainable_state(policy)[name], two[name]) for name in two), "the policy stays as it is"


@pytest.mark.parametrize("is_adapted", ADAPTER, ids=IDS)
def test_a_reference_mixed_in_whole_scores_as_the_policy_and_stays_behind_when_it_moves_on(
    tiny_policy: MakePolicy, is_adapted: bool
) -> None:
    policy, batch = make(tiny_policy, is_adapted), make_batch()
    before = logp(policy, batch)
    reference = keep_reference(policy, "moving")
    perturb(policy, 1)
    there = logp(policy, batch)
    with reference.policy() as frozen:
        assert torch.equal(logp(frozen, batch), before)
    reference.mix(1.0)
    perturb(policy, 2)
    with reference.policy() as frozen:
        assert torch.equal(logp(frozen, batch), there)
        assert frozen.trainable_parameters() == []
    assert not torch.allclose(logp(policy, batch), there, atol=1e-2)
    assert not torch.allclose(before, there, atol=1e-2)


def test_the_copy_of_an_adapted_policy_shares_the_base_weights(tiny_policy: MakePolicy) -> None:
    policy = with_adapter(tiny_policy())
    reference = keep_reference(policy, "moving")
    assert reference.model is not None
    copies = dict(reference.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        assert (copies[name] is parameter) == (not parameter.requires_grad), name
    assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == set(reference.state())


def test_a_reference_that_was_not_made_to_move_cannot(tiny_policy: MakePolicy) -> None:
    policy = with_adapter(tiny_policy())
    reference = keep_reference(policy, "adapter_off")
    with pytest.raises(RuntimeError, match="'adapter_off' has no copy that could move"):
        reference.mix(0.5)


def test_a_policy_without_adapters_has_none_to_turn_off(tiny_policy: MakePolicy) -> None:
    with pytest.raises(RuntimeError, match="needs a policy with adapters"):
        keep_reference(tiny_policy(), "adapter_off")


@pytest.mark.parametrize(
    ("loss", "has_adapter", "kind"),
    [
        ({"kl_beta": 0.0}, False, "none"),
        ({"kl_beta": 0.0, "reference": "synced"}, True, "none"),
        ({"kl_beta": 0.1, "reference": "old"}, False, "none"),
        ({"kl_beta": 0.1}, False, "frozen"),
        ({"kl_beta": 0.1}, True, "adapter_off"),
        ({"kl_beta": 0.1, "reference": "synced"}, False, "moving"),
        ({"kl_beta": 0.1, "reference": "synced"}, True, "moving"),
    ],
)
def test_the_loss_and_the_adapters_decide_the_kind(loss: dict[str, object], has_adapter: bool, kind: str) -> None:
    assert reference_kind(Loss.model_validate(loss), has_adapter=has_adapter) == kind


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_adapted", ADAPTER, ids=IDS)
def test_a_checkpoint_brings_the_moving_reference_back_bit_for_bit(
    tiny_policy: MakePolicy, tmp_path: Path, is_adapted: bool
) -> None:
    save_policy(tiny_policy(), tmp_path / "base")

    def opened() -> Policy:
        policy = load_policy(tmp_path / "base")
        return with_adapter(policy) if is_adapted else policy

    policy, folder, batch = opened(), tmp_path / "checkpoint", make_batch()
    reference = keep_reference(policy, "moving")
    perturb(policy, 1)
    reference.mix(0.6)
    perturb(policy, 2)
    folder.mkdir()
    write_checkpoint(folder, policy, reference, make_optimizer(policy, Optimizer()), {"step": 3})

    again = opened()
    resumed = keep_reference(again, "moving")
    state = read_checkpoint(folder, again, resumed, make_optimizer(again, Optimizer()))
    assert state == {"step": 3}
    assert torch.equal(logp(again, batch), logp(policy, batch))
    with resumed.policy() as found, reference.policy() as expected:
        assert torch.equal(logp(found, batch), logp(expected, batch))
    resumed.mix(0.6)
    reference.mix(0.6)
    mine, theirs = resumed.state(), reference.state()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert load_policy(folder).family.shift == 1, "the folder still opens as a policy"

    (folder / REFERENCE).unlink()
    with pytest.raises(CheckpointError, match=r"lacks reference\.pt"):
        read_checkpoint(folder, again, resumed, make_optimizer(again, Optimizer()))
    fixed = opened()
    read_checkpoint(folder, fixed, keep_reference(fixed, "frozen"), make_optimizer(fixed, Optimizer()))


def test_the_reference_of_another_model_is_refused(tiny_policy: MakePolicy) -> None:
    policy, adapted = tiny_policy(), with_adapter(tiny_policy())
    mine, other = keep_reference(policy, "moving"), keep_reference(adapted, "moving")
    with pytest.raises(CheckpointError, match=r"the saved reference .* is not of this model"):
        mine.load_state(other.state())


# --- in a run -------------------------------------------------------------------------------------------------------


def toy_run(policy: Policy, folder: Path, **loss: object) -> Run:
    recipe = make_recipe(loss=loss, optimizer={"learning_rate": 1e-2, "final_fraction": 1.0}, num_steps=4)
    return Run(recipe, policy, [], [], Grader.__new__(Grader), RunFolder(folder, keep=1), policy_engine(policy, 4))


def step_of(run: Run, step: int, num_updates: int = 2) -> None:
    batch = make_batch(seed=step)
    draws = [draw_masks(batch, run.recipe.estimator, (0, "mask", step, inner)) for inner in range(num_updates)]
    anchors = [run.anchor(batch, masks, is_first=inner == 0) for inner, masks in enumerate(draws)]
    for masks, anchor in zip(draws, anchors, strict=True):
        run.update(step, batch, masks, anchor)
    run.sync_reference(step)


def test_a_synced_reference_moves_at_the_steps_that_are_due(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    policy = tiny_policy()
    run = toy_run(policy, tmp_path, **MOVING)
    start = {n: t.clone() for n, t in run.learner.reference.state().items()}
    step_of(run, 1)
    assert all(torch.equal(t, start[n]) for n, t in run.learner.reference.state().items())
    step_of(run, 2)
    live = trainable_state(policy)
    for name, tensor in run.learner.reference.state().items():
        torch.testing.assert_close(tensor, 0.6 * live[name] + 0.4 * start[name], atol=1e-6, rtol=1e-5)


def test_a_frozen_reference_stays_and_one_that_is_not_needed_is_not_copied(
    tiny_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = tiny_policy()
    run = toy_run(policy, tmp_path, kl_beta=0.1)
    start = {n: t.clone() for n, t in trainable_state(policy).items()}
    for step in (1, 2):
        step_of(run, step)
    assert all(torch.equal(t, start[n]) for n, t in run.learner.reference.state().items())
    for loss in ({"kl_beta": 0.0}, {"kl_beta": 0.1, "reference": "old"}):
        policy = tiny_policy()
        run = toy_run(policy, tmp_path, **loss)
        assert (run.learner.reference.kind, run.learner.reference.model) == ("none", None)


def test_a_reference_that_is_the_old_policy_has_no_kl_at_first_and_that_to_old_afterwards(
    tiny_policy: MakePolicy, tmp_path: Path
) -> None:
    policy, batch = tiny_policy(), make_batch()
    run = toy_run(policy, tmp_path, kl_beta=0.1, reference="old")
    masks = draw_masks(batch, run.recipe.estimator, (0, "mask", 1, 0))
    first, later = (run.anchor(batch, masks, is_first=is_first) for is_first in (True, False))
    assert first.reference is None
    assert later.reference is None
    run.update(1, batch, masks, first)
    assert run._metrics.row()["kl"] == 0
    run._metrics = type(run._metrics)()
    with torch.no_grad():
        r = later.old - run.learner.scores(policy, batch, masks)
    run.update(1, batch, masks, later)
    expected = float(((r.exp() - r - 1) * batch.valid).sum() / batch.valid.sum())
    assert run._metrics.row()["kl"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-4


@pytest.mark.parametrize("is_adapted", ADAPTER, ids=IDS)
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_resumed_with_a_moving_reference_ends_in_the_same_weights(
    tiny_policy: MakePolicy, tmp_path: Path, is_adapted: bool, stop_after: int
) -> None:
    save_policy(tiny_policy(), tmp_path / "base")

    def opened() -> Policy:
        policy = load_policy(tmp_path / "base")
        return with_adapter(policy) if is_adapted else policy

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    uninterrupted = toy_run(opened(), whole, **MOVING)
    for step in (1, 2, 3, 4):
        step_of(uninterrupted, step)
    run = toy_run(opened(), killed, **MOVING)
    for step in range(1, stop_after + 1):
        step_of(run, step)
        run.commit_if_due(step)
    resumed = toy_run(opened(), killed, **MOVING)
    for step in range(stop_after + 1, 5):
        step_of(resumed, step)
    for one, other in (
        (trainable_state(resumed.policy), trainable_state(uninterrupted.policy)),
        (resumed.learner.reference.state(), uninterrupted.learner.reference.state()),
    ):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert resumed._metrics.row()["kl"] > 0
