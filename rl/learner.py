"""What is trained, on one rank: policy, reference and optimizer, and everything a run does with them.

Alone it is the whole trainer. Among N ranks (`gang`) each takes every N-th micro-batch and every N-th batch of
rollouts, cut as one rank would cut them; what they give is added up. Adapters are replicated, all weights are split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coupled.rl.batch import micro_batches
from coupled.rl.checkpoint import read_checkpoint, write_checkpoint, write_sharded_checkpoint
from coupled.rl.denoise import Request, Sampler
from coupled.rl.engine import request_chunks, roll_out
from coupled.rl.gradient_checkpointing import checkpoint_gradients
from coupled.rl.logprob import estimate_logp
from coupled.rl.loss import loss_denominator
from coupled.rl.metrics import add_sums
from coupled.rl.optimizer import apply_step, learning_rate, make_optimizer
from coupled.rl.parity import check_parity
from coupled.rl.policy import Policy
from coupled.rl.ranks import ALONE, Ranks, add_gradients
from coupled.rl.recipe import Recipe
from coupled.rl.types import Anchor, MaskDraw, Prompt, Rollout, TrainBatch
from coupled.rl.update import add_gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one optimizer step did. Example: loss and token sums of the batch, gradient norm 0.3, rate 1e-6."""

    sums: dict[str, float]
    """Of the whole batch, to be divided by its tokens; on the first rank."""
    grad_norm: float
    """Of the joint gradient, before clipping."""
    learning_rate: float


class Learner:
    """Policy, reference and optimizer of one rank. With several ranks, every method is called on all of them."""

    def __init__(self, recipe: Recipe, policy: Policy, ranks: Ranks = ALONE) -> None:
        self.recipe = recipe
        self.policy = policy
        scored_at = recipe.estimator.temperature
        self.temperature = recipe.rollout.temperature if scored_at is None else scored_at
        self._ranks = ranks
        self.on_progress: Callable[[], None] = lambda: None
        """Called for each part of a long call, by whoever does the work."""
        has_reference = recipe.loss.kl_beta > 0 and recipe.loss.reference != "old"
        is_moving = has_reference and recipe.loss.reference == "synced"
        self._shards: Any = None
        self._reference_shards: Any = None
        if ranks.size > 1 and not policy.has_adapter:
            from coupled.rl.sharding import shard

            self._shards, self._reference_shards = shard(
                policy, ranks.size, has_reference=has_reference, is_moving=is_moving
            )
        elif has_reference:
            policy.freeze_reference(is_moving=is_moving)
        self._optimizer = make_optimizer(policy, recipe.optimizer)
        if recipe.optimizer.has_gradient_checkpointing:
            checkpoint_gradients(policy)

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds a part of the weights."""
        return self._shards is not None

    # --- scoring and updates ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def anchor(
        self, batch: TrainBatch, masks: MaskDraw, *, is_first: bool, earlier: dict[str, Tensor] | None = None
    ) -> Anchor:
        """Scores under the rollout policy and the reference, before any weight moves.

        For the first update the rollout policy *is* the policy: its scores are taken from the update's own forward
        pass instead of a second one. So they are where the loss makes no use of them.

        Args:
            earlier: the weights that rolled out, as `trainable_state` gave them, if they are not those that are there.
        """
        loss = self.recipe.loss
        old = None
        if loss.has_old and (earlier is not None or not is_first):
            with self._under(earlier), self._whole():
                old = self.scores(self.policy, batch, masks)
        reference = None
        if loss.kl_beta > 0 and loss.reference != "old":
            with self.policy.reference() as frozen, self._whole(is_reference=True):
                reference = self.scores(frozen, batch, masks)
        return Anchor(old=old, reference=reference)

    @torch.no_grad()
    def present_scores(self, batch: TrainBatch, masks: MaskDraw) -> Tensor:
        """`scores` under the weights that are there."""
        with self._whole():
            return self.scores(self.policy, batch, masks)

    def scores(self, policy: Policy, batch: TrainBatch, masks: MaskDraw) -> Tensor:
        """s of every row [B, C], each rank scoring some of the micro-batches."""
        estimator, size = self.recipe.estimator, self.recipe.optimizer.micro_batch_size
        all_rows = list(micro_batches(len(batch), size))
        mine = []
        for rows in self._ranks.share(all_rows):
            self.on_progress()
            mine.append(estimate_logp(policy, batch.rows(rows), masks.rows(rows), estimator, self.temperature))
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
        with self._training():
            for rows, is_silent in self._to_train_on(batch):
                self.on_progress()
                output = add_gradient(
                    self.policy,
                    batch.rows(rows),
                    masks.rows(rows),
                    anchor.rows(rows),
                    recipe,
                    self.temperature,
                    denominator,
                    is_silent=is_silent,
                )
                if not is_silent:
                    add_sums(sums, output.sums)
        if self._ranks.size > 1:
            if not self.is_sharded and bool(batch.valid.any()):
                add_gradients(self._ranks, self.policy.trainable_parameters())
            parts, sums = self._ranks.gather(sums), {}
            for part in parts:
                add_sums(sums, part)
        rate = learning_rate(step - 1, recipe.num_steps, recipe.optimizer)
        norm = apply_step(self._optimizer, self.policy, rate, recipe.optimizer.max_grad_norm)
        return Update(sums=sums, grad_norm=norm, learning_rate=rate)

    def _to_train_on(self, batch: TrainBatch) -> Iterator[tuple[slice, bool]]:
        """This rank's micro-batches that carry loss. Where weights are split every rank makes as many passes as the
        others, if need be over rows that another one counts."""
        size = self.recipe.optimizer.micro_batch_size
        kept = [rows for rows in micro_batches(len(batch), size) if batch.rows(rows).valid.any()]
        mine = self._ranks.share(kept)
        yield from ((rows, False) for rows in mine)
        if self.is_sharded and len(mine) < -(-len(kept) // self._ranks.size):
            yield kept[0], True

    def sync_reference(self, step: int) -> None:
        """Let a `synced` reference follow the policy, every `sync_every` steps; others stay where they are."""
        loss = self.recipe.loss
        if self.policy.has_moving_reference and step % loss.sync_every == 0:
            self.policy.mix_reference(loss.sync_mix)

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def generate(self, requests: list[Request], sampler: Sampler, *, seed: int, weight_version: int) -> list[Rollout]:
        """Denoise under the present weights, each rank some of the batches; all rollouts are on the first rank."""
        made: dict[str, Rollout] = {}
        with self._whole():
            for chunk in self._ranks.share(request_chunks(requests, self.recipe.rollout.batch_size)):
                self.on_progress()
                rollouts = roll_out(self.policy, chunk, sampler, seed=seed, weight_version=weight_version)
                made.update((r.uid, r) for r in rollouts)
        for part in self._ranks.gather(made):
            made |= part
        return [made[r.uid] for r in requests] if self._ranks.is_first else []

    def check_parity(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> float:
        """`parity.check_parity` on the first rank; the others lend it their weights."""
        # A recipe may score at another temperature on purpose; that is not what is looked for here.
        is_chosen = self.recipe.estimator.temperature is not None
        temperature = self.recipe.rollout.temperature if is_chosen else self.temperature
        with self._whole():
            if not self._ranks.is_first:
                return 0.0
            return check_parity(self.policy, prompts, rollouts, temperature, self.recipe.optimizer.micro_batch_size)

    def trainable_state(self) -> dict[str, Tensor]:
        """Name → tensor of everything that training changes, whole and on the CPU: what rollout workers are given."""
        return self.policy.trainable_state()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def write(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint; `state` is kept with it."""
        if self.is_sharded:
            is_first = self._ranks.is_first
            write_sharded_checkpoint(folder, self.policy, self._optimizer, state, is_first=is_first)
        elif self._ranks.is_first:
            write_checkpoint(folder, self.policy, self._optimizer, state)

    def read(self, folder: Path) -> dict[str, Any]:
        """Go on from a checkpoint, made by however many ranks; returns what `write` was given as `state`."""
        return read_checkpoint(folder, self.policy, self._optimizer)

    def close(self) -> None:
        """Nothing is held by one rank."""

    @contextmanager
    def _under(self, earlier: dict[str, Tensor] | None) -> Iterator[None]:
        """The policy with earlier weights, for as long as the block lasts."""
        if earlier is None:
            yield
            return
        present = {name: tensor.clone() for name, tensor in self.policy.trainable_state().items()}
        self.policy.load_trainable_state(earlier)
        try:
            yield
        finally:
            self.policy.load_trainable_state(present)

    # --- weights that are split ---------------------------------------------------------------------------------------

    def _whole(self, *, is_reference: bool = False) -> AbstractContextManager[None]:
        shards = self._reference_shards if is_reference else self._shards
        return nullcontext() if shards is None else shards.whole()

    @contextmanager
    def _training(self) -> Iterator[None]:
        if self._shards is None:
            yield
            return
        self.policy.is_in_lockstep = True
        try:
            with self._shards.training():
                yield
        finally:
            self.policy.is_in_lockstep = False
