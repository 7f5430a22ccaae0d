"""A trainer of 1, 2 or 4 ranks on toy batches. As a program it is one of four processes that go through all cases.

python rank_cases.py INDEX PORT FOLDER      FOLDER/cases.pt: name → Case; results: FOLDER/NAME-RANKS.pt
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from toys import make_batch, make_requests

from coupled.rl.checkpoint import open_policy
from coupled.rl.denoise import Sampler
from coupled.rl.learner import Learner
from coupled.rl.masking import draw_masks
from coupled.rl.ranks import ALONE, Ranks, join
from coupled.rl.recipe import Recipe
from coupled.rl.types import MaskDraw, TrainBatch

NUM_PROCESSES = 4
NUM_STEPS = 3
ONES = ((3, 5, 2, 3, 4), (1, 4, 1, 1, 2))
NINE = ((3, 5, 2, 3, 4, 2, 6, 3, 4), (6, 4, 2, 6, 5, 1, 6, 3, 6))
"""Five micro-batches of two: they come out even on no number of ranks."""
SAMPLER = Sampler(canvas=6, denoising_steps=6, temperature=1.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and from where."""

    recipe: dict[str, Any]
    num_ranks: tuple[int, ...] = (2, 4)
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = NINE
    resumes: Path | None = None
    """A checkpoint after step 2, to go on from."""
    writes: Path | None = None
    """Where to write a checkpoint after step 2."""
    num_requests: int = 5
    """Rollouts before and after; with 1 only the first rank makes passes without gradients."""


def batch_and_draws(case: Case, recipe: Recipe, step: int) -> tuple[TrainBatch, list[MaskDraw]]:
    batch = make_batch(*case.lengths, seed=step)
    keys = [(0, "mask", step, inner) for inner in range(recipe.num_updates)]
    return batch, [draw_masks(batch, recipe.estimator, key) for key in keys]


def run_case(case: Case, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Three steps of two updates each; losses, norms, weights, reference, and rollouts before and after."""
    recipe = Recipe.model_validate(case.recipe)
    policy = open_policy(recipe.model, recipe.seed)
    learner = Learner(recipe, policy, ranks)
    start = {name: tensor.clone() for name, tensor in learner.trainable_state().items()}
    first = 1 if case.resumes is None else learner.read(case.resumes)["step"] + 1
    requests = make_requests(case.num_requests)
    before = learner.generate(requests, SAMPLER, seed=0, weight_version=0)
    updates = []
    for step in range(first, NUM_STEPS + 1):
        batch, draws = batch_and_draws(case, recipe, step)
        anchors = [learner.anchor(batch, masks, is_first=inner == 0) for inner, masks in enumerate(draws)]
        updates += [learner.update(step, batch, m, a) for m, a in zip(draws, anchors, strict=True)]
        learner.sync_reference(step)
        if case.writes is not None and step == 2:
            folder = case.writes / f"from-{ranks.size}"
            folder.mkdir(parents=True, exist_ok=True)
            learner.write(folder, {"step": step})
    after = learner.generate(requests, SAMPLER, seed=0, weight_version=1)
    return {
        "losses": [update.sums.get("loss") for update in updates],
        "norms": [update.grad_norm for update in updates],
        "start": start,
        "weights": policy.trainable_state(),
        "reference": policy.reference_state() if policy.has_moving_reference else {},
        "before": [r.canvas_ids.tolist() for r in before],
        "after": [r.canvas_ids.tolist() for r in after],
        "is_sharded": learner.is_sharded,
        "local_numbers": sum(
            (p.to_local() if hasattr(p, "to_local") else p).numel() for p in policy.trainable_parameters()
        ),
    }


def main(index: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=index == 0, wait_for_workers=False)
    cases: dict[str, Case] = torch.load(folder / "cases.pt", weights_only=False)
    for name, case in cases.items():
        for size in case.num_ranks:
            if index < size:
                own = dist.PrefixStore(f"{name}-{size}", store)
                ranks = join(own, index=index, size=size, is_gpu=False, timeout_seconds=300)
                found = run_case(case, ranks)
                if ranks.is_first:
                    torch.save(found, folder / f"{name}-{size}.pt")
                ranks.leave()
    store.set(f"finished/{index}", "")
    store.wait([f"finished/{i}" for i in range(NUM_PROCESSES)], timedelta(seconds=300))
    if index == 0:  # it holds the store
        store.wait([f"gone/{i}" for i in range(1, NUM_PROCESSES)], timedelta(seconds=60))
    else:
        store.set(f"gone/{index}", "")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
