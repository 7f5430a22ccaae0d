"""Estimators × model families: what every estimator owes, whatever it estimates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.estimator_cases import (
    KEY,
    MASK_ID,
    VARIANTS,
    every_attention,
    every_estimator,
    five,
    flat_gradient,
    open_toy_run,
    with_steps,
)
from helpers.toys import (
    MakePolicy,
    global_random_states,
    make_batch,
    make_requests,
    plain_logits,
    row_parts,
)
from pydantic import ValidationError
from torch import Tensor

import coupled.rl.trainer.learner as trained_module
from coupled.reward import Status, Task, Verdict
from coupled.rl.estimators import ESTIMATORS
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp, spread_over_tokens
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import keep_reference
from coupled.rl.objective.batch import collate, micro_batches
from coupled.rl.objective.loss import coupled_grpo_loss
from coupled.rl.recipe.objective import READ_BY, Estimator, Loss
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.engine import roll_out
from coupled.rl.types import Anchor, Group, MaskDraw, Prompt, TrainBatch

WITHOUT_CHANCE = {
    "full_mask",
    "trajectory",
    "ar_order",
    "trajectory, tail excluded",
    "ar_order, tail excluded",
}


def in_order(batch: TrainBatch, order: list[int]) -> TrainBatch:
    assert batch.commit_step is not None
    return TrainBatch(
        uids=tuple(batch.uids[i] for i in order),
        ids=batch.ids[order],
        pad_lengths=batch.pad_lengths[order],
        valid=batch.valid[order],
        advantages=batch.advantages[order],
        is_scored=batch.is_scored[order],
        commit_step=batch.commit_step[order],
    )


def scored(policy: Policy, batch: TrainBatch, estimator: Estimator) -> Tensor:
    return estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator)


def test_every_estimator_of_the_recipe_is_in_the_matrix() -> None:
    names = set(Estimator.model_fields["name"].annotation.__args__)
    assert names == set(ESTIMATORS) == {estimator.name for estimator in VARIANTS.values()}


# --- the matrix ----------------------------------------------------------------------------------------------------


def token_by_token(policy: Policy, batch: TrainBatch, draw: MaskDraw, post_eos: str = "kept") -> Tensor:
    """Each term of the sum with an unpadded forward pass of its own, the family's shift undone by hand. Where what
    follows the end is excluded, the canvas is cut off there."""
    scores = torch.zeros(batch.valid.shape)
    for row in range(len(batch)):
        prompt, canvas = row_parts(batch, row)
        if draw.hidden_prompt is not None:
            is_hidden = draw.hidden_prompt[row].tolist()[int(batch.pad_lengths[row]) :]
            prompt = [MASK_ID if h else token for h, token in zip(is_hidden, prompt, strict=True)]
        end = int(batch.valid[row].sum()) if post_eos == "excluded" else len(canvas)
        for view in draw.views:
            ids = [MASK_ID if h else token for h, token in zip(view.hidden[row].tolist(), canvas, strict=True)]
            logp = plain_logits(policy, prompt + ids[:end], prompt + canvas[:end])[len(prompt) :].log_softmax(-1)
            for k in view.scored[row].nonzero().flatten().tolist():
                scores[row, k] += logp[k, canvas[k]] / float(view.divisor[row])
    scores = scores / draw.total
    if not draw.is_sequence:
        return scores
    return torch.stack([v * s.sum() / max(1, int(v.sum())) for s, v in zip(scores, batch.valid, strict=True)])


@pytest.mark.parametrize(("shift", "block_length"), [(0, None), (1, None), (0, 1), (0, 3), (0, 4)])
@every_estimator
@torch.no_grad()
def test_every_estimator_scores_every_kind_of_family(
    tiny_policy: MakePolicy, name: str, shift: int, block_length: int | None
) -> None:
    """With blocks, also those into which prompts of 2 to 6 tokens reach."""
    policy, batch, estimator = tiny_policy(shift=shift, block_length=block_length), five(), VARIANTS[name]
    draw = draw_masks(batch, estimator, KEY)
    scores = estimate_logp(policy, batch, draw, estimator)
    expected = token_by_token(policy, batch, draw, estimator.post_eos)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert (scores[~batch.valid] == 0).all()
    assert float(scores.sum()) < -1, "a score that is zero would compare nothing"


@every_estimator
def test_views_score_valid_positions_that_they_hide(name: str) -> None:
    batch = five()
    for view in draw_masks(batch, VARIANTS[name], KEY).views:
        assert not (view.scored & ~view.hidden).any(), "a visible token would be copied, not predicted"
        assert not (view.scored & ~batch.valid).any()
        assert (view.divisor > 0).all()


@pytest.mark.parametrize("name", ["coupled", "coupled antithetic exact", "espo", "trajectory", "ar_order"])
def test_each_valid_token_is_scored_exactly_once_by_each_pair_and_by_each_replay(name: str) -> None:
    batch = five()
    draw = draw_masks(batch, VARIANTS[name], KEY)
    times = sum(view.scored.int() for view in draw.views if not view.is_shared)
    assert torch.equal(times, batch.valid.int() * VARIANTS[name].num_pairs)


# --- padding, splits, order ----------------------------------------------------------------------------------------


@every_attention
@every_estimator
@torch.no_grad()
def test_a_completion_scores_the_same_alone_padded_and_in_company(
    tiny_policy: MakePolicy, name: str, family: dict[str, int]
) -> None:
    """Drawn anew for each way of holding the row, so the draws must not see padding either."""
    policy, batch, estimator = tiny_policy(**family), with_steps(make_batch([2, 9, 4], [6, 3, 5])), VARIANTS[name]
    together = scored(policy, batch, estimator)
    for i in range(3):
        row = batch.rows(slice(i, i + 1))
        cut = int(row.pad_lengths)
        alone = replace(row, ids=row.ids[:, cut:], pad_lengths=torch.tensor([0]))
        more = replace(
            row,
            ids=torch.cat((torch.full((1, 3), policy.pad_id), row.ids), dim=1),
            pad_lengths=row.pad_lengths + 3,
        )
        for held in (row, alone, more):
            torch.testing.assert_close(scored(policy, held, estimator), together[i : i + 1], atol=1e-5, rtol=1e-5)


@every_estimator
@torch.no_grad()
def test_scores_do_not_depend_on_split_or_order_or_on_where_the_draw_was_made(
    tiny_policy: MakePolicy, name: str
) -> None:
    """A resumed run, or another rank, draws for its own rows; a micro-batch takes its rows of the joint draw."""
    policy, batch, estimator = tiny_policy(), five(), VARIANTS[name]
    draw = draw_masks(batch, estimator, KEY)
    joint = estimate_logp(policy, batch, draw, estimator)
    for size in (1, 2, 3):
        slices = list(micro_batches(5, size))
        of_the_joint_draw = [estimate_logp(policy, batch.rows(s), draw.rows(s), estimator) for s in slices]
        torch.testing.assert_close(torch.cat(of_the_joint_draw), joint, atol=1e-5, rtol=1e-5)
        drawn_apart = [scored(policy, batch.rows(s), estimator) for s in slices]
        torch.testing.assert_close(torch.cat(drawn_apart), joint, atol=1e-5, rtol=1e-5)
    order = [4, 2, 0, 3, 1]
    torch.testing.assert_close(scored(policy, in_order(batch, order), estimator), joint[order], atol=1e-5, rtol=1e-5)


@every_estimator
def test_draws_are_a_function_of_the_key(name: str) -> None:
    def hidden(key: tuple[int | str, ...]) -> list[list[list[bool]]]:
        draw = draw_masks(batch, estimator, key)
        prompt = [] if draw.hidden_prompt is None else [draw.hidden_prompt.tolist()]
        return [view.hidden.tolist() for view in draw.views] + prompt

    batch, estimator = with_steps(make_batch([4] * 8, [6] * 8)), VARIANTS[name]
    before = global_random_states()
    assert hidden(KEY) == hidden(KEY)
    others = [(1, "mask", 1, 0), (0, "mask", 2, 0), (0, "mask", 1, 1)]
    has_chance = name not in WITHOUT_CHANCE
    assert all((hidden(key) != hidden(KEY)) == has_chance for key in others)
    assert global_random_states() == before


@pytest.mark.parametrize("world_size", [2, 3, 5])
@every_estimator
def test_ranks_draw_for_their_own_rows_what_one_process_draws_for_all(name: str, world_size: int) -> None:
    batch, estimator = five(), VARIANTS[name]
    joint = draw_masks(batch, estimator, KEY)
    for rank in range(world_size):
        mine = list(range(rank, 5, world_size))
        own = draw_masks(in_order(batch, mine), estimator, KEY)
        # Another rank's rows may need more forward passes (a longer trajectory); those score nothing here.
        for place, view in enumerate(joint.views):
            if place < len(own.views):
                assert torch.equal(own.views[place].hidden, view.hidden[mine])
                assert torch.equal(own.views[place].scored, view.scored[mine])
                assert torch.equal(own.views[place].divisor, view.divisor[mine])
            else:
                assert not view.scored[mine].any()
        if joint.hidden_prompt is not None:
            assert own.hidden_prompt is not None
            assert torch.equal(own.hidden_prompt, joint.hidden_prompt[mine])


# --- which fields of the recipe an estimator reads ------------------------------------------------------------------


CHANGED = {
    "weights": "unit",
    "mask_ratio": (0.4, 0.6),
    "draw": "exact_count",
    "num_pairs": 3,
    "num_nodes": 2,
    "shrink": 4,
    "num_sampled_steps": 1,
}


def test_every_field_of_an_estimator_is_read_by_all_or_listed() -> None:
    everyone_s = {"name", "prompt_mask_probability", "temperature", "post_eos"}
    assert set(Estimator.model_fields) == everyone_s | set(READ_BY)
    assert set(READ_BY) == set(CHANGED)


@pytest.mark.parametrize("field", CHANGED)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_field_changes_the_draw_of_those_that_read_it_and_is_refused_elsewhere(name: str, field: str) -> None:
    def drawn(estimator: Estimator) -> tuple[object, ...]:
        draw = draw_masks(batch, estimator, KEY)
        views = [(v.hidden.tolist(), v.scored.tolist(), v.divisor.tolist()) for v in draw.views]
        return draw.total, views

    batch, plain = five(), Estimator(name=name)
    # `model_copy` does not validate: it can say what a recipe may not.
    changed = plain.model_copy(update={field: CHANGED[field]})
    is_read = name in READ_BY[field]
    assert (drawn(changed) != drawn(plain)) == is_read
    if is_read:
        assert drawn(Estimator(name=name, **{field: CHANGED[field]})) == drawn(changed)
    else:
        with pytest.raises(ValidationError, match=rf"{field}=.* has no effect with name={name}: it is read by"):
            Estimator(name=name, **{field: CHANGED[field]})


# --- old, reference and new ----------------------------------------------------------------------------------------


@every_attention
@every_estimator
def test_at_the_rollout_policy_ratio_is_1_kl_is_0_and_the_gradient_is_reinforce(
    tiny_policy: MakePolicy, name: str, family: dict[str, int]
) -> None:
    policy, batch, estimator = tiny_policy(**family), five(), VARIANTS[name]
    kept = keep_reference(policy, "frozen")
    draw = draw_masks(batch, estimator, KEY)
    with torch.no_grad():
        old = estimate_logp(policy, batch, draw, estimator)
        with kept.policy() as frozen:
            reference = estimate_logp(frozen, batch, draw, estimator)
    num_tokens = int(batch.valid.sum())
    new = estimate_logp(policy, batch, draw, estimator)
    output = coupled_grpo_loss(new, old, reference, batch.advantages, batch.valid, num_tokens, Loss(kl_beta=0.5))
    assert output.sums["ratio"] == num_tokens, "exactly 1 each"
    assert output.sums["kl"] == 0
    output.loss.backward()
    clipped = flat_gradient(policy)
    again = estimate_logp(policy, batch, draw, estimator)
    (-(again.sum(-1) * batch.advantages).sum() / num_tokens).backward()
    torch.testing.assert_close(clipped, flat_gradient(policy), atol=1e-6, rtol=1e-5)
    assert clipped.norm() > 1e-3


@every_estimator
def test_old_reference_and_new_read_the_same_masked_inputs(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    policy, batch, estimator = tiny_policy(), five(), VARIANTS[name]
    run = open_toy_run(policy, tmp_path, estimator, loss={"kl_beta": 0.1}, optimizer={"micro_batch_size": 2})
    inputs: list[Tensor] = []
    plain = policy.hidden_at

    def recording(ids: Tensor, *rest: Tensor) -> Tensor:
        inputs.append(ids.clone())
        return plain(ids, *rest)

    monkeypatch.setattr(policy, "hidden_at", recording)
    draw = draw_masks(batch, estimator, KEY)
    anchor = run.anchor(batch, draw, is_first=False)
    run.update(1, batch, draw, anchor)
    assert len(inputs) % 3 == 0
    old, reference, new = (inputs[i : i + len(inputs) // 3] for i in range(0, len(inputs), len(inputs) // 3))
    for one, other, third in zip(old, reference, new, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@every_estimator
def test_the_gradient_of_any_micro_batch_split_is_the_joint_gradient(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        trained_module, "apply_step", lambda optimizer, policy, *rest: seen.append(flat_gradient(policy)) or 1.0
    )
    policy, batch, estimator = tiny_policy(), five(), VARIANTS[name]
    draw = draw_masks(batch, estimator, KEY)
    with torch.no_grad():
        # The run scores at the temperature of its rollouts; 1 here, as in the anchor.
        scores = estimate_logp(policy, batch, draw, estimator)
    stream = torch.Generator().manual_seed(3)
    anchor = Anchor(
        old=scores + 0.6 * torch.randn(scores.shape, generator=stream) * batch.valid,
        reference=scores + 0.6 * torch.randn(scores.shape, generator=stream) * batch.valid,
    )
    for size in (5, 1, 2, 3):
        run = open_toy_run(
            policy,
            tmp_path,
            estimator,
            loss={"kl_beta": 0.2},
            optimizer={"micro_batch_size": size},
            rollout={"canvas": 6, "denoising_steps": 6, "temperature": 1.0},
        )
        run.update(1, batch, draw, anchor)
    joint, *splits = seen
    assert joint.norm() > 1e-3
    for split in splits:
        torch.testing.assert_close(split, joint, atol=2e-5, rtol=1e-4)


def test_a_row_without_a_verdict_is_hidden_from_by_no_estimator_and_changes_nothing(tiny_policy: MakePolicy) -> None:
    policy, batch = tiny_policy(), five()
    holed = replace(batch, valid=batch.valid & torch.tensor([True, False, True, True, True])[:, None])
    for name, estimator in VARIANTS.items():
        with torch.no_grad():
            scores = scored(policy, holed, estimator)
            expected = scored(policy, in_order(batch, [0, 2, 3, 4]), estimator)
        assert (scores[1] == 0).all(), name
        torch.testing.assert_close(scores[[0, 2, 3, 4]], expected, atol=1e-5, rtol=1e-5)


# --- scores of whole completions ------------------------------------------------------------------------------------


def test_a_sequence_score_is_spread_evenly_over_the_valid_tokens() -> None:
    valid = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    spread = spread_over_tokens(torch.tensor([-6.0, -2.0, 0.0]), valid)
    assert spread.tolist() == [[-2, -2, -2, 0], [-2, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("name", ["espo", "gdpo"])
@torch.no_grad()
def test_the_loss_sees_the_papers_sequence_ratio(tiny_policy: MakePolicy, name: str) -> None:
    """min(ρA, clip(ρ)A) with ρ = exp((E - E_old)/L), and the k2 terms of a completion add up to ½ (E - E_ref)²/L."""
    policy, other, batch, estimator = tiny_policy(), tiny_policy(seed=1), five(), VARIANTS[name]
    draw = draw_masks(batch, estimator, KEY)
    new, old = (estimate_logp(p, batch, draw, estimator) for p in (policy, other))
    gap, length = (new - old).sum(-1), batch.valid.sum(-1)
    config = Loss(kl_beta=0.0, clip_low=0.2, clip_high=0.3, max_log_ratio=20.0)
    output = coupled_grpo_loss(new, old, None, batch.advantages, batch.valid, int(length.sum()), config)
    expected = 0.0
    for e, n, advantage in zip(gap.tolist(), length.tolist(), batch.advantages.tolist(), strict=True):
        ratio = np.exp(e / n)
        expected -= n * min(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage)
    assert float(output.loss) == pytest.approx(expected / int(length.sum()), rel=1e-4)
    k2 = ((new - old).square() / 2).sum(-1)
    torch.testing.assert_close(k2, gap.square() / 2 / length, atol=1e-5, rtol=1e-4)
    assert float(gap.abs().max()) > 1


# --- prompt masking -------------------------------------------------------------------------------------------------


def test_prompt_tokens_are_hidden_with_the_probability_asked_for_and_padding_never() -> None:
    batch = make_batch([3, 40] * 300, [4] * 600)
    hidden = draw_masks(batch, Estimator(prompt_mask_probability=0.15), KEY).hidden_prompt
    assert hidden is not None
    place = torch.arange(40)
    assert not (hidden & (place < batch.pad_lengths[:, None])).any()
    assert float(hidden[1::2].float().mean()) == pytest.approx(0.15, abs=0.02)
    assert float(hidden[::2, 37:].float().mean()) == pytest.approx(0.15, abs=0.05)


def test_hiding_the_prompt_moves_no_other_draw() -> None:
    batch = five()
    plain, hiding = (draw_masks(batch, Estimator(prompt_mask_probability=p), KEY) for p in (0.0, 0.4))
    assert plain.hidden_prompt is None
    for one, other in zip(plain.views, hiding.views, strict=True):
        assert torch.equal(one.hidden, other.hidden)


# --- replay ---------------------------------------------------------------------------------------------------------


def rolled_out(policy: Policy, sampler: Sampler) -> tuple[TrainBatch, Tensor]:
    """A batch of rollouts the way a run makes it, and the log-probability of each token when it was committed."""
    requests = make_requests(6, seed=5)
    rollouts = roll_out(policy, requests, sampler, seed=3)
    groups = [
        Group(
            prompt=Prompt(task=Task(uid=r.uid, prompt="p", hidden_tests=("assert 1",)), token_ids=r.prompt_ids),
            rollouts=(r,),
            verdicts=(Verdict(score=1.0, parts={}, status=Status.OK, passed=1, total=1),),
        )
        for r in rollouts
    ]
    batch = collate(groups, torch.zeros((6, 1)), policy)
    by_uid = {r.uid: r.commit_logp for r in rollouts}
    return batch, torch.from_numpy(np.stack([by_uid[uid] for uid in batch.uids]))


@pytest.mark.parametrize("order", ["entropy", "maskgit", "margin", "origin"])
@pytest.mark.parametrize(("num_steps", "temperature"), [(12, 1.0), (6, 1.2), (4, 0.7)])
@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_replaying_a_rollout_under_its_policy_gives_its_own_log_probs(
    tiny_policy: MakePolicy, shift: int, num_steps: int, temperature: float, order: str
) -> None:
    policy = tiny_policy(shift=shift, end_scale=3.0)
    sampler = Sampler(canvas=12, denoising_steps=num_steps, temperature=temperature, order=order)
    batch, commit_logp = rolled_out(policy, sampler)
    estimator = Estimator(name="trajectory", post_eos="kept")
    scores = estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator, temperature)
    assert (scores - commit_logp)[batch.valid].abs().max() < 1e-5
    assert commit_logp[batch.valid].min() < -0.5
    lengths = batch.valid.sum(-1)
    assert lengths.min() < 12, "no completion ended early, so what follows the end is not tested"


@pytest.mark.parametrize(("num_steps", "temperature"), [(12, 1.0), (6, 1.2), (1, 0.7)])
@torch.no_grad()
def test_replaying_a_rollout_of_blocks_gives_its_own_log_probs_in_as_many_passes_as_a_block_has_steps(
    tiny_policy: MakePolicy, num_steps: int, temperature: float
) -> None:
    policy = tiny_policy(shift=0, block_length=4, end_scale=2.0)
    sampler = Sampler(canvas=12, denoising_steps=num_steps, temperature=temperature)
    batch, commit_logp = rolled_out(policy, sampler)
    estimator = Estimator(name="trajectory", post_eos="kept")
    draw = draw_masks(batch, estimator, KEY)
    assert len(draw.forwards) == -(-num_steps * 4 // 12)
    scores = estimate_logp(policy, batch, draw, estimator, temperature)
    assert (scores - commit_logp)[batch.valid].abs().max() < 1e-5
    assert batch.valid.sum(-1).min() < 12
    assert batch.valid.sum(-1).max() > 8, "one goes into its last block"


@torch.no_grad()
def test_a_replay_with_any_step_moved_no_longer_fits(tiny_policy: MakePolicy) -> None:
    """The check above is sharp: another order, another temperature or another shift is seen at once."""
    policy = tiny_policy(shift=1)
    batch, commit_logp = rolled_out(policy, Sampler(canvas=12, denoising_steps=12, temperature=1.0))
    estimator = Estimator(name="trajectory")

    def error(held: TrainBatch, by: Policy = policy, temperature: float = 1.0) -> float:
        scores = estimate_logp(by, held, draw_masks(held, estimator, KEY), estimator, temperature)
        return float((scores - commit_logp)[batch.valid].abs().max())

    assert error(batch) < 1e-5
    assert batch.commit_step is not None
    late = replace(batch, commit_step=batch.commit_step.max() - batch.commit_step)
    assert error(late) > 0.1
    assert error(batch, temperature=1.1) > 0.01
    assert error(batch, by=tiny_policy(shift=0)) > 0.1
