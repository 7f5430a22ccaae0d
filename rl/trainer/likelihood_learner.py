"""The learner of the likelihood stages on one rank: the gradient of a step, micro-batch by micro-batch, and the step.

Among N ranks each takes every N-th micro-batch, cut as one rank would cut them. Losses are divided by the denominator
of the whole batch, so that gradients add up.
"""

from __future__ import annotations

from dataclasses import dataclass

from coupled.rl.likelihood.batch import LikelihoodBatch
from coupled.rl.likelihood.objective import Noise, block_length_of, fit_loss
from coupled.rl.model.policy import Policy
from coupled.rl.objective.batch import micro_batches
from coupled.rl.recipe.schema import LikelihoodRecipe
from coupled.rl.trainer.collectives import ALONE, Ranks
from coupled.rl.trainer.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodUpdate:
    """Result of one optimizer step. Example: loss 0.14, gradient norm 0.5, rate 2e-4."""

    loss: float
    """Mean over the whole batch, in nats per position; on the first rank."""
    grad_norm: float
    """Norm of the joint gradient, before clipping."""
    learning_rate: float


class LikelihoodLearner(Learner):
    """Policy and optimizer of one rank. The recipe's objective must be settled."""

    recipe: LikelihoodRecipe

    def __init__(self, recipe: LikelihoodRecipe, policy: Policy, ranks: Ranks = ALONE) -> None:
        # The objective decides the attention, which is saved with the model, so that rollout and evaluation use it.
        policy.attend(block_length_of(recipe.fit))
        super().__init__(recipe, policy, ranks)

    def fit(self, step: int, batch: LikelihoodBatch, noise: Noise) -> LikelihoodUpdate:
        """Optimizer step `step` (from 0) on the whole batch.

        The number of forward passes depends on the number of rows alone, because ranks gather layers together.
        """
        recipe, total = self.recipe, 0.0
        num_positions = int(batch.carries_loss.sum())
        parts = list(micro_batches(len(batch.ids), recipe.fit_micro_batch_size))
        with self._training():
            for rows, is_silent in self._passes(parts):
                loss = fit_loss(
                    self.policy,
                    batch.rows(rows),
                    noise.rows(rows),
                    recipe.fit,
                    num_positions,
                    seed=recipe.seed,
                    step=step,
                )
                (0 * loss if is_silent else loss).backward()
                total += 0.0 if is_silent else loss.item()
        self._add_gradients()
        norm, rate = self._apply(step)
        return LikelihoodUpdate(loss=sum(self._ranks.gather(total), 0.0), grad_norm=norm, learning_rate=rate)
