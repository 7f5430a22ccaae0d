"""The cost that an estimator states is the cost of its draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.estimator_cases import KEY, VARIANTS, every_attention, every_estimator
from helpers.toys import MakePolicy, make_batch, make_recipe
from torch import Tensor

from coupled.rl.commands.dry_run import PUBLISHED, memory_gib, rl_step_flops, scoring_cost_of, scoring_rows, shape_of
from coupled.rl.estimators import scoring_cost
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp
from coupled.rl.model.families import family_of
from coupled.rl.model.policy import Policy
from coupled.rl.objective.batch import micro_batches
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import TrainBatch

CANVAS = 8
GROUP = 3
SHARED = {
    "coupled, tail masked": Estimator(post_eos="mask"),
    "coupled normalized, tail masked": Estimator(weights="normalized", num_pairs=2, post_eos="mask"),
    "full_mask, tail masked": Estimator(name="full_mask", post_eos="mask"),
    "full_mask, tail masked, hidden prompt": Estimator(name="full_mask", post_eos="mask", prompt_mask_probability=0.5),
}


def groups(lengths: tuple[int, ...], steps: int) -> TrainBatch:
    """Completions of 3 prompts, `GROUP` of each, committed in `steps` steps."""
    parts = [make_batch([4] * GROUP, lengths, canvas=CANVAS, seed=p, shared_prompt=True) for p in range(3)]
    stream = np.random.default_rng(0)
    committed = np.stack([stream.permutation(np.arange(CANVAS) % steps) for _ in range(3 * GROUP)])
    return TrainBatch(
        uids=tuple(f"row-{i}" for i in range(3 * GROUP)),
        ids=torch.cat([p.ids for p in parts]),
        pad_lengths=torch.cat([p.pad_lengths for p in parts]),
        valid=torch.cat([p.valid for p in parts]),
        advantages=torch.cat([p.advantages for p in parts]),
        is_scored=torch.cat([p.is_scored for p in parts]),
        commit_step=torch.from_numpy(committed),
    )


@pytest.mark.parametrize("steps", [8, 4, 3, 1])
@every_estimator
def test_an_estimator_has_as_many_views_as_it_states(name: str, steps: int) -> None:
    draw = draw_masks(groups((CANVAS,) * GROUP, steps), VARIANTS[name], KEY)
    cost = scoring_cost(VARIANTS[name], CANVAS, steps)
    assert sum(not view.is_shared for view in draw.views) == cost.own_views
    assert sum(view.is_shared for view in draw.views) == cost.shared_views
    assert len(draw.views) == cost.views


@every_estimator
def test_an_estimator_scores_as_many_positions_as_it_states(name: str) -> None:
    """In the mean over 20 draws for 9 completions each."""
    batch, estimator = groups((CANVAS,) * GROUP, 4), VARIANTS[name]
    cost = scoring_cost(estimator, CANVAS, 4)
    counts = [int(view.scored.sum()) for key in range(20) for view in draw_masks(batch, estimator, (*KEY, key)).views]
    assert sum(counts) / 20 / len(batch) == pytest.approx(cost.scored, rel=0.1)


@pytest.mark.parametrize("micro", [3, 9, 4])
@pytest.mark.parametrize("name", [*VARIANTS, *SHARED])
@every_attention
@torch.no_grad()
def test_the_dry_run_counts_the_rows_of_real_forward_passes(
    tiny_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, name: str, micro: int, family: dict[str, int]
) -> None:
    policy, estimator = tiny_policy(**family), (VARIANTS | SHARED)[name]
    if estimator.post_eos == "mask" and not estimator.prompt_mask_probability:
        batch = groups((CANVAS, 5, 3), 4)
    else:  # completions that fill the canvas have equal inputs by chance, which the estimate does not count on
        batch = with_distinct_prompts(groups((CANVAS,) * GROUP, 4))
    rollout = {"canvas": CANVAS, "denoising_steps": 4, "group_size": GROUP, "num_prompts": 3}
    recipe = make_recipe(rollout=rollout, estimator=estimator, optimizer={"micro_batch_size": micro})
    # In blocks of 4, four steps are two for each block.
    assert scoring_cost_of(recipe, policy.family) == scoring_cost(estimator, CANVAS, 4)
    rows = count_rows(policy, monkeypatch)
    draw = draw_masks(batch, estimator, KEY)
    for part in micro_batches(len(batch), micro):
        estimate_logp(policy, batch.rows(part), draw.rows(part), estimator)
    assert sum(rows) == scoring_rows(recipe, policy.family, len(batch))


def with_distinct_prompts(batch: TrainBatch) -> TrainBatch:
    ids = batch.ids.clone()
    ids[:, -CANVAS - 1] = 10 + torch.arange(len(batch))
    return replace(batch, ids=ids)


def count_rows(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that the policy is called with to score, call by call."""
    rows: list[int] = []
    is_inside = False

    def counting(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(ids: Tensor, *arguments: Any) -> Tensor:
            nonlocal is_inside
            if is_inside:
                return score(ids, *arguments)
            rows.append(len(ids))
            is_inside = True
            try:
                return score(ids, *arguments)
            finally:
                is_inside = False

        return counted

    for name in ("logp_at", "logp_of"):
        monkeypatch.setattr(policy, name, counting(getattr(policy, name)))
    return rows


def test_left_to_right_scoring_costs_one_pass_per_position_of_the_canvas() -> None:
    """Once counted as three, whatever the estimator."""
    by_name = {}
    for name in ("coupled", "full_mask", "ar_order"):
        estimator = {"name": name, "post_eos": "excluded"}
        recipe = make_recipe(rollout={"canvas": 256, "denoising_steps": 256}, estimator=estimator)
        by_name[name] = scoring_rows(recipe, family_of(PUBLISHED["dream"]), 1)
    assert by_name == {"coupled": 3, "full_mask": 1, "ar_order": 256}


def test_memory_and_time_follow_the_views_of_the_estimator() -> None:
    family = family_of(PUBLISHED["dream"])
    shape = shape_of(family.translate(PUBLISHED["dream"]))
    rollout = {"canvas": 256, "denoising_steps": 256}
    coupled, in_order = (make_recipe(rollout=rollout, estimator={"name": n}) for n in ("coupled", "ar_order"))
    activations = [memory_gib(recipe, shape, family)["activations"] for recipe in (coupled, in_order)]
    assert activations[1] / activations[0] == pytest.approx(256 / 3)
    updates = [rl_step_flops(recipe, shape, family)["update"] for recipe in (coupled, in_order)]
    assert updates[1] / updates[0] == pytest.approx(256 / 3, rel=0.05)
