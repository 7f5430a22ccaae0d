"""The learner of the RL stage on one rank: scores, updates, rollouts and the parity check.

Alone it is the whole trainer. Among N ranks (`rank_group`) each takes every N-th micro-batch and every N-th batch of
rollouts, cut as one rank would cut them, and the results are added up. Adapters are replicated; whole models are split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from coupled.rl.estimators.score import estimate_logp
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import reference_kind
from coupled.rl.model.weights import load_trainable_state, trainable_state
from coupled.rl.objective.batch import micro_batches
from coupled.rl.objective.gradient import add_gradient
from coupled.rl.objective.loss import add_sums, loss_denominator
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.recipe.schema import Recipe
from coupled.rl.rollout.engine import request_chunks, roll_out
from coupled.rl.rollout.parity import check_parity
from coupled.rl.rollout.sampler import Request
from coupled.rl.trainer.collectives import ALONE, Ranks
from coupled.rl.trainer.learner import Learner
from coupled.rl.types import Anchor, MaskDraw, Prompt, Rollout, TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Result of one optimizer step. Example: loss and token sums of the batch, gradient norm 0.3, rate 1e-6."""

    sums: dict[str, float]
    """Sums over the whole batch, to be divided by its tokens; on the first rank."""
    grad_norm: float
    """Norm of the joint gradient, before clipping."""
    learning_rate: float


class RLLearner(Learner):
    """Policy, reference and optimizer of one rank. With several ranks, every method is called on all of them."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, policy: Policy, ranks: Ranks = ALONE) -> None:
        super().__init__(recipe, policy, ranks, reference_kind(recipe.loss, has_adapter=policy.has_adapter))
        scored_at = recipe.estimator.temperature
        self.temperature = recipe.rollout.temperature if scored_at is None else scored_at

    # --- scoring and updates ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def anchor(
        self, batch: TrainBatch, masks: MaskDraw, *, is_first: bool, earlier: dict[str, Tensor] | None = None
    ) -> Anchor:
        """Scores under the rollout policy and the reference, before any weight moves.

        For the first update the rollout policy *is* the policy: its scores come from the update's own forward pass
        instead of a second one. There are none where the loss ignores them.

        Args:
            earlier: the weights that rolled out, as `trainable_state` returned them; None for the present ones.
        """
        loss = self.recipe.loss
        old = None
        if loss.has_old and (earlier is not None or not is_first):
            with self._under(earlier), self._whole():
                old = self.scores(self.policy, batch, masks)
        reference = None
        if self.reference.kind != "none":
            with self.reference.policy() as frozen, self._whole(is_reference=True):
                reference = self.scores(frozen, batch, masks)
        return Anchor(old=old, reference=reference)

    @torch.no_grad()
    def present_scores(self, batch: TrainBatch, masks: MaskDraw) -> Tensor:
        """`scores` under the present weights."""
        with self._whole():
            return self.scores(self.policy, batch, masks)

    def scores(self, policy: Policy, batch: TrainBatch, masks: MaskDraw) -> Tensor:
        """s of every row [B, C]; each rank scores a part of the micro-batches."""
        estimator, size = self.recipe.estimator, self.recipe.optimizer.micro_batch_size
        all_rows = list(micro_batches(len(batch), size))
        mine = [
            estimate_logp(policy, batch.rows(rows), masks.rows(rows), estimator, self.temperature)
            for rows in self._ranks.share(all_rows)
        ]
        if self._ranks.size == 1:
            return torch.cat(mine)
        found = torch.zeros(batch.valid.shape, device=batch.ids.device)
        for rows, scores in zip(self._ranks.share(all_rows), mine, strict=True):
            found[rows] = scores
        return self._ranks.add(found)

    def update(self, step: int, batch: TrainBatch, masks: MaskDraw, anchor: Anchor) -> Update:
        """One clipped optimizer step on the whole batch, in micro-batches whose gradients add up to the joint one."""
        recipe = self.recipe
        denominator = loss_denominator(batch.valid, recipe.loss.norm)
        sums: dict[str, float] = {}
        parts = micro_batches(len(batch), recipe.optimizer.micro_batch_size)
        with self._training():
            for rows, is_silent in self._passes([rows for rows in parts if batch.rows(rows).valid.any()]):
                output = add_gradient(
                    self.policy,
                    batch.rows(rows),
                    masks.rows(rows),
                    anchor.rows(rows),
                    recipe.estimator,
                    recipe.loss,
                    self.temperature,
                    denominator,
                    has_two_passes=recipe.optimizer.has_two_passes,
                    is_silent=is_silent,
                    skips_empty_views=not self.is_sharded,
                )
                if not is_silent:
                    add_sums(sums, output.sums)
        if bool(batch.valid.any()):
            self._add_gradients()
        if self._ranks.size > 1:
            gathered, sums = self._ranks.gather(sums), {}
            for part in gathered:
                add_sums(sums, part)
        norm, rate = self._apply(step - 1)
        return Update(sums=sums, grad_norm=norm, learning_rate=rate)

    def sync_reference(self, step: int) -> None:
        """Mix the policy into a moving reference every `sync_every` steps; other kinds stay unchanged."""
        loss = self.recipe.loss
        if self.reference.kind == "moving" and step % loss.sync_every == 0:
            self.reference.mix(loss.sync_mix)

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int, weight_version: int) -> list[Rollout]:
        """Denoise under the present weights, each rank a part of the batches. The first rank returns all rollouts."""
        made: dict[str, Rollout] = {}
        with self._whole():
            for chunk in self._ranks.share(request_chunks(requests, self.recipe.rollout.batch_size)):
                rollouts = roll_out(self.policy, chunk, sampler, seed=seed, weight_version=weight_version)
                made.update((r.uid, r) for r in rollouts)
        for part in self._ranks.gather(made):
            made |= part
        return [made[r.uid] for r in requests] if self._ranks.is_first else []

    def check_parity(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> float:
        """`parity.check_parity` on the first rank; the others contribute their shares of the weights."""
        # A recipe may score at another temperature on purpose; the check is for unintended differences.
        is_chosen = self.recipe.estimator.temperature is not None
        temperature = self.recipe.rollout.temperature if is_chosen else self.temperature
        with self._whole():
            if not self._ranks.is_first:
                return 0.0
            return check_parity(self.policy, prompts, rollouts, temperature, self.recipe.optimizer.micro_batch_size)

    @contextmanager
    def _under(self, earlier: dict[str, Tensor] | None) -> Iterator[None]:
        """Give the policy earlier weights for the duration of the block."""
        if earlier is None:
            yield
            return
        present = {name: tensor.clone() for name, tensor in trainable_state(self.policy).items()}
        load_trainable_state(self.policy, earlier)
        try:
            yield
        finally:
            load_trainable_state(self.policy, present)

    def _whole(self, *, is_reference: bool = False) -> AbstractContextManager[None]:
        shards = self._reference_shards if is_reference else self._shards
        return nullcontext() if shards is None else shards.whole()
