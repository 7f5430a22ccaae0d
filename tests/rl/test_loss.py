from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import MakePolicy, make_batch, make_recipe

from coupled.rl import run as run_module
from coupled.rl.batch import micro_batches
from coupled.rl.engine import InlineEngine
from coupled.rl.grading import Grader
from coupled.rl.logprob import estimate_logp
from coupled.rl.loss import coupled_grpo_loss, kl_k3
from coupled.rl.masking import draw_masks
from coupled.rl.metrics import add_sums
from coupled.rl.policy import Policy
from coupled.rl.recipe import Estimator, Loss, Recipe
from coupled.rl.run import Run
from coupled.rl.rundir import RunDir
from coupled.rl.types import Anchor, TrainBatch

LN2, LN04 = 0.6931472, -0.9162907
KEY = (0, "mask", 1, 0)

# Two rows of three tokens, the last of row 1 not valid. Ratios 2, 1, 0.4 and 2, 0.4, (7).
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.5, -0.7]])
NEW = OLD + torch.tensor([[LN2, 0.0, LN04], [LN2, LN04, 1.9459101]])
# s_ref - s: ln 2, 0, -ln 2 and ln 2, 0, (3).
REFERENCE = NEW + torch.tensor([[LN2, 0.0, -LN2], [LN2, 0.0, 3.0]])
ADVANTAGES = torch.tensor([1.0, -2.0])
VALID = torch.tensor([[True, True, True], [True, True, False]])


def test_the_clipped_loss_matches_the_hand_computation() -> None:
    """Row 0: min(2, 1.5), 1, min(.4, .5) = 2.9. Row 1: min(-4, -3), min(-.8, -1) = -5. (-2.9 + 5) / 5 = 0.42."""
    output = coupled_grpo_loss(NEW, OLD, None, ADVANTAGES, VALID, 5, Loss(clip_low=0.5, clip_high=0.5))
    assert float(output.loss) == pytest.approx(0.42, abs=1e-6)
    assert output.sums == pytest.approx(
        {"tokens": 5.0, "ratio": 5.8, "clip_low": 1.0, "clip_high": 1.0, "kl": 0.0, "loss": 0.42}, abs=1e-5
    )


def test_the_penalised_loss_matches_the_hand_computation() -> None:
    """k3(ln 2) = 2 - ln 2 - 1 = .3068528 twice, k3(-ln 2) = .5 + ln 2 - 1 = .1931472, k3(0) = 0 twice: .8068528."""
    output = coupled_grpo_loss(NEW, OLD, REFERENCE, ADVANTAGES, VALID, 5, Loss(kl_beta=0.1))
    assert output.sums["kl"] == pytest.approx(0.8068528, abs=1e-5)
    assert float(output.loss) == pytest.approx(0.42 + 0.1 * 0.8068528 / 5, abs=1e-6)


@pytest.mark.parametrize(("weight", "loss"), [(1.0, 0.42), (0.3, (-2.9 + 1.5) / 5), (0.0, -2.9 / 5)])
def test_the_negative_weight_scales_what_is_said_against_completions_and_not_the_penalty(
    weight: float, loss: float
) -> None:
    """Row 0 (A = 1) gives 2.9, row 1 (A = -2) gives -5 times the weight; the KL terms sum to .8068528 as before."""
    config = Loss(kl_beta=0.1, negative_weight=weight)
    output = coupled_grpo_loss(NEW, OLD, REFERENCE, ADVANTAGES, VALID, 5, config)
    assert float(output.loss) == pytest.approx(loss + 0.1 * 0.8068528 / 5, abs=1e-6)


@pytest.mark.parametrize(
    ("clip_low", "clip_high", "loss", "low", "high"),
    [
        # Row 0: 2 + 1 + .4 = 3.4; row 1: -4 + min(-.8, -.6) = -4.8.
        (0.7, 1.5, (-3.4 + 4.8) / 5, 0.0, 0.0),
        # Row 0: 1 + 1 + .4 = 2.4; row 1: -4 - 2 = -6.
        (0.0, 0.0, (-2.4 + 6.0) / 5, 1.0, 1.0),
        # Row 0: 1.2 + 1 + .4 = 2.6; row 1: -4 + min(-.8, -1.8) = -5.8.
        (0.1, 0.2, (-2.6 + 5.8) / 5, 1.0, 1.0),
        # Only the upper bound is tight.
        (0.9, 0.2, (-2.6 + 4.8) / 5, 0.0, 1.0),
    ],
)
def test_the_two_clip_bounds_are_separate(
    clip_low: float, clip_high: float, loss: float, low: float, high: float
) -> None:
    output = coupled_grpo_loss(NEW, OLD, None, ADVANTAGES, VALID, 5, Loss(clip_low=clip_low, clip_high=clip_high))
    assert float(output.loss) == pytest.approx(loss, abs=1e-6)
    assert (output.sums["clip_low"], output.sums["clip_high"]) == (low, high)


def test_a_clipped_token_has_no_gradient_and_the_pessimistic_side_keeps_it() -> None:
    new = NEW.clone().requires_grad_()
    coupled_grpo_loss(new, OLD, None, ADVANTAGES, VALID, 5, Loss()).loss.backward()
    # d/ds of -ρA/5 is -ρA/5: -(1)(1)/5 and -(.4)(1)/5; in row 1, -(2)(-2)/5.
    expected = torch.tensor([[0.0, -0.2, -0.08], [0.8, 0.0, 0.0]])
    torch.testing.assert_close(new.grad, expected, atol=1e-6, rtol=0)


def test_log_ratios_are_clamped_before_they_are_exponentiated() -> None:
    new, zero, valid = torch.tensor([[10.0, -10.0]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    output = coupled_grpo_loss(new, zero, None, torch.tensor([-1.0]), valid, 1, Loss(max_log_ratio=5.0))
    # e^5 = 148.41316 on the pessimistic side; 0.5 where the ratio e^-5 = 0.0067379 is clipped.
    assert float(output.loss) == pytest.approx(148.41316 + 0.5, abs=1e-3)
    assert output.sums["ratio"] == pytest.approx(148.41316 + 0.0067379, abs=1e-3)
    # k3(5) = e^5 - 6; k3(-5) = e^-5 + 4.
    kl = kl_k3(new, zero, 5.0)
    assert kl.tolist() == [pytest.approx([4.0067379, 142.41316], abs=1e-3)]


def test_k3_matches_the_hand_computation_and_is_never_negative() -> None:
    reference = torch.tensor([[LN2, 0.0, -LN2, 1.0]])
    expected = [0.3068528, 0.0, 0.1931472, 0.7182818]
    assert kl_k3(torch.zeros(1, 4), reference, 5.0)[0].tolist() == pytest.approx(expected, abs=1e-6)
    many = torch.randn((1, 1000), generator=torch.Generator().manual_seed(0)) * 3
    assert kl_k3(torch.zeros(1, 1000), many, 5.0).min() >= 0


def test_a_batch_and_its_transpose_are_not_confused() -> None:
    """Shapes are checked, so the [B, B, L] broadcast that made a peer's KL B times too large cannot pass."""
    with pytest.raises(Exception, match="Type-check error"):
        coupled_grpo_loss(NEW, OLD[:, None, :], None, ADVANTAGES, VALID, 5, Loss())


def test_the_loss_agrees_with_finite_differences() -> None:
    """float64; the log-ratios stay away from the bounds, where the loss has corners."""
    stream = torch.Generator().manual_seed(0)
    new = torch.randn((2, 3), generator=stream, dtype=torch.float64) * 0.5
    old, reference = new + torch.tensor([[0.2, -0.2, 0.9], [-0.9, 0.1, 0.3]], dtype=torch.float64), new * 0.7
    config = Loss(kl_beta=0.3)

    def loss(s: Tensor) -> Tensor:
        return coupled_grpo_loss(s, old, reference, ADVANTAGES.double(), VALID, 5, config).loss

    assert torch.autograd.gradcheck(loss, new.requires_grad_(), eps=1e-6, atol=1e-7)


# --- through the policy -------------------------------------------------------------------------------------------


def gradient(policy: Policy) -> Tensor:
    flat = torch.cat([p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None])
    policy.model.zero_grad(set_to_none=True)
    return flat


@pytest.mark.parametrize("name", ["coupled", "decoupled", "full_mask"])
@pytest.mark.parametrize("kl_beta", [0.0, 0.5])
def test_on_policy_the_ratio_is_1_the_kl_is_0_and_the_gradient_is_reinforce(
    tiny_policy: MakePolicy, name: str, kl_beta: float
) -> None:
    policy, batch, estimator = tiny_policy(), make_batch(), Estimator(name=name)
    policy.freeze_reference()
    pairs = draw_masks(batch, estimator, KEY)
    with torch.no_grad():
        old = estimate_logp(policy, batch, pairs, estimator)
        with policy.reference() as frozen:
            reference = estimate_logp(frozen, batch, pairs, estimator)
    num_tokens = int(batch.valid.sum())
    new = estimate_logp(policy, batch, pairs, estimator)
    output = coupled_grpo_loss(
        new, old, reference if kl_beta else None, batch.advantages, batch.valid, num_tokens, Loss(kl_beta=kl_beta)
    )
    assert output.sums["ratio"] == num_tokens, "exactly 1 each"
    assert output.sums["kl"] == 0
    output.loss.backward()
    clipped = gradient(policy)

    scores = estimate_logp(policy, batch, pairs, estimator)
    total = sum(batch.advantages[i] * scores[i, k] for i in range(len(batch)) for k in range(6) if batch.valid[i, k])
    (-total / num_tokens).backward()
    reinforce = gradient(policy)
    torch.testing.assert_close(clipped, reinforce, atol=1e-6, rtol=1e-5)
    assert clipped.norm() > 1e-2


SEVEN = ([2, 6, 4, 3, 5, 4, 2], [6, 3, 5, 1, 2, 6, 4])


def moved(policy: Policy, batch: TrainBatch, estimator: Estimator) -> Anchor:
    """Anchors far enough from the policy that ratios differ from 1, some of them clipped."""
    pairs = draw_masks(batch, estimator, KEY)
    with torch.no_grad():
        scores = estimate_logp(policy, batch, pairs, estimator)
    stream = torch.Generator().manual_seed(3)
    return Anchor(
        old=scores + torch.randn(scores.shape, generator=stream) * 0.6,
        reference=scores + torch.randn(scores.shape, generator=stream) * 0.6,
    )


def open_toy_run(recipe: Recipe, policy: Policy, folder: Path) -> Run:
    grader = Grader.__new__(Grader)
    return Run(recipe, policy, [], [], grader, RunDir(folder, keep=1), InlineEngine(policy, 4))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("post_eos", ["kept", "mask"])
def test_the_gradient_of_any_micro_batch_split_is_the_joint_gradient(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, post_eos: str
) -> None:
    """Through the update of a run: groups may be larger or smaller than a micro-batch."""
    seen: list[Tensor] = []
    sums: list[dict[str, float]] = []
    monkeypatch.setattr(run_module, "apply_step", lambda optimizer, policy, *rest: seen.append(gradient(policy)) or 1.0)
    monkeypatch.setattr(run_module.StepMetrics, "of_update", lambda self, found, *rest: sums.append(found))
    policy, batch = tiny_policy(), make_batch(*SEVEN)
    estimator = Estimator(num_pairs=2, post_eos=post_eos)
    anchor = moved(policy, batch, estimator)
    for micro_batch_size in (7, size):
        recipe = make_recipe(
            estimator=estimator, loss={"kl_beta": 0.2}, optimizer={"micro_batch_size": micro_batch_size}
        )
        run = open_toy_run(recipe, policy, tmp_path)
        run.update(1, batch, draw_masks(batch, estimator, KEY), anchor)
    joint, split = seen
    torch.testing.assert_close(split, joint, atol=1e-5, rtol=1e-4)
    assert sums[0]["clip_low"] + sums[0]["clip_high"] > 0, "a batch without clipping would test less"
    assert sums[1] == pytest.approx(sums[0], rel=1e-4)
    assert joint.norm() > 1e-2


def test_the_first_update_takes_its_own_scores_as_the_old_ones(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(run_module, "apply_step", lambda optimizer, policy, *rest: seen.append(gradient(policy)) or 1.0)
    policy, batch, estimator = tiny_policy(), make_batch(*SEVEN), Estimator()
    run = open_toy_run(make_recipe(optimizer={"micro_batch_size": 3}), policy, tmp_path)
    masks = draw_masks(batch, estimator, KEY)
    first, later = (run.anchor(batch, masks, is_first=is_first) for is_first in (True, False))
    assert first.old is None
    assert later.old is not None
    torch.testing.assert_close(first.reference, later.old)
    run.update(1, batch, masks, first)
    run.update(1, batch, masks, later)
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-4)


def scored_gradient(policy: Policy, batch: TrainBatch, estimator: Estimator) -> tuple[Tensor, Tensor]:
    pairs = draw_masks(batch, estimator, KEY)
    new = estimate_logp(policy, batch, pairs, estimator)
    num_tokens = int(batch.valid.sum())
    coupled_grpo_loss(new, new.detach(), None, batch.advantages, batch.valid, num_tokens, Loss()).loss.backward()
    return new.detach(), gradient(policy)


def test_a_token_after_the_end_changes_nothing_when_what_follows_is_masked(tiny_policy: MakePolicy) -> None:
    policy, batch = tiny_policy(), make_batch()
    changed = TrainBatch(
        uids=batch.uids,
        ids=batch.ids.clone(),
        pad_lengths=batch.pad_lengths,
        valid=batch.valid,
        advantages=batch.advantages,
        is_scored=batch.is_scored,
    )
    changed.ids[:, -6:][~batch.valid] = 23
    assert not torch.equal(changed.ids, batch.ids)
    for one, other in zip(
        scored_gradient(policy, batch, Estimator(post_eos="mask")),
        scored_gradient(policy, changed, Estimator(post_eos="mask")),
        strict=True,
    ):
        assert torch.equal(one, other)
    kept, _ = scored_gradient(policy, batch, Estimator(post_eos="kept"))
    kept_changed, _ = scored_gradient(policy, changed, Estimator(post_eos="kept"))
    assert not torch.allclose(kept, kept_changed, atol=1e-3), "with 'kept' they are context"
    assert torch.equal(kept[~batch.valid], kept_changed[~batch.valid]), "but never carry loss"


@pytest.mark.parametrize("post_eos", ["kept", "mask"])
def test_rows_without_a_verdict_carry_no_loss(tiny_policy: MakePolicy, post_eos: str) -> None:
    """The gradient is that of the batch without the row; its advantage does not matter either."""
    policy, batch, estimator = tiny_policy(), make_batch([3, 5, 2, 4], [6, 4, 2, 6]), Estimator(post_eos=post_eos)
    is_scored = torch.tensor([True, True, True, False])
    holed = TrainBatch(
        uids=batch.uids,
        ids=batch.ids,
        pad_lengths=batch.pad_lengths,
        valid=batch.valid & is_scored[:, None],
        advantages=torch.where(is_scored, batch.advantages, 100.0),
        is_scored=is_scored,
    )
    scores, with_hole = scored_gradient(policy, holed, estimator)
    assert (scores[3] == 0).all()
    _, without_row = scored_gradient(policy, batch.rows(slice(0, 3)), estimator)
    torch.testing.assert_close(with_hole, without_row, atol=1e-6, rtol=1e-5)


def test_sums_of_micro_batches_add_up() -> None:
    total: dict[str, float] = {}
    for rows in micro_batches(2, 1):
        part = coupled_grpo_loss(
            NEW[rows], OLD[rows], REFERENCE[rows], ADVANTAGES[rows], VALID[rows], 5, Loss(kl_beta=0.1)
        )
        add_sums(total, part.sums)
    whole = coupled_grpo_loss(NEW, OLD, REFERENCE, ADVANTAGES, VALID, 5, Loss(kl_beta=0.1))
    assert total == pytest.approx(whole.sums, abs=1e-6)
