"""Speed-ups change nothing; bounded and approximate modes do what they say, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.toys import MakePolicy, make_requests, plain_logits
from pydantic import ValidationError

import coupled.rl.rollout.denoise
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.canvas_states import distinct_rows
from coupled.rl.rollout.denoise import denoise
from coupled.rl.rollout.parity import sampler_for_parity
from coupled.rl.rollout.sampler import Request, Step, plan_steps, unmask_counts
from coupled.rl.types import Rollout

pytestmark = pytest.mark.slow

ENDS, MASK_ID = (0, 1), 2
SAMPLED = Sampler(canvas=10, denoising_steps=10, temperature=1.1)
GREEDY = SAMPLED.changed(temperature=0.0)


def assert_same(one: list[Rollout], other: list[Rollout]) -> None:
    for mine, its in zip(one, other, strict=True):
        assert mine.uid == its.uid
        assert mine.canvas_ids.tolist() == its.canvas_ids.tolist()
        assert mine.commit_step.tolist() == its.commit_step.tolist()
        np.testing.assert_allclose(mine.commit_logp, its.commit_logp, atol=1e-5)
        np.testing.assert_allclose(mine.commit_entropy, its.commit_entropy, atol=1e-5)
        assert mine.kl_bound == pytest.approx(its.kl_bound, abs=1e-4)
        assert mine.fill_bound == pytest.approx(its.fill_bound, abs=1e-4)
        assert mine.num_forwards == its.num_forwards


def counting(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of every forward pass from here on."""
    seen: list[tuple[int, int]] = []
    plain = policy.hidden_after

    def hidden_after(ids: torch.Tensor, *rest: object, **others: object) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return plain(ids, *rest, **others)

    monkeypatch.setattr(policy, "hidden_after", hidden_after)
    return seen


def group(num: int, prompt: tuple[int, ...] = (5, 9, 12, 6)) -> list[Request]:
    return [Request(uid=f"sample-{i}", prompt_ids=prompt) for i in range(num)]


# --- equal inputs are computed once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["entropy", "maskgit", "margin", "origin"])
def test_a_group_starts_from_one_forward_pass_and_ends_as_if_each_were_alone(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    policy, requests = tiny_policy(end_scale=1.5), group(6) + group(3, (7, 7))
    requests = [Request(uid=f"{i}", prompt_ids=r.prompt_ids) for i, r in enumerate(requests)]
    sampler = SAMPLED.changed(order=order)
    alone = [denoise(policy, [request], sampler, seed=1)[0] for request in requests]
    seen = counting(policy, monkeypatch)
    together = denoise(policy, requests, sampler, seed=1)
    assert seen[0] == (1, 14 + 12), "two prompts, all canvases empty, one after the other"
    assert max(columns for _, columns in seen) > 6 * 14, "later they differ"
    assert_same(together, alone)


def test_a_greedy_group_is_computed_once_to_its_end(tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    seen = counting(policy, monkeypatch)
    made = denoise(policy, group(5), GREEDY, seed=0)
    assert {rows for rows, _ in seen} == {1}
    assert len({tuple(r.canvas_ids.tolist()) for r in made}) == 1


def test_distinct_rows_are_found_wherever_they_stand() -> None:
    first, which = distinct_rows(torch.tensor([[1, 2], [3, 4], [1, 2], [2, 1], [3, 4]]))
    assert first.tolist() == [0, 1, 3]
    assert which.tolist() == [0, 1, 0, 2, 1]


def test_a_prompt_that_begins_like_padding_is_not_taken_for_a_shorter_one(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    requests = [Request(uid="a", prompt_ids=(0, 6, 7)), Request(uid="b", prompt_ids=(6, 7))]
    assert_same(
        denoise(policy, requests, SAMPLED, seed=0), [denoise(policy, [r], SAMPLED, seed=0)[0] for r in requests]
    )


def test_the_random_order_is_chosen_before_anything_is_projected(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    projected: list[int] = []
    plain = coupled.rl.rollout.denoise.choose_tokens
    monkeypatch.setattr(
        "coupled.rl.rollout.denoise.choose_tokens",
        lambda head, hidden, *rest: projected.append(len(hidden)) or plain(head, hidden, *rest),
    )
    monkeypatch.setattr("coupled.rl.rollout.denoise.read_out", None)
    denoise(policy, make_requests(3), SAMPLED.changed(order="origin"), seed=0)
    assert projected[:3] == [3, 3, 3], "one position of each of three rows"


# --- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_is_the_published_schedule_without_the_steps_that_commit_nothing() -> None:
    plan = plan_steps(Sampler(canvas=256, denoising_steps=256, temperature=1.0))
    counts = unmask_counts(256, 256)
    assert counts[0] == 0
    assert [(s.number, s.count) for s in plan] == [(i, n) for i, n in enumerate(counts) if n]


def test_blocks_share_the_steps_and_come_one_after_the_other() -> None:
    plan = plan_steps(
        Sampler(canvas=10, denoising_steps=5, temperature=1.0, block_length=4, cache="dual", refresh_steps=2)
    )
    first, second, last = slice(0, 4), slice(4, 8), slice(8, 10)
    assert plan == [
        Step(number=0, block=first, count=2, is_refresh=True),
        Step(number=1, block=first, count=2, is_refresh=False),
        Step(number=2, block=second, count=2, is_refresh=True),
        Step(number=3, block=second, count=2, is_refresh=False),
        Step(number=4, block=last, count=1, is_refresh=True),
        Step(number=5, block=last, count=1, is_refresh=False),
    ]


@pytest.mark.parametrize(
    "settings", [{"block_length": 3}, {"block_length": 4, "order": "margin", "denoising_steps": 5}]
)
@torch.no_grad()
def test_greedy_decoding_in_blocks_equals_a_plain_implementation(
    tiny_policy: MakePolicy, settings: dict[str, object]
) -> None:
    policy, sampler = tiny_policy(shift=0), GREEDY.changed(**settings)
    for request, rollout in zip(make_requests(5), denoise(policy, make_requests(5), sampler, seed=0), strict=True):
        canvas = [MASK_ID] * 10
        size = sampler.block_length
        for start in range(0, 10, size):
            block = range(start, min(start + size, 10))
            steps = min(len(block), -(-sampler.denoising_steps * size // 10))
            for step in range(steps):
                logits = plain_logits(policy, [*request.prompt_ids, *canvas])[len(request.prompt_ids) :]
                p = logits.double().softmax(-1)
                best = p.sort(dim=-1, descending=True).values
                sure = torch.special.xlogy(p, p).sum(-1) if sampler.order == "entropy" else best[:, 0] - best[:, 1]
                masked = sorted((k for k in block if canvas[k] == MASK_ID), key=lambda k: -float(sure[k]))
                for k in masked[: len(block) // steps + (step < len(block) % steps)]:
                    canvas[k] = int(p[k].argmax())
            if any(token in ENDS for token in canvas[: block.stop]):
                break
        length = rollout.completion_length
        assert rollout.canvas_ids[:length].tolist() == canvas[:length]


def test_without_early_exit_the_whole_canvas_is_decoded_and_the_text_is_the_same(tiny_policy: MakePolicy) -> None:
    policy, requests = tiny_policy(end_scale=1.7), make_requests(12)
    early = denoise(policy, requests, SAMPLED, seed=1)
    late = denoise(policy, requests, SAMPLED.changed(has_early_exit=False), seed=1)
    assert sum((r.canvas_ids == MASK_ID).any() for r in early) >= 3
    assert not any((r.canvas_ids == MASK_ID).any() for r in late)
    assert [r.text for r in early] == [r.text for r in late]


# --- bounded --------------------------------------------------------------------------------------------------------


def test_an_entropy_bound_of_zero_changes_nothing_where_one_token_is_committed_a_step(tiny_policy: MakePolicy) -> None:
    policy, requests = tiny_policy(), make_requests(6)
    plain = denoise(policy, requests, SAMPLED, seed=0)
    assert_same(denoise(policy, requests, SAMPLED.changed(entropy_bound=0.0), seed=0), plain)


def test_an_entropy_bound_commits_more_and_accounts_for_it(tiny_policy: MakePolicy) -> None:
    policy, requests = tiny_policy(scale=0.4, end_scale=2.0), make_requests(6)
    plain = denoise(policy, requests, SAMPLED.changed(has_early_exit=False), seed=0)
    bounded = denoise(policy, requests, SAMPLED.changed(entropy_bound=3.0, has_early_exit=False), seed=0)
    assert np.mean([r.num_forwards for r in bounded]) < 0.7 * np.mean([r.num_forwards for r in plain])
    for rollout in bounded:
        total = 0.0
        for step in np.unique(rollout.commit_step):
            entropy = rollout.commit_entropy[rollout.commit_step == step]
            cost = float(entropy.sum() - entropy.max())
            # The last step of the schedule commits whatever is left.
            assert cost <= 3.0 + 1e-4 or step == rollout.commit_step.max()
            total += cost
        assert rollout.kl_bound == pytest.approx(total, abs=1e-4)
    last_two = [r.commit_entropy[r.commit_step == 9] for r in plain]
    assert all(len(two) == 2 for two in last_two), "the published schedule ends with two at once"
    assert [r.kl_bound for r in plain] == pytest.approx([float(two.min()) for two in last_two], abs=1e-4)


def test_end_tokens_are_filled_in_behind_one_and_what_that_may_cost_is_recorded(tiny_policy: MakePolicy) -> None:
    policy, requests = tiny_policy(end_scale=4.0), make_requests(16)
    sampler = SAMPLED.changed(has_early_exit=False)
    plain = denoise(policy, requests, sampler, seed=1)
    filled = denoise(policy, requests, sampler.changed(end_fill=0.5), seed=1)
    assert all(r.fill_bound == 0 for r in plain)
    assert sum(r.num_forwards for r in filled) < sum(r.num_forwards for r in plain)
    num_filled = 0
    for rollout in filled:
        missing, before_filled = 0.0, num_filled
        for step in np.unique(rollout.commit_step):
            here = np.flatnonzero(rollout.commit_step == step)
            before = np.flatnonzero((rollout.commit_step < step) & np.isin(rollout.canvas_ids, ENDS))
            count = unmask_counts(10, 10)[step]
            extra = len(here) - count
            if extra > 0:
                assert len(before)
                p = np.exp(rollout.commit_logp[here])
                is_fill = (here > before.min()) & np.isin(rollout.canvas_ids[here], ENDS) & (p >= 0.5)
                assert is_fill.sum() >= extra
                num_filled += extra
                if is_fill.sum() == extra:
                    missing += float((1 - p[is_fill]).sum())
        assert missing <= rollout.fill_bound + 1e-4
        assert (rollout.fill_bound > 0) == (num_filled > before_filled)
    assert num_filled > 5


def test_a_bound_that_nothing_reaches_fills_nothing(tiny_policy: MakePolicy) -> None:
    policy, requests = tiny_policy(end_scale=2.0), make_requests(8)
    assert_same(
        denoise(policy, requests, SAMPLED.changed(end_fill=1.0), seed=1), denoise(policy, requests, SAMPLED, seed=1)
    )


# --- approximate ----------------------------------------------------------------------------------------------------


def test_a_confidence_threshold_commits_whatever_is_sure(tiny_policy: MakePolicy) -> None:
    policy, requests = tiny_policy(scale=0.6), make_requests(6)
    plain = denoise(policy, requests, SAMPLED, seed=0)
    assert_same(denoise(policy, requests, SAMPLED.changed(confidence_threshold=0.9999), seed=0), plain)
    faster = denoise(policy, requests, SAMPLED.changed(confidence_threshold=0.5), seed=0)
    assert sum(r.num_forwards for r in faster) < 0.8 * sum(r.num_forwards for r in plain)


CACHED = {
    "prefix": {"cache": "prefix"},
    "prefix, refreshed": {"cache": "prefix", "refresh_steps": 3},
    "prefix, blocks": {"cache": "prefix", "block_length": 4},
    "dual": {"cache": "dual", "block_length": 4, "refresh_steps": 2},
    "dual, threshold": {"cache": "dual", "block_length": 5, "confidence_threshold": 0.3},
}


@pytest.mark.parametrize("settings", [CACHED["prefix"] | {"refresh_steps": 1}, CACHED["dual"] | {"refresh_steps": 1}])
def test_a_cache_that_is_refreshed_in_every_step_changes_nothing(
    tiny_policy: MakePolicy, settings: dict[str, object]
) -> None:
    policy, requests = tiny_policy(end_scale=1.3), make_requests(6)
    cached = denoise(policy, requests, SAMPLED.changed(**settings), seed=0)
    plain = SAMPLED.changed(block_length=settings.get("block_length", 0))
    assert_same(cached, denoise(policy, requests, plain, seed=0))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("settings", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize("kind", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_bounded_and_approximate_modes_do_not_depend_on_the_batch_or_on_padding(
    tiny_policy: MakePolicy, settings: dict[str, object], shift: int, kind: Sampler
) -> None:
    policy, requests = tiny_policy(shift=shift, end_scale=1.5), make_requests(7, lengths=(3, 9, 1, 5))
    sampler = kind.changed(**settings)
    alone = [denoise(policy, [request], sampler, seed=2)[0] for request in requests]
    assert_same(denoise(policy, requests, sampler, seed=2), alone)
    turned = {r.uid: r for r in denoise(policy, requests[::-1], sampler, seed=2)}
    assert_same([turned[r.uid] for r in requests], alone)
    assert len({r.completion_length for r in alone}) > 1 or kind.temperature == 0


@pytest.mark.parametrize(
    "settings", [{"entropy_bound": 2.0}, {"end_fill": 0.3}, {"confidence_threshold": 0.2}], ids=str
)
def test_ways_to_commit_several_tokens_do_not_depend_on_the_batch_either(
    tiny_policy: MakePolicy, settings: dict[str, object]
) -> None:
    policy, requests = tiny_policy(end_scale=1.5), make_requests(7, lengths=(3, 9, 1, 5))
    sampler = SAMPLED.changed(**settings)
    alone = [denoise(policy, [request], sampler, seed=2)[0] for request in requests]
    assert_same(denoise(policy, requests, sampler, seed=2), alone)


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({"cache": "prefix"}, lambda step: 14 if step == 0 else 11),
        ({"cache": "prefix", "refresh_steps": 4}, lambda step: 14 if step % 4 == 0 else 11),
        ({"cache": "dual", "block_length": 5}, lambda step: 14 if step % 5 == 0 else 6),
    ],
)
def test_between_refreshes_only_the_block_is_computed(
    tiny_policy: MakePolicy,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    columns: Callable[[int], int],
) -> None:
    """A prompt of four and a canvas of ten; one column more on the left, which predicts the first of the block."""
    policy = tiny_policy()
    seen = counting(policy, monkeypatch)
    denoise(policy, group(1), SAMPLED.changed(has_early_exit=False, **settings), seed=0)
    assert [width for _, width in seen] == [columns(step) for step in range(len(seen))]


@torch.no_grad()
def test_what_is_read_from_a_cache_is_what_it_was_at_the_refresh(tiny_policy: MakePolicy) -> None:
    """One layer: what a column's key says depends on its own token alone, so that a prompt's never change, and a prefix
    cache is exact; a dual one is so until the tokens behind the block change, which they do not."""
    policy, requests = tiny_policy(num_hidden_layers=1, end_scale=1.3), make_requests(6)
    plain = denoise(policy, requests, SAMPLED, seed=0)
    assert_same(denoise(policy, requests, SAMPLED.changed(cache="prefix"), seed=0), plain)
    blocks = SAMPLED.changed(block_length=4)
    assert_same(
        denoise(policy, requests, blocks.changed(cache="dual"), seed=0), denoise(policy, requests, blocks, seed=0)
    )


def test_a_dual_cache_without_blocks_is_refused() -> None:
    with pytest.raises(ValidationError, match="makes the whole canvas one block; set a block_length"):
        SAMPLED.changed(cache="dual")


# --- names ----------------------------------------------------------------------------------------------------------


def test_what_is_exact_says_so_and_has_a_name_of_its_own() -> None:
    others = [
        SAMPLED.changed(entropy_bound=0.0),
        SAMPLED.changed(end_fill=0.9),
        SAMPLED.changed(confidence_threshold=0.9),
        SAMPLED.changed(cache="prefix"),
        SAMPLED.changed(cache="prefix", refresh_steps=2),
    ]
    exact = [SAMPLED, SAMPLED.changed(block_length=5), SAMPLED.changed(has_early_exit=False)]
    assert all(s.is_exact for s in exact)
    assert not any(s.is_exact for s in others)
    assert len({s.hash for s in (*others, *exact)}) == 8
    assert {s.exact() for s in others} == {SAMPLED}
    assert all(sampler_for_parity(s).is_exact for s in others)
