"""The update in two passes, one masked input at a time: the gradient of the joint one, in the memory of one input."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from helpers.estimator_cases import KEY, VARIANTS, every_estimator, five, flat_gradient, open_toy_run
from helpers.toys import MakePolicy
from torch import Tensor

import coupled.rl.run as run_module
import coupled.rl.trainer.learner as trained_module
from coupled.rl.estimators.draw import draw_masks
from coupled.rl.estimators.score import estimate_logp
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.objective import Estimator
from coupled.rl.types import Anchor, TrainBatch

pytestmark = pytest.mark.slow

ROLLOUT = {"canvas": 6, "denoising_steps": 6, "temperature": 1.0}


def moved_anchor(policy: Policy, batch: TrainBatch, estimator: Estimator) -> Anchor:
    """Far enough from the policy that some ratios are clipped."""
    with torch.no_grad():
        scores = estimate_logp(policy, batch, draw_masks(batch, estimator, KEY), estimator)
    stream = torch.Generator().manual_seed(3)
    old, reference = (
        scores + 0.6 * torch.randn(scores.shape, generator=stream) * batch.valid for _ in ("old", "reference")
    )
    return Anchor(old=old, reference=reference)


class Updates:
    """Gradients and sums of updates, which leave the weights as they are."""

    def __init__(self, policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policy = policy
        self._folder = folder
        self.gradients: list[Tensor] = []
        self.sums: list[dict[str, float]] = []
        monkeypatch.setattr(
            trained_module,
            "apply_step",
            lambda optimizer, policy, *rest: self.gradients.append(flat_gradient(policy)) or 1.0,
        )
        monkeypatch.setattr(run_module.StepMetrics, "of_update", lambda _, found, *rest: self.sums.append(found))

    def run(
        self,
        batch: TrainBatch,
        estimator: Estimator,
        anchor: Anchor | None,
        *,
        size: int,
        has_two_passes: bool,
        loss: dict[str, object],
    ) -> None:
        run = open_toy_run(
            self.policy,
            self._folder,
            estimator,
            loss=loss,
            optimizer={"micro_batch_size": size, "has_two_passes": has_two_passes},
            rollout=ROLLOUT,
        )
        draw = draw_masks(batch, estimator, KEY)
        run.update(1, batch, draw, run.anchor(batch, draw, is_first=True) if anchor is None else anchor)


@every_estimator
def test_two_passes_have_the_gradient_and_the_metrics_of_one_for_any_split(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    policy, batch, estimator = tiny_policy(), five(), VARIANTS[name]
    assert batch.pad_lengths.any()
    anchor = moved_anchor(policy, batch, estimator)
    updates = Updates(policy, tmp_path, monkeypatch)
    for size, has_two_passes in ((5, False), (5, True), (2, True), (1, True)):
        updates.run(batch, estimator, anchor, size=size, has_two_passes=has_two_passes, loss={"kl_beta": 0.2})
    joint, *others = updates.gradients
    assert joint.norm() > 1e-3
    assert updates.sums[0]["clip_low"] + updates.sums[0]["clip_high"] > 0, "a batch without clipping would test less"
    for gradient, sums in zip(others, updates.sums[1:], strict=True):
        torch.testing.assert_close(gradient, joint, atol=2e-5, rtol=1e-4)
        assert sums == pytest.approx(updates.sums[0], rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        {"ratio": "sequence", "norm": "sequence", "kl_beta": 0.1},
        {"norm": "fixed", "kl": "k2", "kl_beta": 0.5, "dual_clip": 1.1},
        {"kl_beta": 0.3, "reference": "old"},
        {"kl_beta": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("name", ["coupled", "espo"])
def test_so_they_have_for_every_loss_in_first_and_later_updates(
    tiny_policy: MakePolicy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    is_first: bool,
    loss: dict[str, object],
) -> None:
    policy, batch, estimator = tiny_policy(), five(), VARIANTS[name]
    anchor = None if is_first else moved_anchor(policy, batch, estimator)
    updates = Updates(policy, tmp_path, monkeypatch)
    for has_two_passes in (False, True):
        updates.run(batch, estimator, anchor, size=2, has_two_passes=has_two_passes, loss=loss)
    joint, split = updates.gradients
    assert joint.norm() > 1e-4
    torch.testing.assert_close(split, joint, atol=2e-5, rtol=1e-4)
    assert updates.sums[1] == pytest.approx(updates.sums[0], rel=1e-4)
    if is_first:
        assert updates.sums[1]["ratio"] == updates.sums[1]["tokens"], "old is what the first pass found: exactly 1 each"


@pytest.mark.parametrize(("num_pairs", "views"), [(1, 3), (3, 7)])
def test_no_two_masked_inputs_are_in_memory_together(
    tiny_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_pairs: int, views: int
) -> None:
    """What a forward pass leaves for its backward pass is gone before the next one begins, and none has two views."""
    policy, batch = tiny_policy(), five()
    alive: list[int] = []
    rows: list[int] = []
    graphs: list[weakref.ref[Tensor]] = []
    plain = policy.hidden_at

    def spy(ids: Tensor, *rest: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(ids, *rest)
        alive.append(sum(graph() is not None for graph in graphs))
        rows.append(len(ids))
        hidden = plain(ids, *rest)
        graphs.append(weakref.ref(hidden))
        return hidden

    monkeypatch.setattr(policy, "hidden_at", spy)
    updates = Updates(policy, tmp_path, monkeypatch)
    estimator = Estimator(num_pairs=num_pairs)
    for has_two_passes in (True, False):
        updates.run(batch, estimator, None, size=5, has_two_passes=has_two_passes, loss={"kl_beta": 0.0})
        if has_two_passes:
            assert alive == [0] * views
            assert max(rows) <= len(batch)
            alive.clear()
    assert max(alive) == num_pairs, "in one pass they all are"
