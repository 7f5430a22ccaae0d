"""The block decoder against a computation without a cache, and against the published one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden import GOLDEN, golden_folder
from helpers.toys import FIRST_LETTER, NUM_TOKENS, MakePolicy, global_random_states, make_requests, plain_logits
from safetensors.torch import load_file

from coupled.reward import Task
from coupled.rl.errors import RolloutError
from coupled.rl.keys import uniform
from coupled.rl.model.loading import load_policy
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import completion_length, denoise
from coupled.rl.rollout.denoise_blocks import counts_of_block, denoise_blocks
from coupled.rl.rollout.distributions import likeliest, nucleus
from coupled.rl.rollout.engine import policy_engine, roll_out
from coupled.rl.rollout.parity import check_parity, sampler_for_parity
from coupled.rl.rollout.readout import choose_positions
from coupled.rl.rollout.sampler import Request, steps_per_block
from coupled.rl.types import Prompt, Rollout

pytestmark = pytest.mark.slow

ENDS, MASK_ID = (0, 1), 2
GREEDY = Sampler(canvas=10, denoising_steps=10, temperature=0.0, order="maskgit")
SAMPLED = Sampler(canvas=10, denoising_steps=5, temperature=1.1, top_p=0.9)


@torch.no_grad()
def without_cache(policy: Policy, request: Request, sampler: Sampler, seed: int) -> tuple[list[int], list[int]]:
    """Canvas and commit steps: one row, every step a forward pass over everything up to the end of the block."""
    size, prompt = policy.family.block_length, list(request.prompt_ids)
    assert size is not None
    ids = prompt + [MASK_ID] * sampler.canvas
    steps = [-1] * len(ids)
    draws = uniform((2, size, sampler.canvas), seed, "denoise", request.uid)
    per_block = max(1, min(size, -(-sampler.denoising_steps * size // sampler.canvas)))
    first = len(prompt) // size * size
    for start in range(first, len(ids), size):
        block = range(max(start, len(prompt)), min(start + size, len(ids)))
        num_masked = len(block)
        for step in range(size):
            masked = [k for k in block if ids[k] == MASK_ID]
            if not masked:
                break
            logits = plain_logits(policy, ids[: min(start + size, len(ids))])
            surest = []
            for k in masked:
                place = k - len(prompt)
                scaled = logits[k] / sampler.temperature if sampler.temperature else logits[k]
                kept = nucleus(likeliest(scaled[None], sampler.top_k), sampler.top_p)[0]
                p = kept.double().softmax(-1).numpy()
                is_sampled = sampler.temperature > 0
                draw = draws[0, step, place]
                token = int(np.flatnonzero(p.cumsum() > draw)[0]) if is_sampled else int(p.argmax())
                best, second = np.sort(p)[::-1][:2]
                entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum())
                confidence = {
                    "entropy": -entropy,
                    "maskgit": float(p[token]),
                    "margin": best - second,
                    "origin": draws[1, step, place],
                }[sampler.order]
                surest.append((-confidence, k, token, entropy, best))
            surest.sort()
            share = num_masked // per_block + (step < num_masked % per_block) if step < per_block else len(masked)
            is_parallel = sampler.confidence_threshold is not None or sampler.entropy_bound is not None
            chosen = {k for _, k, *_ in surest[: max(share, 1) if is_parallel else share]}
            if sampler.confidence_threshold is not None:
                chosen |= {k for _, k, _, _, best in surest if best >= sampler.confidence_threshold}
            if sampler.entropy_bound is not None:
                spent = 0.0
                for _, k, _, entropy, _ in sorted(surest, key=lambda s: (s[3], s[1])):
                    if spent <= sampler.entropy_bound:
                        chosen.add(k)
                    spent += entropy
            for _, k, token, *_ in surest:
                if k in chosen:
                    ids[k], steps[k] = token, (start - first) // size * size + step
        if any(ids[k] in ENDS for k in block):
            break
    return ids[len(prompt) :], steps[len(prompt) :]


def requests_of(lengths: Sequence[int]) -> list[Request]:
    stream = np.random.default_rng(0)
    return [
        Request(uid=f"r-{i}", prompt_ids=tuple(stream.integers(FIRST_LETTER, NUM_TOKENS, n).tolist()))
        for i, n in enumerate(lengths)
    ]


def assert_equal_to_no_cache(policy: Policy, requests: list[Request], sampler: Sampler, seed: int = 0) -> list[Rollout]:
    made = denoise_blocks(policy, requests, sampler, seed=seed)
    for request, rollout in zip(requests, made, strict=True):
        canvas, steps = without_cache(policy, request, sampler, seed)
        assert rollout.canvas_ids.tolist() == canvas, request
        assert rollout.commit_step.tolist() == steps, request
        length, has_end = completion_length(np.array(canvas), ENDS)
        assert (rollout.completion_length, rollout.finish_reason) == (length, "end" if has_end else "length")
    return made


# --- equal to the computation without a cache -----------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sampler", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("block_length", [1, 3, 4, 16])
def test_prompts_of_every_length_up_to_two_blocks(
    tiny_policy: MakePolicy, block_length: int, sampler: Sampler, shift: int
) -> None:
    policy = tiny_policy(shift=shift, block_length=block_length, end_scale=1.3)
    # Without a prompt the first block holds nothing but MASK, so that all its positions are equally sure: the order is
    # then a matter of rounding, unless it is drawn.
    drawn = sampler.changed(order="origin")
    if shift:
        with pytest.raises(RolloutError, match="a prompt is empty"):
            denoise_blocks(policy, requests_of((0, 2 * block_length)), drawn, seed=0)
    else:
        assert_equal_to_no_cache(policy, requests_of((0, 0, 2 * block_length)), drawn)
    lengths = range(1, 2 * min(block_length, 4) + 1)
    made = assert_equal_to_no_cache(policy, requests_of(lengths), sampler)
    assert {len(r.prompt_ids) for r in made} == set(lengths)


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "margin", "denoising_steps": 7},
        {"order": "origin", "denoising_steps": 3},
        {"order": "maskgit", "top_k": 5},
        {"confidence_threshold": 0.3},
        {"confidence_threshold": 0.3, "temperature": 0.0, "top_p": 1.0, "order": "maskgit"},
        {"entropy_bound": 1.5},
        {"entropy_bound": 0.0, "denoising_steps": 1},
    ],
    ids=str,
)
def test_every_order_and_every_way_to_commit_several_tokens(
    tiny_policy: MakePolicy, settings: dict[str, object]
) -> None:
    policy = tiny_policy(shift=0, block_length=4, end_scale=1.3)
    assert_equal_to_no_cache(policy, requests_of((3, 9, 1, 5)), SAMPLED.changed(**settings), seed=4)


def test_published_code_decodes_the_same_tokens(tmp_path: Path) -> None:
    """Stable-DiffCoder: nine prompt tokens, eight new ones, blocks of four, three settings, its weights in bfloat16."""
    policy = load_policy(golden_folder("stable_diffcoder", tmp_path / "c"), weights_dtype=torch.bfloat16)
    policy.end_ids = ()  # it was not told to stop
    tensors = load_file(GOLDEN / "stable_diffcoder" / "io.safetensors")
    request = Request(uid="golden", prompt_ids=tuple(tensors["gen_prompt"][0].tolist()))
    for steps, threshold in ((8, None), (4, None), (8, 0.01)):
        sampler = Sampler(
            canvas=8, denoising_steps=steps, temperature=0.0, order="maskgit", confidence_threshold=threshold
        )
        (rollout,) = denoise_blocks(policy, [request], sampler, seed=0)
        expected = tensors[f"gen_bf16_prompt9_len8_block4_steps{steps}_thr{threshold}"][0, 9:].tolist()
        assert rollout.canvas_ids.tolist() == expected, (steps, threshold)


# --- the batch ------------------------------------------------------------------------------------------------------


def test_a_completion_does_not_depend_on_its_batch(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy(shift=0, block_length=4, end_scale=1.6)
    requests = make_requests(8, lengths=(3, 9, 1, 5))
    for sampler in (GREEDY, SAMPLED, SAMPLED.changed(order="origin")):
        together = denoise_blocks(policy, requests, sampler, seed=2)
        turned = {r.uid: r for r in denoise_blocks(policy, requests[::-1], sampler, seed=2)}
        assert any(r.finish_reason == "end" for r in together)
        for rollout, request in zip(together, requests, strict=True):
            (alone,) = denoise_blocks(policy, [request], sampler, seed=2)
            for other in (rollout, turned[rollout.uid]):
                assert other.canvas_ids.tolist() == alone.canvas_ids.tolist()
                assert other.commit_step.tolist() == alone.commit_step.tolist()
                np.testing.assert_allclose(other.commit_logp, alone.commit_logp, atol=1e-5)
                np.testing.assert_allclose(other.commit_entropy, alone.commit_entropy, atol=1e-5)
                assert other.num_forwards == alone.num_forwards


def test_a_prompt_is_read_once_for_its_group_and_rows_leave_when_they_end(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(shift=0, block_length=4, end_scale=1.6)
    shapes: list[tuple[int, ...]] = []
    plain = policy.hidden_after

    def spy(ids: torch.Tensor, *rest: object) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return plain(ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(policy, "hidden_after", spy)
    prompts = [(5, 6, 7, 8, 9), (9, 8, 7, 6, 5)]
    requests = [Request(uid=f"{i}/{g}", prompt_ids=p) for i, p in enumerate(prompts) for g in range(6)]
    made = denoise_blocks(policy, requests, SAMPLED.changed(canvas=20, denoising_steps=20), seed=0)
    assert shapes[0] == (2, 4), "two prompts, one whole block each"
    assert all(width == 4 for _, width in shapes), "never more than a block"
    num_rows = [rows for rows, _ in shapes[1:]]
    assert num_rows[0] == 12
    assert num_rows == sorted(num_rows, reverse=True)
    assert num_rows[-1] < 12
    assert sum(num_rows) == sum(r.num_forwards for r in made)
    early = [r for r in made if r.finish_reason == "end" and (r.canvas_ids == MASK_ID).any()]
    assert early
    for rollout in early:
        in_blocks = (rollout.completion_length + 1 + 3) // 4 * 4 - 1  # one prompt token stands in the first block
        assert (rollout.canvas_ids[:in_blocks] != MASK_ID).all(), "the block of the end token is finished"
        assert (rollout.canvas_ids[in_blocks:] == MASK_ID).all()


def test_decoding_leaves_every_global_generator_untouched(tiny_policy: MakePolicy) -> None:
    before = global_random_states()
    denoise_blocks(tiny_policy(shift=0, block_length=4), make_requests(2), SAMPLED, seed=0)
    assert global_random_states() == before


def test_the_engine_decodes_as_the_family_does(tiny_policy: MakePolicy) -> None:
    policy, requests = tiny_policy(shift=0, block_length=4), make_requests(3)
    made = policy_engine(policy, 8).generate(requests, SAMPLED, seed=0)
    expected = denoise_blocks(policy, requests, SAMPLED, seed=0)
    assert [r.canvas_ids.tolist() for r in made] == [r.canvas_ids.tolist() for r in expected]
    whole = tiny_policy(shift=0)
    (one,) = roll_out(whole, requests[:1], SAMPLED, seed=0)
    (other,) = denoise(whole, requests[:1], SAMPLED, seed=0)
    assert one.canvas_ids.tolist() == other.canvas_ids.tolist()
    for settings in ({"block_length": 4}, {"cache": "prefix"}):
        with pytest.raises(RolloutError, match="dream has blocks of 4 and an exact cache of its own: leave them out"):
            roll_out(policy, requests, SAMPLED.changed(**settings), seed=0)


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["entropy", "maskgit", "margin", "origin"])
def test_scoring_reproduces_the_record_to_1e_5(tiny_policy: MakePolicy, order: str) -> None:
    policy = tiny_policy(shift=0, block_length=4, end_scale=2.0)
    requests = make_requests(8, lengths=(3, 7, 2, 8))
    sampler = SAMPLED.changed(top_p=1.0, order=order)
    made = denoise_blocks(policy, requests, sampler, seed=0)
    assert any((r.commit_step < 0).any() for r in made)
    task = Task(uid="t", prompt="p", hidden_tests=("assert f(1) == 1",))
    prompts = [Prompt(task=task, token_ids=r.prompt_ids) for r in requests]
    assert check_parity(policy, prompts, made, sampler.temperature, 5) <= 1e-5
    policy.family = replace(policy.family, block_length=5)
    with pytest.raises(RolloutError, match="must give a rollout's tokens"):
        check_parity(policy, prompts, made, sampler.temperature, 5)


def test_the_check_of_a_run_is_short_and_takes_several_blocks() -> None:
    sampler = sampler_for_parity(Sampler(canvas=256, denoising_steps=256, temperature=1.2, top_p=0.9), 4)
    assert (sampler.canvas, sampler.denoising_steps, sampler.top_p) == (16, 8, 1.0)
    assert steps_per_block(sampler, 4) == 2


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canvas", "steps", "block_length", "expected"),
    [(256, 256, 4, 4), (256, 128, 4, 2), (256, 1, 4, 1), (8, 8, 32, 32)],
)
def test_steps_are_shared_out_to_blocks(canvas: int, steps: int, block_length: int, expected: int) -> None:
    sampler = Sampler(canvas=canvas, denoising_steps=steps, temperature=1.0)
    assert steps_per_block(sampler, block_length) == expected


def test_positions_are_shared_out_to_steps() -> None:
    masked = torch.tensor([3, 4, 1, 0])
    assert [counts_of_block(masked, 2, step).tolist() for step in range(2)] == [[2, 2, 1, 0], [1, 2, 0, 0]]


def test_positions_that_are_sure_enough_are_committed_together() -> None:
    no = float("-inf")
    scores = torch.tensor([[-0.2, no, -0.1, -0.9]])
    entropy = torch.tensor([[0.2, float("inf"), 0.1, 0.9]])
    sure = torch.tensor([[0.9, 0.0, 0.95, 0.4]])
    sampler = Sampler(canvas=4, denoising_steps=4, temperature=1.0)

    def chosen(count: int, **settings: float) -> list[int]:
        found = choose_positions(scores, entropy, sure, torch.tensor([count]), sampler.changed(**settings))
        return found[0].nonzero().flatten().tolist()

    assert chosen(1) == [2]
    assert chosen(0) == []
    assert chosen(2) == [0, 2]
    assert chosen(0, confidence_threshold=0.99) == [2], "at least one"
    assert chosen(1, confidence_threshold=0.9) == [0, 2]
    assert chosen(0, entropy_bound=0.0) == [2]
    assert chosen(0, entropy_bound=0.1) == [0, 2]
    assert chosen(0, entropy_bound=0.29) == [0, 2]
    assert chosen(0, entropy_bound=0.31) == [0, 2, 3]
