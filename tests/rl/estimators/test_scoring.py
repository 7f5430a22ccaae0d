from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.enumerable import CANVAS, Toy, toy_batch
from helpers.estimator_cases import complementary
from helpers.toys import MakePolicy, global_random_states, make_batch, plain_logits, row_parts
from torch import Tensor

from coupled.rl.estimators.coupled import draw_pairs, of_pairs
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp, fully_masked_logp, masked_logp, with_tail, without_tail
from coupled.rl.model.policy import Policy
from coupled.rl.objective.batch import micro_batches
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import MaskPair, TrainBatch

KEY = (0, "mask", 1, 0)
MASK_ID = 2


def equation_4(policy: Policy, batch: TrainBatch, pairs: tuple[MaskPair, ...], post_eos: str) -> Tensor:
    """DiffuCoder eq. 4 token by token, each with an unpadded forward pass of its own."""
    scores = torch.zeros(batch.valid.shape)
    for row in range(len(batch)):
        prompt, canvas = row_parts(batch, row)
        valid = batch.valid[row].nonzero().flatten().tolist()

        def logp(k: int, masked: list[int], prompt: list[int] = prompt, canvas: list[int] = canvas) -> Tensor:
            hidden = {*masked, *(range(len(valid), len(canvas)) if post_eos == "mask" else ())}  # noqa: B023
            ids = [MASK_ID if i in hidden else token for i, token in enumerate(canvas)]
            return plain_logits(policy, prompt + ids)[len(prompt) + k].log_softmax(-1)[canvas[k]]

        for k in valid:
            total = logp(k, valid)
            for pair in pairs:
                t = pair.ratio[row]
                for mask, weight in ((pair.first, 1 / t), (pair.second, 1 / (1 - t))):
                    if mask[row, k]:
                        total = total + weight * logp(k, mask[row].nonzero().flatten().tolist())
            scores[row, k] = total / (len(pairs) + 1)
    return scores


def full_mask_logp(policy: Policy, batch: TrainBatch, post_eos: str = "kept") -> Tensor:
    estimator = Estimator(name="full_mask", post_eos=post_eos)
    return estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator)


@pytest.mark.parametrize("post_eos", ["kept", "mask"])
@pytest.mark.parametrize(
    ("name", "num_pairs"), [("coupled", 1), ("coupled", 2), ("decoupled", 1), ("decoupled", 2), ("full_mask", 1)]
)
@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_the_estimate_is_equation_4(
    tiny_policy: MakePolicy, shift: int, name: str, num_pairs: int, post_eos: str
) -> None:
    policy, batch = tiny_policy(shift=shift), make_batch()
    estimator = Estimator(name=name, num_pairs=num_pairs, post_eos=post_eos)
    pairs = () if name == "full_mask" else draw_pairs(batch, estimator, KEY)
    expected = equation_4(policy, batch, pairs, post_eos)
    scores = estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert expected[batch.valid].max() < -0.1, "a score that is zero would compare nothing"


@torch.no_grad()
def test_where_the_context_does_not_matter_the_weights_add_up_as_documented(tiny_policy: MakePolicy) -> None:
    """t = 1/2 and λ pairs: s = (1 + 2λ)/(λ + 1) · ℓ, which is 1.5 ℓ for λ = 1."""
    policy, batch = tiny_policy(), make_batch()
    for layer in policy.model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    policy.model.model.embed_tokens.weight[:] = policy.model.model.embed_tokens.weight[5].clone()
    alone = full_mask_logp(policy, batch)
    for num_pairs, factor in ((1, 1.5), (2, 5 / 3), (3, 1.75)):
        estimator = Estimator(mask_ratio=(0.5, 0.5), num_pairs=num_pairs)
        scores = estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator)
        torch.testing.assert_close(scores, factor * alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("post_eos", ["kept", "mask", "excluded"])
@pytest.mark.parametrize("name", ["coupled", "decoupled", "full_mask"])
@pytest.mark.parametrize("shift", [0, 1])
@torch.no_grad()
def test_a_completion_scores_the_same_alone_and_padded_beside_a_longer_prompt(
    tiny_policy: MakePolicy, shift: int, name: str, post_eos: str
) -> None:
    policy, batch = tiny_policy(shift=shift), make_batch([2, 9, 4], [6, 3, 5])
    estimator = Estimator(name=name, post_eos=post_eos)
    draw = draw_masks(batch, estimator, KEY)
    together = estimate_logp(policy, batch, draw, estimator)
    for i in range(3):
        row = slice(i, i + 1)
        cut = int(batch.pad_lengths[i])
        alone = TrainBatch(
            uids=batch.uids[row],
            ids=batch.ids[row, cut:],
            pad_lengths=torch.tensor([0]),
            valid=batch.valid[row],
            advantages=batch.advantages[row],
            is_scored=batch.is_scored[row],
        )
        scores = estimate_logp(policy, alone, draw.rows(row), estimator)
        torch.testing.assert_close(scores, together[row], atol=1e-5, rtol=1e-5)
        padded = estimate_logp(policy, batch.rows(row), draw.rows(row), estimator)
        torch.testing.assert_close(padded, together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@torch.no_grad()
def test_scores_do_not_depend_on_the_micro_batch_split_or_on_the_order(tiny_policy: MakePolicy, size: int) -> None:
    policy, estimator = tiny_policy(), Estimator(num_pairs=2)
    batch = make_batch([2, 6, 4, 3, 5], [6, 3, 5, 1, 2])
    joint = estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator)
    parts = [
        estimate_logp(policy, part, draw_masks(part, estimator, KEY), estimator)
        for part in (batch.rows(rows) for rows in micro_batches(5, size))
    ]
    torch.testing.assert_close(torch.cat(parts), joint, atol=1e-5, rtol=1e-5)
    turned = batch.rows(slice(None))
    order = torch.tensor([4, 2, 0, 3, 1])
    turned = TrainBatch(
        uids=tuple(batch.uids[i] for i in order),
        ids=batch.ids[order],
        pad_lengths=batch.pad_lengths[order],
        valid=batch.valid[order],
        advantages=batch.advantages[order],
        is_scored=batch.is_scored[order],
    )
    scores = estimate_logp(policy, turned, draw_masks(turned, estimator, KEY), estimator)
    torch.testing.assert_close(scores, joint[order], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_scores_are_zero_outside_the_valid_positions(tiny_policy: MakePolicy) -> None:
    policy, batch, estimator = tiny_policy(), make_batch(), Estimator()
    scores = estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator)
    assert (scores[~batch.valid] == 0).all()
    assert (scores[batch.valid] < 0).all()


def spy_on_rows(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each forward pass has."""
    seen: list[int] = []
    plain = policy.hidden_at

    def counting(ids: Tensor, *rest: Tensor) -> Tensor:
        seen.append(len(ids))
        return plain(ids, *rest)

    monkeypatch.setattr(policy, "hidden_at", counting)
    return seen


@torch.no_grad()
def test_completions_with_the_same_fully_masked_input_share_one_forward_pass(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    batch = make_batch([4] * 5, [6, 5, 6, 2, 1], shared_prompt=True)
    everything = batch.ids.clone()
    everything[:, -6:][~batch.valid] = MASK_ID
    seen = spy_on_rows(policy, monkeypatch)
    shared = fully_masked_logp(policy, everything, batch)
    assert seen == [1], "all five inputs are one prompt and a canvas of MASK"
    one_by_one = torch.cat(
        [fully_masked_logp(policy, everything[i : i + 1], batch.rows(slice(i, i + 1))) for i in range(5)]
    )
    torch.testing.assert_close(shared, one_by_one, atol=1e-5, rtol=1e-5)
    direct = masked_logp(policy, everything, batch.pad_lengths, batch.valid, batch.ids[:, -6:])
    torch.testing.assert_close(shared, direct, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_only_equal_inputs_share_their_fully_masked_pass(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    batch = make_batch([4] * 4, [6, 5, 6, 3], shared_prompt=True)
    seen = spy_on_rows(policy, monkeypatch)
    full_mask_logp(policy, batch, "kept")
    assert seen == [3], "rows 0 and 2 are full; rows 1 and 3 keep different tails"
    full_mask_logp(policy, batch, "mask")
    assert seen == [3, 1]


@pytest.mark.parametrize(
    ("post_eos", "lengths", "shared"),
    [
        ("kept", [6] * 10, 1),
        ("mask", [6] * 10, 1),
        ("mask", [6, 5, 4, 3, 2, 1, 6, 5, 4, 2], 1),
        ("kept", [6, 5, 6, 3], 3),
    ],
)
@torch.no_grad()
def test_a_group_costs_two_masked_inputs_a_completion_and_the_shared_ones(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, post_eos: str, lengths: list[int], shared: int
) -> None:
    """2 G + 1 inputs where the fully masked one is common to all, and C + C/G rows of logits a completion."""
    policy, estimator = tiny_policy(), Estimator(post_eos=post_eos)
    batch = make_batch([4] * len(lengths), lengths, shared_prompt=True)
    inputs, rows = 0, 0
    plain = policy.hidden_at

    def counting(ids: Tensor, pad_lengths: Tensor, places: Tensor, *rest: Tensor) -> Tensor:
        nonlocal inputs, rows
        inputs, rows = inputs + len(ids), rows + int(places.sum())
        return plain(ids, pad_lengths, places, *rest)

    monkeypatch.setattr(policy, "hidden_at", counting)
    scores = estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator)
    assert inputs == 2 * len(lengths) + shared
    if shared == 1:
        assert rows == sum(lengths) + max(lengths), "with lengths of C: G · C + C"
    expected = equation_4(policy, batch, draw_pairs(batch, estimator, KEY), post_eos)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_with_the_tail_left_out_completions_of_one_length_share_their_fully_masked_pass(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    batch = make_batch([4] * 6, [6, 5, 6, 2, 5, 5], shared_prompt=True)
    seen = spy_on_rows(policy, monkeypatch)
    full_mask_logp(policy, batch, "excluded")
    assert seen == [3], "lengths 6, 5 and 2"


@pytest.mark.parametrize("name", ["coupled", "full_mask"])
@torch.no_grad()
def test_with_the_tail_left_out_a_wider_canvas_is_padding_on_the_right(tiny_policy: MakePolicy, name: str) -> None:
    policy, batch, estimator = tiny_policy(), make_batch(), Estimator(name=name, post_eos="excluded")
    draw = draw_masks(batch, estimator, KEY)
    scores = estimate_logp(policy, batch, draw, estimator)
    junk = torch.tensor([[9, 1, 2, 30]]).repeat(3, 1)
    nothing = torch.zeros_like(junk, dtype=torch.bool)
    wider = replace(batch, ids=torch.cat((batch.ids, junk), 1), valid=torch.cat((batch.valid, nothing), 1))
    views = [
        replace(v, hidden=torch.cat((v.hidden, ~nothing), 1), scored=torch.cat((v.scored, nothing), 1))
        for v in draw.views
    ]
    wider_draw = replace(draw, forwards=tuple((view,) for view in views))
    wide = estimate_logp(policy, wider, wider_draw, estimator)
    torch.testing.assert_close(wide, torch.cat((scores, torch.zeros((3, 4))), 1), atol=1e-5, rtol=1e-5)
    for other in ("kept", "mask"):
        differs = estimate_logp(policy, batch, draw, estimator.model_copy(update={"post_eos": other}))
        torch.testing.assert_close(differs[0], scores[0], atol=1e-5, rtol=1e-5)  # without a tail they agree
        assert (differs - scores)[1:].abs().max() > 1e-2


def test_leaving_the_tail_out_moves_rows_to_the_right_and_back() -> None:
    """Prompts of 3, 5 and 2 tokens (padding 2, 0, 3), completions of 6, 4 and 2 of 6 positions."""
    batch = make_batch()
    moved, draw = without_tail(batch, draw_masks(batch, Estimator(name="ar_order"), KEY), MASK_ID)
    assert moved.pad_lengths.tolist() == [2, 2, 7]
    assert moved.ids[1].tolist() == [MASK_ID, MASK_ID, *batch.ids[1, :9].tolist()]
    assert moved.ids[2, 7:].tolist() == batch.ids[2, 3:7].tolist()
    assert moved.valid.int().tolist() == [[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert torch.equal(draw.views[1].scored, torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 5 + [1]]) == 1)
    numbers = torch.arange(18.0).reshape(3, 6) + 1
    expected = [[1, 2, 3, 4, 5, 6], [9, 10, 11, 12, 0, 0], [17, 18, 0, 0, 0, 0]]
    assert with_tail(numbers, batch.valid).tolist() == expected


@torch.no_grad()
def test_equal_token_ids_with_different_padding_are_different_inputs(tiny_policy: MakePolicy) -> None:
    """A prompt may begin with the pad token: then only the padding length tells two rows apart."""
    policy = tiny_policy()
    plain = make_batch([4, 4], [6, 6], shared_prompt=True)
    ids = plain.ids.clone()
    ids[:, 0] = policy.pad_id
    batch = TrainBatch(
        uids=plain.uids,
        ids=ids,
        pad_lengths=torch.tensor([0, 1]),
        valid=plain.valid,
        advantages=plain.advantages,
        is_scored=plain.is_scored,
    )
    scores = full_mask_logp(policy, batch)
    torch.testing.assert_close(scores, equation_4(policy, batch, (), "kept"), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mask_and_unnamed_head_rows_have_probability_zero(tiny_policy: MakePolicy) -> None:
    policy, batch = tiny_policy(), make_batch()
    rows = torch.zeros_like(batch.ids, dtype=torch.bool)
    rows[:, -6:] = True
    masked = batch.ids.masked_fill(rows, MASK_ID)
    logp = torch.stack(
        [policy.logp_at(masked, batch.pad_lengths, rows, torch.full_like(batch.ids, token)) for token in range(48)]
    )
    assert torch.isneginf(logp[[MASK_ID, *range(42, 48)]]).all()
    torch.testing.assert_close(logp.exp().sum(0), torch.ones(18))
    assert torch.isfinite(logp[[0, 1, 3, 4, 41]]).all()


def test_the_estimate_differentiates_through_every_term(tiny_policy: MakePolicy) -> None:
    policy, batch, estimator = tiny_policy(), make_batch(), Estimator()
    draw = draw_masks(batch, estimator, KEY)
    weights = torch.randn(batch.valid.shape, generator=torch.Generator().manual_seed(0))
    (estimate_logp(policy, batch, draw, estimator) * weights).sum().backward()
    gradient = policy.model.lm_head.weight.grad.clone()
    policy.model.zero_grad()
    (equation_4(policy, batch, draw_pairs(batch, estimator, KEY), "kept") * weights).sum().backward()
    torch.testing.assert_close(gradient, policy.model.lm_head.weight.grad, atol=1e-3, rtol=1e-3)


def test_estimating_leaves_every_global_generator_untouched(tiny_policy: MakePolicy) -> None:
    policy, batch, estimator = tiny_policy(), make_batch(), Estimator()
    before = global_random_states()
    estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator).sum().backward()
    assert global_random_states() == before


# --- the enumerable toy


def others(k: int) -> list[tuple[int, ...]]:
    """Every set of positions besides k."""
    rest = [i for i in range(CANVAS) if i != k]
    return [s for n in range(CANVAS) for s in itertools.combinations(rest, n)]


@pytest.mark.parametrize("t", [0.2, 0.5, 0.7])
def test_the_weight_1_over_t_makes_each_term_the_mean_over_masks_that_hold_the_token(t: float) -> None:
    """E over M ~ Bernoulli(t) of 1[k∈M]/t · ℓ_k(M) is E[ℓ_k(M) | k∈M], enumerated independently."""
    toy, words = Toy(), (2, 0, 1, 1)
    masks = list(itertools.product([False, True], repeat=CANVAS))
    batch = toy_batch(words, len(masks))
    first = torch.tensor(masks)
    pair = complementary(torch.full((len(masks),), t), first, batch.valid)
    scores = estimate_logp(toy, batch, of_pairs((pair,), batch, "paper"), Estimator())
    probability = torch.tensor([t ** sum(m) * (1 - t) ** (CANVAS - sum(m)) for m in masks])
    mean = (scores * probability[:, None]).sum(0)
    for k in range(CANVAS):
        given_k = sum(
            (ratio ** len(s) * (1 - ratio) ** (CANVAS - 1 - len(s))) * toy.exact(words, (k, *s), k)
            for ratio in (t, 1 - t)
            for s in others(k)
        )
        expected = (toy.exact(words, tuple(range(CANVAS)), k) + given_k) / 2
        assert float(mean[k]) == pytest.approx(expected, abs=1e-5)


def test_coupled_masks_vary_less_than_decoupled_ones_at_the_same_number_of_forwards() -> None:
    words, size = (2, 0, 1, 1), 4000
    variance, mean, rows = {}, {}, {}
    for name in ("coupled", "decoupled"):
        toy, batch, estimator = Toy(), toy_batch(words, size), Estimator(name=name)
        scores = estimate_logp(toy, batch, draw_masks(batch, estimator, KEY), estimator)
        variance[name] = float(scores.double().var(0).sum())
        mean[name] = scores.double().mean(0)
        rows[name] = toy.num_rows
    assert rows["coupled"] == rows["decoupled"] == 2 * size + 1
    assert variance["decoupled"] > 2 * variance["coupled"]
    # The same expectation: 4 000 samples each, so the means agree within a few standard errors.
    tolerance = 4 * (variance["decoupled"] / size) ** 0.5
    assert float((mean["coupled"] - mean["decoupled"]).abs().max()) < tolerance


@torch.no_grad()
def test_the_temperature_divides_the_logits_of_every_term(tiny_policy: MakePolicy) -> None:
    policy, batch, estimator = tiny_policy(shift=1), make_batch(), Estimator()
    draw = draw_masks(batch, estimator, KEY)
    hot = estimate_logp(policy, batch, draw, estimator, temperature=2.0)
    assert not torch.allclose(hot, estimate_logp(policy, batch, draw, estimator))
    head: Any = policy.model.lm_head
    weight = head.weight.clone()
    head.weight.div_(2.0)
    torch.testing.assert_close(hot, estimate_logp(policy, batch, draw, estimator))
    head.weight.copy_(weight)
