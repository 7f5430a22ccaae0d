"""A trainer of 1, 2 or 4 ranks on toy batches, of RL or of likelihood training. As a program it is one of four
processes that go through all cases.

python rank_cases.py INDEX PORT FOLDER      FOLDER/cases.pt: name → Case; results: FOLDER/NAME-RANKS.pt
"""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from coupled.rl.estimators.draw import draw_masks
from coupled.rl.likelihood.batch import PackedRow, collate
from coupled.rl.likelihood.objective import draw_noise
from coupled.rl.likelihood.samples import Example
from coupled.rl.model.open import open_policy
from coupled.rl.recipe.likelihood import Fit
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import LikelihoodRecipe, Recipe, recipe_class
from coupled.rl.trainer.collectives import ALONE, Ranks, join
from coupled.rl.trainer.learner import Learner
from coupled.rl.trainer.likelihood_learner import LikelihoodLearner
from coupled.rl.trainer.rl_learner import RLLearner
from coupled.rl.types import MaskDraw, TrainBatch
from helpers.toys import FIRST_LETTER, NUM_TOKENS, make_batch, make_requests

NUM_PROCESSES = 4
TESTS = Path(__file__).parents[1]
NUM_STEPS = 3
ONES = ((3, 5, 2, 3, 4), (1, 4, 1, 1, 2))
NINE = ((3, 5, 2, 3, 4, 2, 6, 3, 4), (6, 4, 2, 6, 5, 1, 6, 3, 6))
"""Five micro-batches of two: they come out even on no number of ranks."""
TOLERANCE = 1e-6
NORM_TOLERANCE = 4e-6
"""Relative, for gradient norms: sums of squares in fp32, in an order that depends on split and processor."""
ADAPTER = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "v_proj", "down_proj")}
SAMPLER = Sampler(canvas=6, denoising_steps=6, temperature=1.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training case: recipe, start and outputs."""

    recipe: dict[str, Any]
    num_ranks: tuple[int, ...] = (2, 4)
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = NINE
    resumes: Path | None = None
    """A checkpoint after step 2 to resume from."""
    writes: Path | None = None
    """Folder for a checkpoint after step 2."""
    num_requests: int = 5
    """Rollouts before and after; with 1 only the first rank makes passes without gradients."""


def batch_and_draws(case: Case, recipe: Recipe, step: int) -> tuple[TrainBatch, list[MaskDraw]]:
    batch = make_batch(*case.lengths, seed=step)
    keys = [(0, "mask", step, inner) for inner in range(recipe.num_updates)]
    return batch, [draw_masks(batch, recipe.estimator, key) for key in keys]


def run_case(case: Case, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Three steps; losses, norms, weights and other results to compare."""
    recipe = recipe_class(case.recipe["stage"]).model_validate(case.recipe)
    return _rl_case(case, recipe, ranks) if recipe.stage == "rl" else _fit_case(case, recipe, ranks)


def _rl_case(case: Case, recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """Steps of two updates each; also the reference, and rollouts before and after."""
    policy = open_policy(recipe.model, recipe.seed)
    learner = RLLearner(recipe, policy, ranks)
    start, first = _begun(case, learner)
    requests = make_requests(case.num_requests)
    before = learner.generate(requests, SAMPLER, seed=0, weight_version=0)
    updates = []
    for step in range(first, NUM_STEPS + 1):
        batch, draws = batch_and_draws(case, recipe, step)
        anchors = [learner.anchor(batch, masks, is_first=inner == 0) for inner, masks in enumerate(draws)]
        updates += [learner.update(step, batch, m, a) for m, a in zip(draws, anchors, strict=True)]
        learner.sync_reference(step)
        _write_if_due(case, learner, ranks, step)
    after = learner.generate(requests, SAMPLER, seed=0, weight_version=1)
    return {
        "losses": [update.sums.get("loss") for update in updates],
        "norms": [update.grad_norm for update in updates],
        "reference": learner.reference.state() if learner.reference.kind == "moving" else {},
        "before": [r.canvas_ids.tolist() for r in before],
        "after": [r.canvas_ids.tolist() for r in after],
        **_trained(learner, start),
    }


def _fit_case(case: Case, recipe: LikelihoodRecipe, ranks: Ranks) -> dict[str, Any]:
    """Steps of one update each; also how many positions of each row were masked."""
    policy = open_policy(recipe.model, recipe.seed)
    learner = LikelihoodLearner(recipe, policy, ranks)
    start, first = _begun(case, learner)
    updates, masked = [], []
    for step in range(first, NUM_STEPS + 1):
        batch = collate(packed_rows(recipe.fit, step), policy, recipe.fit)
        noise = draw_noise(batch, recipe.fit, recipe.seed, step - 1)
        updates.append(learner.fit(step - 1, batch, noise))
        masked.append(noise.masked.sum(-1).tolist())
        _write_if_due(case, learner, ranks, step)
    return {
        "losses": [update.loss for update in updates],
        "norms": [update.grad_norm for update in updates],
        "reference": {},
        "masked": masked,
        **_trained(learner, start),
    }


def packed_rows(fit: Fit, step: int) -> list[PackedRow]:
    """Random samples, one a row, or two and now and then a text where rows are packed."""
    stream = np.random.default_rng(step)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(stream.integers(FIRST_LETTER, NUM_TOKENS, stream.integers(low, high)).tolist())

    def row(number: int) -> PackedRow:
        samples = [Example(prompt_ids=tokens(1, 6), response_ids=tokens(2, 9)) for _ in range(2 if fit.context else 1)]
        is_text = bool(fit.context) and number % 4 == 3
        return (*samples, *([Example(prompt_ids=(), response_ids=tokens(3, 8))] if is_text else []))

    return [row(number) for number in range(fit.batch_size)]


def _begun(case: Case, learner: Learner) -> tuple[dict[str, torch.Tensor], int]:
    start = {name: tensor.clone() for name, tensor in learner.trainable_state().items()}
    return start, 1 if case.resumes is None else learner.read(case.resumes)["step"] + 1


def _write_if_due(case: Case, learner: Learner, ranks: Ranks, step: int) -> None:
    if case.writes is not None and step == 2:
        folder = case.writes / f"from-{ranks.size}"
        folder.mkdir(parents=True, exist_ok=True)
        learner.write(folder, {"step": step})


def _trained(learner: Learner, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    mine = learner.policy.trainable_parameters()
    return {
        "start": start,
        "weights": learner.trainable_state(),
        "is_sharded": learner.is_sharded,
        "local_numbers": sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in mine),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal but for rounding."""
    assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], abs=TOLERANCE, rel=NORM_TOLERANCE)
    for part in ("weights", "reference"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            torch.testing.assert_close(found[part][name], tensor, atol=TOLERANCE, rtol=0, msg=name)


def assert_goes_on(found: dict[str, Any], whole: dict[str, Any]) -> None:
    """The third step after a resumption equals the third step of the uninterrupted run."""
    num_done = len(whole["losses"]) * 2 // NUM_STEPS
    assert len(found["losses"]) == len(whole["losses"]) - num_done
    joined = {part: whole[part][:num_done] + found[part] for part in ("losses", "norms")}
    assert_same(found | joined, whole)


def run_together(cases: dict[str, Case], folder: Path) -> dict[str, dict[str, Any]]:
    """Results of several ranks, by `name-ranks`: four processes go through all cases, so that they start once."""
    torch.save(cases, folder / "cases.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-W", "ignore", "-m", "helpers.rank_cases"]
    logs = [folder / f"rank_{index}.log" for index in range(NUM_PROCESSES)]
    processes = []
    for index, log in enumerate(logs):
        with log.open("wb") as out:
            command = [*program, str(index), str(port), str(folder)]
            processes.append(subprocess.Popen(command, cwd=TESTS, stdout=out, stderr=subprocess.STDOUT))
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=600) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {file.stem: torch.load(file, weights_only=False) for file in folder.glob("*-[24].pt")}


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
