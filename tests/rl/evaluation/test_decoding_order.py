"""Orders written by hand: every number below can be counted on fingers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from helpers.toys import make_requests, plain_logits

from coupled.rl.evaluation.decoding_order import (
    canvas_before,
    commit_map,
    confidence_map,
    global_arness,
    local_arness,
    order_of,
    unmasking_order,
)
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.denoise import denoise
from coupled.rl.types import Rollout

LEFT_TO_RIGHT = [0, 1, 2, 3, 4]
RIGHT_TO_LEFT = [4, 3, 2, 1, 0]
EVENS_FIRST = [0, 2, 4, 1, 3]
PAIR_SWAPPED = [1, 0, 2, 3]


def rollout(commit_step: list[int], length: int, canvas_ids: list[int] | None = None) -> Rollout:
    return Rollout(
        uid="r",
        prompt_ids=(5, 6),
        canvas_ids=np.array(canvas_ids or range(10, 10 + len(commit_step))),
        completion_length=length,
        text="",
        finish_reason="end",
        commit_step=np.array(commit_step, dtype=np.int32),
        commit_logp=np.zeros(len(commit_step), dtype=np.float32),
        commit_entropy=np.zeros(len(commit_step), dtype=np.float32),
        num_forwards=1,
        weight_version=0,
        sampler_hash="",
    )


def test_tokens_of_one_step_are_ordered_from_left_to_right() -> None:
    assert unmasking_order([0, 2, 1, 1]) == [0, 2, 3, 1]
    assert unmasking_order([1, 1, 0, 0]) == [2, 3, 0, 1]
    assert unmasking_order([]) == []


def test_an_order_with_a_position_that_was_never_unmasked_is_refused() -> None:
    with pytest.raises(ValueError, match="every position"):
        unmasking_order([0, -1, 1])


@pytest.mark.parametrize(
    ("order", "k", "over_all", "over_windows"),
    [
        (LEFT_TO_RIGHT, 1, 4 / 5, 1.0),
        (LEFT_TO_RIGHT, 2, 3 / 5, 1.0),
        (LEFT_TO_RIGHT, 4, 1 / 5, 1.0),
        (RIGHT_TO_LEFT, 1, 0.0, 0.0),
        (EVENS_FIRST, 1, 0.0, 0.0),
        # {1, 0} are the two before 2: as sets, so the swap does not matter; then {0, 2} are not those before 3.
        (PAIR_SWAPPED, 2, 1 / 4, 1 / 2),
        # 1 after 0? no; 2 after 0? no; 3 after 2: yes.
        (PAIR_SWAPPED, 1, 1 / 4, 1 / 3),
        # {0, 1, 2} before 3, whatever their order.
        (PAIR_SWAPPED, 3, 1 / 4, 1.0),
    ],
)
def test_local_arness_counts_the_tokens_that_directly_follow_their_k_predecessors(
    order: list[int], k: int, over_all: float, over_windows: float
) -> None:
    assert local_arness(order, k) == pytest.approx(over_all)
    assert local_arness(order, k, "T-k") == pytest.approx(over_windows)


@pytest.mark.parametrize(
    ("order", "k", "expected"),
    [
        (LEFT_TO_RIGHT, 1, 1.0),
        (LEFT_TO_RIGHT, 3, 1.0),
        # Only the last token, 0, is the leftmost that is left.
        (RIGHT_TO_LEFT, 1, 1 / 5),
        # 1 is among the two leftmost of {0, 1}, 0 of {0}.
        (RIGHT_TO_LEFT, 2, 2 / 5),
        # 0 of {0..4}: yes. 2 of {1, 2, 3, 4}: no. 4 of {1, 3, 4}: no. 1, 3: yes.
        (EVENS_FIRST, 1, 3 / 5),
        # 2 is the second of {1, 2, 3, 4}: yes. 4 the third of {1, 3, 4}: no.
        (EVENS_FIRST, 2, 4 / 5),
        (EVENS_FIRST, 3, 1.0),
        (PAIR_SWAPPED, 1, 3 / 4),
    ],
)
def test_global_arness_counts_the_tokens_among_the_k_leftmost_masked(order: list[int], k: int, expected: float) -> None:
    assert global_arness(order, k) == pytest.approx(expected)


def test_arness_of_nothing_is_no_number() -> None:
    assert math.isnan(local_arness([], 1))
    assert math.isnan(global_arness([], 1))
    assert math.isnan(local_arness([0], 1, "T-k"))
    assert local_arness([0], 1) == 0.0


def test_positions_behind_the_end_token_do_not_count() -> None:
    """The canvas was written from its far end; of the completion itself, left to right."""
    assert order_of(rollout([2, 3, 4, 1, 0], length=3)) == [0, 1, 2]
    assert order_of(rollout([0, 1, -1, -1], length=2)) == [0, 1]


def test_the_commit_map_gives_each_position_its_share_of_steps() -> None:
    found = commit_map([rollout([0, 1, 2], length=3), rollout([1, 0, -1], length=2)], num_steps=3)
    assert found.counts[0].tolist() == [2, 2, 1]
    assert found.values.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]


def test_the_commit_map_has_no_number_where_no_completion_reaches() -> None:
    found = commit_map([rollout([0, 1, -1], length=2)], num_steps=2)
    assert np.isnan(found.values[:, 2]).all()


def test_the_canvas_before_a_step_shows_what_was_committed_earlier() -> None:
    example = rollout([1, 0, -1, 2], length=4, canvas_ids=[10, 11, 2, 13])
    assert canvas_before(example, 0, 2).tolist() == [2, 2, 2, 2]
    assert canvas_before(example, 1, 2).tolist() == [2, 11, 2, 2]
    assert canvas_before(example, 3, 2).tolist() == [10, 11, 2, 13]


@pytest.mark.parametrize("shift", [0, 1])
def test_the_confidence_map_is_that_of_the_model_computed_row_by_row(
    tiny_policy: Callable[..., Policy], shift: int
) -> None:
    policy = tiny_policy(shift=shift, end_scale=3.0)
    sampler = Sampler(canvas=6, denoising_steps=4, temperature=1.0)
    rollouts = denoise(policy, make_requests(5), sampler, seed=0)
    found = confidence_map(policy, rollouts, 4, batch_size=2)
    sums, counts = np.zeros((4, 6)), np.zeros((4, 6), dtype=int)
    for one in rollouts:
        for step in range(int(one.commit_step.max()) + 1):
            canvas = canvas_before(one, step, policy.mask_id)
            probabilities = plain_logits(policy, [*one.prompt_ids, *canvas.tolist()]).detach().softmax(-1)[-6:]
            for place in np.flatnonzero(canvas == policy.mask_id):
                sums[step, place] += float(probabilities[place].max())
                counts[step, place] += 1
    assert found.counts.tolist() == counts.tolist()
    assert counts[0].tolist() == [5] * 6
    np.testing.assert_allclose(found.values[counts > 0], (sums / np.maximum(counts, 1))[counts > 0], atol=1e-5)
    assert np.isnan(found.values[counts == 0]).all()
