"""The gradient of one micro-batch: estimate, loss, backward."""

from __future__ import annotations

import torch

from coupled.rl.estimators.score import backward_by_view, estimate_logp
from coupled.rl.model.policy import Policy
from coupled.rl.objective.loss import coupled_grpo_loss
from coupled.rl.recipe.objective import Estimator, Loss
from coupled.rl.types import Anchor, LossOutput, MaskDraw, TrainBatch


def add_gradient(
    policy: Policy,
    batch: TrainBatch,
    masks: MaskDraw,
    anchor: Anchor,
    estimator: Estimator,
    loss: Loss,
    temperature: float,
    denominator: int,
    *,
    has_two_passes: bool = False,
    is_silent: bool = False,
    skips_empty_views: bool = True,
) -> LossOutput:
    """Add these rows' share of the gradient of the loss of the whole batch, which is divided by `denominator`.

    `is_silent`: make the same passes and add nothing; other ranks need this rank's share of every layer.
    `skips_empty_views`: as for `estimate_logp`.

    With `has_two_passes` the scores are first estimated without gradients, the loss is differentiated at
    them, and the scores then view by view: the memory of one masked input, for one more forward pass of each.
    """
    with torch.set_grad_enabled(not has_two_passes):
        new = estimate_logp(policy, batch, masks, estimator, temperature, skips_empty_views=skips_empty_views)
    if has_two_passes:
        new.requires_grad_()
    old = new.detach() if anchor.old is None else anchor.old
    pulls_to_old = loss.kl_beta > 0 and loss.reference == "old"
    reference = old if pulls_to_old else anchor.reference
    output = coupled_grpo_loss(new, old, reference, batch.advantages, batch.valid, denominator, loss)
    (0 * output.loss if is_silent else output.loss).backward()
    if has_two_passes:
        assert new.grad is not None, "new is a leaf, and the loss depends on it"
        backward_by_view(policy, batch, masks, estimator, new.grad, temperature, skips_empty_views=skips_empty_views)
    return output
