from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from helpers.toys import MakePolicy, make_batch, make_recipe
from torch import Tensor

from coupled.rl import run as run_module
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp
from coupled.rl.judging.grader import Grader
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import keep_reference
from coupled.rl.objective.advantage import group_advantages
from coupled.rl.objective.batch import micro_batches
from coupled.rl.objective.loss import add_sums, coupled_grpo_loss, kl_estimate, loss_denominator, policy_log_ratio
from coupled.rl.recipe.objective import Estimator, Loss
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import policy_engine
from coupled.rl.run import Run
from coupled.rl.run_folder.folder import RunFolder
from coupled.rl.trainer import learner as trained_module
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
    kl = kl_estimate(new, zero, 5.0)
    assert kl.tolist() == [pytest.approx([4.0067379, 142.41316], abs=1e-3)]


def test_k3_matches_the_hand_computation_and_is_never_negative() -> None:
    reference = torch.tensor([[LN2, 0.0, -LN2, 1.0]])
    expected = [0.3068528, 0.0, 0.1931472, 0.7182818]
    assert kl_estimate(torch.zeros(1, 4), reference, 5.0)[0].tolist() == pytest.approx(expected, abs=1e-6)
    many = torch.randn((1, 1000), generator=torch.Generator().manual_seed(0)) * 3
    assert kl_estimate(torch.zeros(1, 1000), many, 5.0).min() >= 0


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
    kept = keep_reference(policy, "frozen")
    pairs = draw_masks(batch, estimator, KEY)
    with torch.no_grad():
        old = estimate_logp(policy, batch, pairs, estimator)
        with kept.policy() as frozen:
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
    return Run(recipe, policy, [], [], grader, RunFolder(folder, keep=1), policy_engine(policy, 4))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("post_eos", ["kept", "mask", "excluded"])
def test_the_gradient_of_any_micro_batch_split_is_the_joint_gradient(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, post_eos: str
) -> None:
    """Through the update of a run: groups may be larger or smaller than a micro-batch."""
    seen: list[Tensor] = []
    sums: list[dict[str, float]] = []
    monkeypatch.setattr(
        trained_module, "apply_step", lambda optimizer, policy, *rest: seen.append(gradient(policy)) or 1.0
    )
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
    monkeypatch.setattr(
        trained_module, "apply_step", lambda optimizer, policy, *rest: seen.append(gradient(policy)) or 1.0
    )
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


@pytest.mark.parametrize("post_eos", ["mask", "excluded"])
def test_a_token_after_the_end_changes_nothing_when_what_follows_is_masked_or_left_out(
    tiny_policy: MakePolicy, post_eos: str
) -> None:
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
        scored_gradient(policy, batch, Estimator(post_eos=post_eos)),
        scored_gradient(policy, changed, Estimator(post_eos=post_eos)),
        strict=True,
    ):
        assert torch.equal(one, other)
    kept, _ = scored_gradient(policy, batch, Estimator(post_eos="kept"))
    kept_changed, _ = scored_gradient(policy, changed, Estimator(post_eos="kept"))
    assert not torch.allclose(kept, kept_changed, atol=1e-3), "with 'kept' they are context"
    assert torch.equal(kept[~batch.valid], kept_changed[~batch.valid]), "but never carry loss"


@pytest.mark.parametrize("post_eos", ["kept", "mask", "excluded"])
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


# --- the other terms: KL estimates, norms, sequence ratios, the dual clip -----------------------------------------


def test_the_three_kl_estimates_match_the_hand_computation() -> None:
    """r = s_ref - s is ln 2, 0, -ln 2, and 9 clamped to 5."""
    reference = torch.tensor([[LN2, 0.0, -LN2, 9.0]])
    expected = {
        "k1": [-0.6931472, 0.0, 0.6931472, -5.0],
        "k2": [0.2402265, 0.0, 0.2402265, 12.5],
        "k3": [0.3068528, 0.0, 0.1931472, 142.4131591],
    }
    for kind, values in expected.items():
        assert kl_estimate(torch.zeros(1, 4), reference, 5.0, kind)[0].tolist() == pytest.approx(values, rel=1e-6)
    with pytest.raises(ValueError, match="k1, k2 or k3; got 'k4'"):
        kl_estimate(torch.zeros(1, 4), reference, 5.0, "k4")


def test_in_expectation_k1_and_k3_are_the_kl_and_their_gradients_are_what_is_said_of_them() -> None:
    """By enumeration: a policy over five tokens, each drawn with its probability."""
    stream = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=stream, dtype=torch.float64).requires_grad_()
    other = torch.randn(5, generator=stream, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    drawn = policy.detach().exp()
    forward_kl, reverse_kl = (other.exp() * (other - policy)).sum(), (policy.exp() * (policy - other)).sum()

    def expected(kind: str) -> Tensor:
        return (drawn * kl_estimate(policy[None], other[None], 50.0, kind)[0]).sum()

    def gradient_of(value: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(value, logits, retain_graph=True)
        return found

    for kind in ("k1", "k3"):
        assert float(expected(kind).detach()) == pytest.approx(float(reverse_kl.detach()), abs=1e-12)
    assert abs(float((expected("k2") - reverse_kl).detach())) > 1e-2, "k2 is biased"
    torch.testing.assert_close(gradient_of(expected("k1")), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_of(expected("k2")), gradient_of(reverse_kl), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_of(expected("k3")), gradient_of(forward_kl), atol=1e-12, rtol=0)
    assert gradient_of(reverse_kl).norm() > 1e-2


@pytest.mark.parametrize(
    ("kind", "total"),
    [
        ("k1", -0.6931472 + 0.6931472 - 0.6931472),
        ("k2", 3 * 0.2402265),
        ("k3", 0.8068528),
    ],
)
def test_the_penalty_is_of_the_kind_that_is_asked_for(kind: str, total: float) -> None:
    output = coupled_grpo_loss(NEW, OLD, REFERENCE, ADVANTAGES, VALID, 5, Loss(kl_beta=0.1, kl=kind))
    assert output.sums["kl"] == pytest.approx(total, abs=1e-5)
    assert float(output.loss) == pytest.approx(0.42 + 0.1 * total / 5, abs=1e-6)


@pytest.mark.parametrize(
    ("norm", "denominator", "loss"),
    [
        # Row 0 sums to -2.9 over 3 tokens, row 1 to 5 over 2, and a third row has none that are valid.
        ("token", 5, 2.1 / 5),
        ("sequence", 2, (-2.9 / 3 + 5 / 2) / 2),
        ("fixed", 6, 2.1 / 6),
    ],
)
def test_each_norm_divides_by_what_it_says(norm: str, denominator: int, loss: float) -> None:
    new, old = torch.cat((NEW, torch.full((1, 3), 7.0))), torch.cat((OLD, torch.zeros(1, 3)))
    valid, advantages = torch.cat((VALID, torch.zeros(1, 3, dtype=torch.bool))), torch.tensor([1.0, -2.0, 5.0])
    assert loss_denominator(valid, norm) == denominator
    output = coupled_grpo_loss(new, old, None, advantages, valid, denominator, Loss(norm=norm))
    assert float(output.loss) == pytest.approx(loss, abs=1e-6)
    assert output.sums["tokens"] == 5, "metrics count tokens whatever the norm"


def test_a_batch_without_a_valid_token_is_divided_by_one_and_an_unknown_norm_refused() -> None:
    nothing = torch.zeros((2, 3), dtype=torch.bool)
    assert [loss_denominator(nothing, norm) for norm in ("token", "sequence", "fixed")] == [1, 1, 1]
    with pytest.raises(ValueError, match="token, sequence or fixed; got 'mean'"):
        loss_denominator(VALID, "mean")


def test_the_sequence_ratio_is_the_geometric_mean_over_valid_tokens() -> None:
    """Row 0: (2 · 1 · .4)^(1/3) = .8^(1/3) = .9283178; row 1: (2 · .4)^(1/2) = .8944272, its third token left out."""
    config = Loss(ratio="sequence", norm="sequence", clip_low=0.1, clip_high=0.5)
    found = policy_log_ratio(NEW, OLD, VALID, "sequence").exp()
    assert found[:, 0].tolist() == pytest.approx([0.9283178, 0.8944272], abs=1e-6)
    assert (found == found[:, :1]).all()
    output = coupled_grpo_loss(NEW, OLD, None, ADVANTAGES, VALID, 2, config)
    # GSPO: the mean over completions of min(ρA, clip(ρ)A); row 1 is clipped: min(-2 · .8944272, -2 · .9).
    assert float(output.loss) == pytest.approx((-0.9283178 + 1.8) / 2, abs=1e-6)
    assert output.sums["clip_low"] == 2, "a completion is clipped whole"
    assert output.sums["ratio"] == pytest.approx(3 * 0.9283178 + 2 * 0.8944272, abs=1e-5)
    with pytest.raises(ValueError, match="token or sequence; got 'row'"):
        policy_log_ratio(NEW, OLD, VALID, "row")


def test_the_sequence_ratio_has_the_gradient_of_gspo() -> None:
    """ρ_i A_i / |V_i| for each valid token of an unclipped completion, over N completions; none where it is clipped."""
    new = NEW.clone().requires_grad_()
    config = Loss(ratio="sequence", norm="sequence", clip_low=0.1, clip_high=0.5)
    coupled_grpo_loss(new, OLD, None, ADVANTAGES, VALID, 2, config).loss.backward()
    each = -0.9283178 / 3 / 2
    torch.testing.assert_close(new.grad, torch.tensor([[each] * 3, [0.0] * 3]), atol=1e-6, rtol=0)


def test_the_dual_clip_bounds_what_one_token_says_against_a_completion() -> None:
    """Row 1 has A = -2 and ratios 2, .4: max(min(-4, -3), -1.8 · 2) = -3.6, not -4; row 0 has A > 0 and keeps 2.9."""
    new = NEW.clone().requires_grad_()
    output = coupled_grpo_loss(new, OLD, None, ADVANTAGES, VALID, 5, Loss(dual_clip=1.8))
    assert float(output.loss.detach()) == pytest.approx((-2.9 + 3.6 + 1.0) / 5, abs=1e-6)
    assert output.sums["clip_dual"] == 1
    output.loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -0.2, -0.08], [0.0, 0.0, 0.0]]), atol=1e-6, rtol=0)
    lax = coupled_grpo_loss(NEW, OLD, None, ADVANTAGES, VALID, 5, Loss(dual_clip=3.0))
    assert (float(lax.loss), lax.sums["clip_dual"]) == (pytest.approx(0.42, abs=1e-6), 0)
    assert "clip_dual" not in coupled_grpo_loss(NEW, OLD, None, ADVANTAGES, VALID, 5, Loss()).sums


# --- the likelihood objective, and wd1 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "denominator", "loss"),
    [
        # Row 0: A = 1, s sums to -1 + ln 2 - 2 - .5 - .9162907 = -3.7231435. Row 1: A = -2, half of which counts,
        # -3 + ln 2 - 1.5 - .9162907 = -4.7231435; -(1)(-3.7231435) - (-1)(-4.7231435) = -1.
        ("token", 5, -1.0 / 5),
        ("sequence", 2, (3.7231435 / 3 - 4.7231435 / 2) / 2),
        ("fixed", 6, -1.0 / 6),
    ],
)
def test_the_likelihood_objective_is_the_score_times_its_advantage(norm: str, denominator: int, loss: float) -> None:
    config = Loss(objective="likelihood", norm=norm, negative_weight=0.5, kl_beta=0.1)
    output = coupled_grpo_loss(NEW, OLD, None, ADVANTAGES, VALID, denominator, config)
    assert float(output.loss) == pytest.approx(loss, abs=1e-6)
    assert output.sums == {"tokens": 5.0, "kl": 0.0, "loss": pytest.approx(loss, abs=1e-6)}, "there is no ratio to log"
    elsewhere = coupled_grpo_loss(NEW, OLD + 3, None, ADVANTAGES, VALID, denominator, config)
    assert torch.equal(elsewhere.loss, output.loss), "the old policy plays no part"
    penalised = coupled_grpo_loss(NEW, OLD, REFERENCE, ADVANTAGES, VALID, 5, Loss(objective="likelihood", kl_beta=0.1))
    plain = coupled_grpo_loss(NEW, OLD, None, ADVANTAGES, VALID, 5, Loss(objective="likelihood"))
    assert float(penalised.loss - plain.loss) == pytest.approx(0.1 * 0.8068528 / 5, abs=1e-6)


def test_at_the_old_policy_the_likelihood_objective_has_the_clipped_gradient() -> None:
    gradients = []
    for objective in ("clipped", "likelihood"):
        new = NEW.clone().requires_grad_()
        config = Loss(objective=objective, negative_weight=0.3, kl_beta=0.2)
        coupled_grpo_loss(new, NEW, REFERENCE, ADVANTAGES, VALID, 5, config).loss.backward()
        gradients.append(new.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=0)


def test_wd1_is_the_softmax_advantage_with_the_likelihood_objective() -> None:
    """`-Σ_i (w⁺_i - w⁻_i) log π(y_i)`, the weights over the completions of each prompt: two prompts with four each."""
    rewards = torch.tensor([[0.0, 1.0, 2.0, 5.0], [0.5, 0.5, 2.5, 0.0]])
    stream = torch.Generator().manual_seed(2)
    scores = -torch.rand((8, 5), generator=stream)
    valid = torch.arange(5)[None, :] < torch.tensor([5, 3, 1, 4, 2, 5, 5, 3])[:, None]
    expected = 0.0
    for prompt in range(2):
        group = [float(r) for r in rewards[prompt]]
        for i, r in enumerate(group):
            w_plus = math.exp(r) / sum(math.exp(x) for x in group)
            w_minus = math.exp(-r) / sum(math.exp(-x) for x in group)
            row = 4 * prompt + i
            expected -= (w_plus - w_minus) * float(scores[row][valid[row]].sum())
    advantages = group_advantages(rewards, "softmax").flatten()
    config = Loss(objective="likelihood", kl_beta=0.0)
    # A micro-batch may be smaller than a group: the weights are of the group all the same.
    for size in (8, 4, 3, 1):
        parts = [
            coupled_grpo_loss(scores[rows], scores[rows], None, advantages[rows], valid[rows], 1, config).loss
            for rows in micro_batches(8, size)
        ]
        assert float(sum(parts)) == pytest.approx(expected, rel=1e-5)


def test_where_the_loss_has_no_old_policy_none_is_scored(tiny_policy: MakePolicy, tmp_path: Path) -> None:
    policy, batch, estimator = tiny_policy(), make_batch(), Estimator()
    masks = draw_masks(batch, estimator, KEY)
    for loss, has_old in (
        ({}, True),
        ({"objective": "likelihood"}, False),
        ({"objective": "likelihood", "kl_beta": 0}, False),
        ({"objective": "likelihood", "reference": "old", "kl_beta": 0.1}, True),
        ({"objective": "likelihood", "reference": "old", "kl_beta": 0}, False),
    ):
        run = open_toy_run(make_recipe(loss=loss), policy, tmp_path)
        assert (run.anchor(batch, masks, is_first=False).old is not None) == has_old, loss
    run.update(1, batch, masks, run.anchor(batch, masks, is_first=False))
    row = run._metrics.row()
    assert {"loss", "kl", "grad_norm"} <= row.keys()
    assert not {"ratio", "clip_fraction_low", "clip_fraction_high"} & row.keys()


@pytest.mark.parametrize(
    ("objective", "ratio"), [("clipped", "token"), ("clipped", "sequence"), ("likelihood", "token")]
)
@pytest.mark.parametrize("norm", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_every_combination_agrees_with_finite_differences(ratio: str, norm: str, kl: str, objective: str) -> None:
    stream = torch.Generator().manual_seed(1)
    new = torch.randn((2, 3), generator=stream, dtype=torch.float64) * 0.5
    old = new.detach() + torch.tensor([[0.2, -0.2, 0.9], [-0.9, 0.1, 0.3]], dtype=torch.float64)
    reference = new.detach() * 0.7
    dual_clip = 2.0 if objective == "clipped" else None
    config = Loss(objective=objective, kl_beta=0.3, kl=kl, ratio=ratio, norm=norm, dual_clip=dual_clip)

    def loss(s: Tensor) -> Tensor:
        return coupled_grpo_loss(s, old, reference, ADVANTAGES.double(), VALID, 5, config).loss

    assert torch.autograd.gradcheck(loss, new.requires_grad_(), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ["sequence", "fixed"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_with_every_norm_the_gradient_of_a_split_is_the_joint_gradient(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str, ratio: str
) -> None:
    """The batch has a row without a verdict, which must not count as a completion in any micro-batch."""
    seen: list[Tensor] = []
    losses: list[float] = []
    monkeypatch.setattr(
        trained_module, "apply_step", lambda optimizer, policy, *rest: seen.append(gradient(policy)) or 1.0
    )
    monkeypatch.setattr(run_module.StepMetrics, "of_update", lambda self, found, *rest: losses.append(found["loss"]))
    policy, batch = tiny_policy(), make_batch(*SEVEN)
    is_scored = torch.tensor([True, True, False, True, True, True, True])
    batch = dataclasses.replace(batch, valid=batch.valid & is_scored[:, None], is_scored=is_scored)
    anchor = moved(policy, batch, Estimator())
    for size in (7, 1, 3):
        recipe = make_recipe(loss={"kl_beta": 0.2, "norm": norm, "ratio": ratio}, optimizer={"micro_batch_size": size})
        run = open_toy_run(recipe, policy, tmp_path)
        run.update(1, batch, draw_masks(batch, Estimator(), KEY), anchor)
    for split in seen[1:]:
        torch.testing.assert_close(split, seen[0], atol=1e-5, rtol=1e-4)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert seen[0].norm() > 1e-3


def test_metrics_of_an_update_are_those_of_a_hand_computation_and_not_b_times_too_large(
    tiny_policy: MakePolicy, tmp_path: Path
) -> None:
    """Three completions of 6, 4 and 2 tokens; the same sums are taken here token by token."""
    policy, batch, estimator = tiny_policy(), make_batch(), Estimator()
    batch = dataclasses.replace(batch, advantages=torch.tensor([1.0, -2.0, -0.5]))
    config = {"kl_beta": 0.2, "clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.05}
    recipe = make_recipe(loss=config, optimizer={"micro_batch_size": 2, "max_grad_norm": 1e-9})
    run = open_toy_run(recipe, policy, tmp_path)
    anchor, masks = moved(policy, batch, estimator), draw_masks(batch, estimator, KEY)
    scores = estimate_logp(policy, batch, masks, estimator, 1.2)
    kl, ratios, low, high, dual, total = 0.0, 0.0, 0, 0, 0, torch.zeros(())
    assert anchor.old is not None
    assert anchor.reference is not None
    for i in range(3):
        for k in range(6):
            if batch.valid[i, k]:
                rho = (scores[i, k] - anchor.old[i, k]).exp()
                r = anchor.reference[i, k] - scores[i, k]
                a, value = float(batch.advantages[i]), float(rho.detach())
                term = -min(rho * a, rho.clamp(0.8, 1.3) * a, key=lambda t: float(t.detach()))
                term = term if a > 0 or value <= 1.05 else torch.tensor(-1.05 * a)
                total = total + (term + 0.2 * (r.exp() - r - 1)) / 12
                kl += float((r.exp() - r - 1).detach()) / 12
                ratios += value / 12
                low += value < 0.8 and a < 0
                high += value > 1.3 and a > 0
                dual += value > 1.05 and a < 0
    total.backward()
    norm = float(gradient(policy).norm())
    run.update(1, batch, masks, anchor)
    row = run._metrics.row()
    assert min(low, high, dual) > 0
    expected = {
        "kl": kl,
        "ratio": ratios,
        "clip_fraction_low": low / 12,
        "clip_fraction_high": high / 12,
        "clip_fraction_dual": dual / 12,
        "loss": float(total.detach()),
        "grad_norm": norm,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
