from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers.toys import NUM_TOKENS, MakePolicy, global_random_states, make_recipe, make_requests, plain_logits
from torch import Tensor

from coupled.rl.keys import uniform
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import completion_length, denoise, is_settled
from coupled.rl.rollout.distributions import draw_tokens, nucleus
from coupled.rl.rollout.engine import policy_engine, request_chunks
from coupled.rl.rollout.sampler import Request, unmask_counts
from coupled.rl.trainer.rl_learner import RLLearner
from coupled.rl.types import Rollout

GREEDY = Sampler(canvas=10, denoising_steps=7, temperature=0.0)
SAMPLED = Sampler(canvas=10, denoising_steps=7, temperature=1.1, top_p=0.9)
ENDS = (0, 1)
MASK_ID = 2
ORDERS = ["entropy", "maskgit", "margin"]


@torch.no_grad()
def reference_denoise(policy: Policy, request: Request, sampler: Sampler, seed: int) -> tuple[list[int], list[int]]:
    """Canvas and commit steps, the plain way: one row, every step to the end, one position at a time."""
    canvas = [MASK_ID] * sampler.canvas
    committed = [-1] * sampler.canvas
    draws = uniform((2, sampler.denoising_steps, sampler.canvas), seed, "denoise", request.uid)
    times = np.linspace(1, 1e-3, sampler.denoising_steps + 1)
    for step in range(sampler.denoising_steps):
        masked = [k for k in range(sampler.canvas) if canvas[k] == MASK_ID]
        share = 1 - times[step + 1] / times[step]
        count = len(masked) if step == sampler.denoising_steps - 1 else int(len(masked) * share)
        logits = plain_logits(policy, [*request.prompt_ids, *canvas])[len(request.prompt_ids) :].double()
        surest: list[tuple[float, int, int]] = []
        for k in masked:
            p = (logits[k] / sampler.temperature if sampler.temperature else logits[k]).softmax(-1).numpy()
            ranked = np.argsort(-p, kind="stable")
            kept = [t for i, t in enumerate(ranked) if i == 0 or p[ranked[:i]].sum() <= sampler.top_p]
            p = np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()
            is_sampled = sampler.temperature > 0
            token = int(np.flatnonzero(p.cumsum() > draws[0, step, k])[0]) if is_sampled else int(p.argmax())
            first, second = np.sort(p)[::-1][:2]
            confidence = {
                "entropy": float((p[p > 0] * np.log(p[p > 0])).sum()),
                "maskgit": float(p[token]),
                "margin": float(first - second),
                "origin": float(draws[1, step, k]),
            }[sampler.order]
            surest.append((-confidence, k, token))
        for _, k, token in sorted(surest)[:count]:
            canvas[k], committed[k] = token, step
    return canvas, committed


def completed(rollout: Rollout) -> list[int]:
    return rollout.canvas_ids[: rollout.completion_length].tolist()


# --- the schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (256, [0] + [1] * 254 + [2]),
        (128, [1] + [2] * 126 + [3]),
        (64, [3] + [4] * 62 + [5]),
        (1, [256]),
    ],
)
def test_the_schedule_is_that_of_the_reference_sampler(num_steps: int, expected: list[int]) -> None:
    assert unmask_counts(256, num_steps) == expected


@pytest.mark.parametrize("canvas", [1, 2, 3, 7, 16, 40, 64, 100, 256])
def test_the_schedule_commits_every_position_once(canvas: int) -> None:
    for num_steps in sorted({1, 2, 3, max(1, canvas // 3), max(1, canvas // 2), max(1, canvas - 1), canvas}):
        if num_steps <= canvas:
            counts = unmask_counts(canvas, num_steps)
            assert len(counts) == num_steps
            assert sum(counts) == canvas
            assert min(counts) >= 0
            assert counts[-1] >= 1


# --- against a plain implementation -------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_greedy_decoding_equals_a_plain_implementation(tiny_policy: MakePolicy, order: str, shift: int) -> None:
    policy, requests = tiny_policy(shift=shift), make_requests(5)
    sampler = GREEDY.changed(order=order)
    for request, rollout in zip(requests, denoise(policy, requests, sampler, seed=0), strict=True):
        canvas, committed = reference_denoise(policy, request, sampler, 0)
        length = rollout.completion_length
        assert completed(rollout) == canvas[:length]
        assert rollout.commit_step[:length].tolist() == committed[:length]


@pytest.mark.parametrize("order", [*ORDERS, "origin"])
def test_sampled_decoding_equals_a_plain_implementation(tiny_policy: MakePolicy, order: str) -> None:
    policy, requests = tiny_policy(), make_requests(6)
    sampler = SAMPLED.changed(order=order)
    for request, rollout in zip(requests, denoise(policy, requests, sampler, seed=3), strict=True):
        canvas, committed = reference_denoise(policy, request, sampler, 3)
        length = rollout.completion_length
        assert completed(rollout) == canvas[:length]
        assert rollout.commit_step[:length].tolist() == committed[:length]


def test_a_row_that_leaves_early_has_the_text_it_would_have_had_at_the_end(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, requests = tiny_policy(end_scale=1.7), make_requests(12)
    sampler = SAMPLED.changed(denoising_steps=10, top_p=1.0)
    early = denoise(policy, requests, sampler, seed=1)
    left_masked = [r for r in early if (r.canvas_ids == MASK_ID).any()]
    assert len(left_masked) >= 3, "some rows must really have been dropped before the last step"
    assert any(r.finish_reason == "length" for r in early)
    for request, rollout in zip(requests, early, strict=True):
        canvas, committed = reference_denoise(policy, request, sampler, 1)
        length, has_end = completion_length(np.array(canvas), ENDS)
        assert completed(rollout) == canvas[:length]
        assert rollout.commit_step[:length].tolist() == committed[:length]
        assert rollout.finish_reason == ("end" if has_end else "length")
    assert all(r.num_forwards < 9 for r in left_masked)
    monkeypatch.setattr(
        "coupled.rl.rollout.denoise.is_settled", lambda canvas, *_: torch.zeros(len(canvas), dtype=torch.bool)
    )
    late = denoise(policy, requests, sampler, seed=1)
    assert [completed(r) for r in late] == [completed(r) for r in early]
    assert all(r.num_forwards == 9 for r in late), "the first of ten steps commits nothing and runs nothing"


@pytest.mark.parametrize(
    ("published", "order"), [("entropy", "entropy"), ("maskgit_plus", "maskgit"), ("topk_margin", "margin")]
)
def test_published_dream_code_decodes_the_same_tokens(
    dream: Policy, dream_tensors: dict[str, Tensor], published: str, order: str
) -> None:
    """Eight positions in eight steps, among the 50 likeliest tokens: that is the default of its configuration class,
    and confidence is of the filtered distribution. Unlike it, we stop at the first end token."""
    prompt = tuple(dream_tensors["gen_prompt"][0].tolist())
    expected = dream_tensors[f"gen_{published}"][0, len(prompt) :].tolist()
    assert 501 not in expected, "the reference never ended, so all eight tokens are compared"
    sampler = Sampler(canvas=8, denoising_steps=8, temperature=0.0, order=order, top_k=50)
    (rollout,) = denoise(dream, [Request(uid="golden", prompt_ids=prompt)], sampler, seed=0)
    assert rollout.canvas_ids.tolist() == expected


# --- independence of the batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [GREEDY, SAMPLED, SAMPLED.changed(order="origin")])
def test_a_completion_does_not_depend_on_which_rows_share_its_batch(tiny_policy: MakePolicy, sampler: Sampler) -> None:
    policy, requests = tiny_policy(end_scale=2.0), make_requests(7, lengths=(3, 9, 1, 5))
    together = {r.uid: r for r in denoise(policy, requests, sampler, seed=2)}
    turned = {r.uid: r for r in denoise(policy, requests[::-1], sampler, seed=2)}
    for request in requests:
        (alone,) = denoise(policy, [request], sampler, seed=2)
        for other in (together[request.uid], turned[request.uid]):
            assert completed(other) == completed(alone)
            assert other.commit_step.tolist() == alone.commit_step.tolist()
            np.testing.assert_allclose(other.commit_logp, alone.commit_logp, atol=1e-5)
            np.testing.assert_allclose(other.commit_entropy, alone.commit_entropy, atol=1e-5)
            assert other.num_forwards == alone.num_forwards


def test_samples_of_other_uids_or_seeds_differ_and_the_greedy_one_does_not(tiny_policy: MakePolicy) -> None:
    policy, prompt = tiny_policy(), (5, 6, 7)
    requests = [Request(uid=f"sample-{i}", prompt_ids=prompt) for i in range(8)]
    sampled = [tuple(r.canvas_ids.tolist()) for r in denoise(policy, requests, SAMPLED, seed=0)]
    assert len(set(sampled)) == 8
    again = [tuple(r.canvas_ids.tolist()) for r in denoise(policy, requests, SAMPLED, seed=0)]
    assert again == sampled
    other = [tuple(r.canvas_ids.tolist()) for r in denoise(policy, requests, SAMPLED, seed=1)]
    assert not set(other) & set(sampled)
    greedy = {tuple(r.canvas_ids.tolist()) for seed in (0, 1) for r in denoise(policy, requests, GREEDY, seed=seed)}
    assert len(greedy) == 1


def test_the_origin_order_is_that_of_the_row_s_own_draws(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    sampler = Sampler(canvas=8, denoising_steps=8, temperature=1.0, order="origin")
    requests = [Request(uid=f"o-{i}", prompt_ids=(5, 6)) for i in range(40)]
    rollouts = denoise(policy, requests, sampler, seed=0)
    full = [r for r in rollouts if r.finish_reason == "length"]
    assert len(full) > 10
    orders = {tuple(np.argsort(r.commit_step, kind="stable").tolist()) for r in full}
    assert len(orders) > 0.9 * len(full), "every row has an order of its own"
    mean_step = np.mean([r.commit_step for r in full], axis=0)
    assert mean_step.min() > 2.5, "and no position is favoured: 4.1 on average"
    assert mean_step.max() < 5.8


def test_denoising_leaves_every_global_generator_untouched(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    for order in ("entropy", "maskgit", "margin", "origin"):
        before = global_random_states()
        denoise(policy, make_requests(2), SAMPLED.changed(order=order), seed=0)
        assert global_random_states() == before


# --- what a rollout records ---------------------------------------------------------------------------------------


def test_step_log_probability_and_entropy_are_recorded_where_a_token_was_committed(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(end_scale=3.0)
    rollouts = denoise(policy, make_requests(10), SAMPLED.changed(denoising_steps=10, top_p=1.0), seed=1)
    assert any((r.canvas_ids == MASK_ID).any() for r in rollouts)
    for rollout in rollouts:
        is_committed = rollout.canvas_ids != MASK_ID
        assert (rollout.commit_step >= 0).tolist() == is_committed.tolist()
        assert is_committed[: rollout.completion_length].all()
        assert (rollout.commit_logp[~is_committed] == 0).all()
        assert (rollout.commit_entropy[~is_committed] == 0).all()
        assert (rollout.commit_logp[is_committed] < 0).all()
        assert (rollout.commit_entropy[is_committed] > 0).all()
        assert np.isfinite(rollout.commit_logp).all()
        assert (rollout.canvas_ids.dtype, rollout.commit_step.dtype) == (np.int64, np.int32)
        assert (rollout.commit_logp.dtype, rollout.commit_entropy.dtype) == (np.float32, np.float32)
        assert rollout.num_forwards == rollout.commit_step.max(), "of ten steps the first commits nothing"


def test_the_recorded_numbers_are_those_of_the_tempered_filtered_distribution(tiny_policy: MakePolicy) -> None:
    """One step, so every token was drawn from the logits of the empty canvas."""
    policy, (request,) = tiny_policy(), make_requests(1)
    sampler = Sampler(canvas=6, denoising_steps=1, temperature=0.7, top_p=0.8)
    (rollout,) = denoise(policy, [request], sampler, seed=5)
    logits = plain_logits(policy, [*request.prompt_ids, *[MASK_ID] * 6])[-6:]
    logp = nucleus(logits.detach() / 0.7, 0.8).log_softmax(-1)
    expected = logp.gather(-1, torch.from_numpy(rollout.canvas_ids)[:, None])[:, 0]
    np.testing.assert_allclose(rollout.commit_logp, expected.numpy(), atol=1e-5)
    entropy = -(logp.exp() * logp.masked_fill(logp.isinf(), 0)).sum(-1)
    np.testing.assert_allclose(rollout.commit_entropy, entropy.numpy(), atol=1e-5)
    assert rollout.weight_version == 0


def test_the_text_stops_before_the_first_end_token(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(end_scale=3.0)
    rollouts = denoise(policy, make_requests(12), SAMPLED, seed=1)
    ended = [r for r in rollouts if r.finish_reason == "end"]
    assert ended
    for rollout in rollouts:
        letters = completed(rollout)[:-1] if rollout.finish_reason == "end" else completed(rollout)
        assert not set(letters) & set(ENDS)
        assert rollout.text == policy.tokenizer.decode(letters, skip_special_tokens=True)
        assert len(rollout.text) == len([t for t in letters if t > 3])
        assert (rollout.canvas_ids[rollout.completion_length - 1] in ENDS) == (rollout.finish_reason == "end")


def test_mask_and_unnamed_tokens_are_never_sampled_however_likely(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.lm_head.weight[[MASK_ID, *range(NUM_TOKENS, 48)]] *= 20
    for sampler in (GREEDY, SAMPLED, SAMPLED.changed(order="maskgit")):
        for rollout in denoise(policy, make_requests(8), sampler, seed=0):
            assert MASK_ID not in completed(rollout)
            assert max(completed(rollout)) < NUM_TOKENS


def test_a_mask_token_in_the_prompt_is_left_as_it_is(tiny_policy: MakePolicy) -> None:
    request = Request(uid="odd", prompt_ids=(5, MASK_ID, 7))
    (rollout,) = denoise(tiny_policy(), [request], GREEDY, seed=0)
    assert rollout.prompt_ids == (5, MASK_ID, 7)
    assert rollout.completion_length >= 1
    assert MASK_ID not in completed(rollout)


def test_equal_samplers_have_equal_names_and_others_do_not() -> None:
    assert SAMPLED.hash == SAMPLED.changed().hash
    changed = [
        SAMPLED.changed(canvas=11),
        SAMPLED.changed(denoising_steps=6),
        SAMPLED.changed(temperature=1.0),
        SAMPLED.changed(top_p=0.8),
        SAMPLED.changed(order="margin"),
        SAMPLED.changed(top_k=5),
        SAMPLED.changed(confidence_threshold=0.5),
    ]
    assert len({SAMPLED.hash, *(s.hash for s in changed)}) == 8


# --- the parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canvas", "expected"),
    [
        ([5, 6, 7], (3, False)),
        ([5, 1, 7], (2, True)),
        ([1, 1, 0], (1, True)),
        ([5, 6, 0], (3, True)),
        ([5, 2, 1], (3, True)),
        ([2, 2, 2], (3, False)),
    ],
)
def test_a_completion_reaches_to_its_first_end_token(canvas: list[int], expected: tuple[int, bool]) -> None:
    assert completion_length(np.array(canvas), ENDS) == expected


@pytest.mark.parametrize(
    ("canvas", "expected"),
    [
        ([5, 6, 7], True),
        ([5, 1, 2], True),
        ([1, 2, 2], True),
        ([5, 2, 1], False),
        ([2, 5, 6], False),
        ([5, 6, 2], False),
    ],
)
def test_a_row_is_settled_when_no_mask_stands_before_its_first_end_token(canvas: list[int], expected: bool) -> None:
    assert is_settled(torch.tensor([canvas]), MASK_ID, ENDS).tolist() == [expected]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.05, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 0]),
        (0.95, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_the_nucleus_keeps_the_likeliest_tokens_until_their_mass_is_reached(top_p: float, kept: list[int]) -> None:
    """Probabilities .2, .4, .1, .3: the token that crosses the mass is kept, and at least one always is."""
    logits = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()
    filtered = nucleus(logits, top_p)
    assert torch.isfinite(filtered[0]).nonzero().flatten().tolist() == sorted(kept)
    assert torch.equal(filtered[0, kept], logits[0, kept])


def test_draws_invert_the_distribution_function() -> None:
    logp = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log()
    draws = torch.tensor([0.0, 0.2, 0.499, 0.501, 0.999999, 1.0 - 1e-16], dtype=torch.float64)
    tokens = draw_tokens(logp.repeat(len(draws), 1), draws)
    assert tokens.tolist()[:5] == [1, 1, 1, 3, 3], "a token of probability zero is never drawn, even at the edges"


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    expected = sum(counts) * np.array(probabilities)
    return float((np.square(np.array(counts) - expected) / expected).sum())


def test_drawn_tokens_follow_the_distribution() -> None:
    probabilities = [0.05, 0.4, 0.1, 0.15, 0.3]
    logp = torch.tensor(probabilities).log().repeat(20_000, 1)
    tokens = draw_tokens(logp, torch.from_numpy(uniform((20_000,), "chi")))
    assert chi_square(tokens.bincount(minlength=5).tolist(), probabilities) < 18.5, "4 degrees of freedom, p = 0.001"


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampled_tokens_follow_the_tempered_distribution_of_the_model(tiny_policy: MakePolicy, top_p: float) -> None:
    policy, prompt = tiny_policy(scale=0.15), (5, 6, 7)
    requests = [Request(uid=f"draw-{i}", prompt_ids=prompt) for i in range(4000)]
    sampler = Sampler(canvas=1, denoising_steps=1, temperature=1.3, top_p=top_p)
    counts = np.bincount([int(r.canvas_ids[0]) for r in denoise(policy, requests, sampler, seed=0)], minlength=48)
    p = (plain_logits(policy, [*prompt, MASK_ID])[-1].detach().double() / 1.3).softmax(-1).numpy()
    ranked = np.argsort(-p)
    p[ranked[np.cumsum(p[ranked]) - p[ranked] > top_p]] = 0
    p /= p.sum()
    assert counts[p == 0].sum() == 0
    named = np.flatnonzero(p > 0.002)
    rest = ([counts.sum() - counts[named].sum()], [1 - p[named].sum()]) if top_p == 1 else ([], [])
    statistic = chi_square([*counts[named], *rest[0]], [*p[named], *rest[1]])
    degrees = len(named) - (top_p < 1)
    assert degrees > (20 if top_p == 1 else 10)
    assert statistic < degrees + 3.1 * (2 * degrees) ** 0.5 + 5, "about p = 0.001"


# --- the engine ---------------------------------------------------------------------------------------------------


def test_the_inline_engine_answers_in_the_order_of_the_requests(tiny_policy: MakePolicy) -> None:
    policy, requests = tiny_policy(), make_requests(7, lengths=(9, 2, 6, 2))
    engine = policy_engine(policy, 3)
    engine.load_weights(RLLearner(make_recipe(), policy), 4)
    rollouts = engine.generate(requests, SAMPLED, seed=0)
    assert [r.uid for r in rollouts] == [r.uid for r in requests]
    assert {r.weight_version for r in rollouts} == {4}
    for request, rollout in zip(requests, rollouts, strict=True):
        (alone,) = denoise(policy, [request], SAMPLED, seed=0)
        assert completed(rollout) == completed(alone)
        assert rollout.prompt_ids == request.prompt_ids


def test_requests_are_cut_into_batches_by_prompt_length_and_keep_their_order_within() -> None:
    requests = make_requests(5, lengths=(4, 2, 3, 2))
    chunks = request_chunks(requests, 2)
    assert [[r.uid for r in chunk] for chunk in chunks] == [
        ["request-1", "request-3"],
        ["request-2", "request-0"],
        ["request-4"],
    ]


def test_batches_have_one_prompt_length_where_that_leaves_them_eight_rows() -> None:
    requests = make_requests(40, lengths=(3, 3, 3, 7, 5))
    chunks = [[len(r.prompt_ids) for r in chunk] for chunk in request_chunks(requests, 20)]
    assert chunks == [[3] * 20, [3] * 4 + [5] * 8, [7] * 8]
    assert [len(chunk) for chunk in request_chunks(make_requests(10, lengths=(1, 2, 3, 4, 5)), 64)] == [8, 2]
    assert [[len(r.prompt_ids) for r in chunk] for chunk in request_chunks(make_requests(18, lengths=(4, 2)), 64)] == [
        [2] * 9,
        [4] * 9,
    ]
