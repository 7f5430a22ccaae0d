"""Every estimator with its variants, and toy batches and runs to score with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from coupled.rl.judging.grader import Grader
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.objective import Estimator
from coupled.rl.rollout.engine import policy_engine
from coupled.rl.run import Run
from coupled.rl.run_folder.folder import RunFolder
from coupled.rl.types import MaskPair, TrainBatch
from helpers.toys import (
    make_batch,
    make_recipe,
)

KEY = (0, "mask", 1, 0)


MASK_ID = 2


def complementary(ratio: Tensor, first: Tensor, valid: Tensor) -> MaskPair:
    """The coupled pair of given masks: each valid position is masked in exactly one of the two."""
    return MaskPair(ratio=ratio, first=first & valid, second=valid & ~first)


VARIANTS = {
    "coupled": Estimator(),
    "coupled normalized": Estimator(weights="normalized", num_pairs=2),
    "coupled antithetic exact": Estimator(weights="antithetic", draw="exact_count"),
    "coupled unit, hidden prompt": Estimator(weights="unit", prompt_mask_probability=0.3),
    "decoupled": Estimator(name="decoupled", weights="antithetic"),
    "decoupled exact": Estimator(name="decoupled", draw="exact_count", num_pairs=2),
    "full_mask": Estimator(name="full_mask"),
    "full_mask, hidden prompt": Estimator(name="full_mask", prompt_mask_probability=0.15),
    "random_mask": Estimator(name="random_mask"),
    "random_mask exact": Estimator(name="random_mask", draw="exact_count"),
    "espo": Estimator(name="espo", num_pairs=2),
    "gdpo": Estimator(name="gdpo"),
    "trajectory": Estimator(name="trajectory"),
    "trajectory shrunk and sampled": Estimator(name="trajectory", shrink=4, num_sampled_steps=1),
    "ar_order": Estimator(name="ar_order"),
    "coupled, tail excluded": Estimator(num_pairs=2, post_eos="excluded"),
    "full_mask, tail excluded, hidden prompt": Estimator(
        name="full_mask", post_eos="excluded", prompt_mask_probability=0.3
    ),
    "espo, tail excluded": Estimator(name="espo", post_eos="excluded"),
    "trajectory, tail excluded": Estimator(name="trajectory", post_eos="excluded"),
    "ar_order, tail excluded": Estimator(name="ar_order", post_eos="excluded"),
}


every_estimator = pytest.mark.parametrize("name", VARIANTS)


FIVE = ([2, 6, 4, 3, 5], [6, 3, 5, 1, 2])


def with_steps(batch: TrainBatch, seed: int = 0) -> TrainBatch:
    """The batch with a random order of decoding, two positions in each step. Some positions after the end were never
    committed, and are MASK as a sampler leaves them."""
    stream = np.random.default_rng(seed)
    steps = np.stack([stream.permutation(batch.canvas_length) // 2 * 3 for _ in range(len(batch))])
    never = ~batch.valid.numpy() & (stream.random(steps.shape) < 0.5)
    ids = batch.ids.clone()
    ids[:, -batch.canvas_length :][torch.from_numpy(never)] = MASK_ID
    return replace(batch, ids=ids, commit_step=torch.from_numpy(np.where(never, -1, steps)))


def five(canvas: int = 6) -> TrainBatch:
    return with_steps(make_batch(*FIVE, canvas=canvas))


every_attention = pytest.mark.parametrize("family", [{}, {"shift": 0, "block_length": 4}], ids=["full", "blocks"])


def flat_gradient(policy: Policy) -> Tensor:
    flat = torch.cat([p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None])
    policy.model.zero_grad(set_to_none=True)
    return flat


def open_toy_run(policy: Policy, folder: Path, estimator: Estimator, **sections: object) -> Run:
    recipe = make_recipe(estimator=estimator, **sections)
    return Run(recipe, policy, [], [], Grader.__new__(Grader), RunFolder(folder, keep=1), policy_engine(policy, 4))
