"""What a rank of the trainer holds whatever the stage: policy and optimizer, of which adapters are replicated over the
ranks and all weights are split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from coupled.rl.model.gradient_checkpointing import checkpoint_gradients
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.schema import RunRecipe
from coupled.rl.trainer.checkpoint import read_checkpoint, write_checkpoint, write_sharded_checkpoint
from coupled.rl.trainer.collectives import Ranks, add_gradients
from coupled.rl.trainer.optimizer import apply_step, learning_rate, make_optimizer


class Learner:
    """Policy and optimizer of one rank. With several ranks, every method is called on all of them.

    Args:
        has_reference, is_moving: whether the policy as it is now is kept as the reference, and whether that will move.
    """

    def __init__(
        self, recipe: RunRecipe, policy: Policy, ranks: Ranks, *, has_reference: bool = False, is_moving: bool = False
    ) -> None:
        self.recipe = recipe
        self.policy = policy
        self._ranks = ranks
        self._shards: Any = None
        self._reference_shards: Any = None
        if ranks.size > 1 and not policy.has_adapter:
            from coupled.rl.trainer.sharding import shard

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

    def trainable_state(self) -> dict[str, Tensor]:
        """Name → tensor of everything that training changes, whole and on the CPU: what rollout workers are given."""
        return self.policy.trainable_state()

    # --- updates ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Where gradients are made: layers that are split are gathered as passes reach them."""
        if self._shards is None:
            yield
            return
        self.policy.is_in_lockstep = True
        try:
            with self._shards.training():
                yield
        finally:
            self.policy.is_in_lockstep = False

    def _passes(self, parts: Sequence[slice]) -> Iterator[tuple[slice, bool]]:
        """This rank's micro-batches, and whether they are silent. Where weights are split every rank makes as many
        passes as the others, if need be over rows that another one counts."""
        mine = self._ranks.share(parts)
        yield from ((rows, False) for rows in mine)
        if self.is_sharded and len(mine) < -(-len(parts) // self._ranks.size):
            yield parts[0], True

    def _add_gradients(self) -> None:
        """Replace the gradient of this rank's rows by the batch's, which `_training` has done for weights that are
        split."""
        if self._ranks.size > 1 and not self.is_sharded:
            add_gradients(self._ranks, self.policy.trainable_parameters())

    def _apply(self, step: int) -> tuple[float, float]:
        """Take optimizer step `step` (from 0). Returns the norm of the gradient before clipping, and the rate."""
        rate = learning_rate(step, self.recipe.num_steps, self.recipe.optimizer)
        return apply_step(self._optimizer, self.policy, rate, self.recipe.optimizer.max_grad_norm), rate

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
