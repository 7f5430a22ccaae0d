"""Policy, reference and optimizer of one rank, for every stage.

Adapters are replicated over the ranks, and whole models are split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coupled.rl.model.gradient_checkpointing import checkpoint_gradients
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import ReferenceKind, keep_reference
from coupled.rl.model.weights import trainable_state
from coupled.rl.recipe.schema import RunRecipe
from coupled.rl.trainer.checkpoint import read_checkpoint, write_checkpoint, write_sharded_checkpoint
from coupled.rl.trainer.collectives import Ranks, add_gradients
from coupled.rl.trainer.optimizer import apply_step, learning_rate, make_optimizer


class Learner:
    """Policy, reference and optimizer of one rank. With several ranks, every method is called on all of them.

    Args:
        reference: the kind of reference to keep of the present weights.
    """

    def __init__(self, recipe: RunRecipe, policy: Policy, ranks: Ranks, reference: ReferenceKind = "none") -> None:
        self.recipe = recipe
        self.policy = policy
        self._ranks = ranks
        self._shards: Any = None
        self._reference_shards: Any = None
        if ranks.size > 1 and not policy.has_adapter:
            from coupled.rl.trainer.sharding import shard

            self._shards, self.reference, self._reference_shards = shard(policy, ranks.size, reference)
        else:
            self.reference = keep_reference(policy, reference)
        self._optimizer = make_optimizer(policy, recipe.optimizer)
        if recipe.optimizer.has_gradient_checkpointing:
            checkpoint_gradients(policy)

    @property
    def bodies(self) -> list[nn.Module]:
        """The modules of which every forward pass calls one, once: the policy's body and a reference copy's."""
        copied = self.reference.model
        return [self.policy.body] + ([] if copied is None else [self.policy.replaced(model=copied).body])

    @property
    def is_sharded(self) -> bool:
        """True if this rank holds a share of the weights instead of all of them."""
        return self._shards is not None

    def trainable_state(self) -> dict[str, Tensor]:
        """Name → tensor of everything that training changes, whole and on the CPU, as rollout workers receive it."""
        return trainable_state(self.policy)

    # --- updates ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Scope of the passes that make gradients: split layers are gathered as passes reach them."""
        if self._shards is None:
            yield
            return
        with self._shards.training():
            yield

    def _passes(self, parts: Sequence[slice]) -> Iterator[tuple[slice, bool]]:
        """This rank's micro-batches, each with a flag that excludes it from the result. With split weights every rank
        makes as many passes as the others, if need be over excluded rows, which another rank counts."""
        mine = self._ranks.share(parts)
        yield from ((rows, False) for rows in mine)
        if self.is_sharded and len(mine) < -(-len(parts) // self._ranks.size):
            yield parts[0], True

    def _add_gradients(self) -> None:
        """Replace the gradient of this rank's rows by the batch's. For split weights `_training` has done so."""
        if self._ranks.size > 1 and not self.is_sharded:
            add_gradients(self._ranks, self.policy.trainable_parameters())

    def _apply(self, step: int) -> tuple[float, float]:
        """Take optimizer step `step` (from 0). Returns the norm of the gradient before clipping, and the rate."""
        rate = learning_rate(step, self.recipe.num_steps, self.recipe.optimizer)
        return apply_step(self._optimizer, self.policy, rate, self.recipe.optimizer.max_grad_norm), rate

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def write(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint together with `state`."""
        if self.is_sharded:
            is_first = self._ranks.is_first
            write_sharded_checkpoint(folder, self.policy, self.reference, self._optimizer, state, is_first=is_first)
        elif self._ranks.is_first:
            write_checkpoint(folder, self.policy, self.reference, self._optimizer, state)

    def read(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint, written by any number of ranks; returns the `state` that `write` received."""
        return read_checkpoint(folder, self.policy, self.reference, self._optimizer)

    def close(self) -> None:
        """A single rank holds nothing to release; `RankGroup` has the same method."""
