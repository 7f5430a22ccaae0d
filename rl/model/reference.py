"""The reference policy that the KL penalty pulls towards, of one of four kinds.

none         the loss has no reference, or takes the rollout policy
adapter_off  the base of an adapted policy, with the adapters turned off: no copy
frozen       a copy of the policy as it was at the start
moving       a copy that follows the policy by `mix`
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from coupled.rl.errors import CheckpointError
from coupled.rl.model.policy import Policy
from coupled.rl.model.weights import shard_like, whole_tensor
from coupled.rl.recipe.objective import Loss

ReferenceKind = Literal["none", "adapter_off", "frozen", "moving"]


def reference_kind(loss: Loss, *, has_adapter: bool) -> ReferenceKind:
    """The kind of reference that a loss reads."""
    if loss.kl_beta == 0 or loss.reference == "old":
        return "none"
    if loss.reference == "synced":
        return "moving"
    return "adapter_off" if has_adapter else "frozen"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """The reference of one policy. Made by `keep_reference`, or around a model that ranks have split."""

    live: Policy
    """The policy that is trained."""
    kind: ReferenceKind
    model: nn.Module | None = None
    """The copy, for the kinds `frozen` and `moving`. It shares all weights that are not trained."""

    @contextmanager
    def policy(self) -> Iterator[Policy]:
        """The policy with the reference weights.

        Raises:
            RuntimeError: the kind is `none`.
        """
        if self.model is not None:
            yield self.live.replaced(model=self.model)
        elif self.kind == "adapter_off":
            with self.live.model.disable_adapter():  # type: ignore[operator]
                yield self.live
        else:
            raise RuntimeError("a reference of kind 'none' has no policy: keep_reference with another kind first")

    @torch.no_grad()
    def mix(self, share: float) -> None:
        """θ_ref ← share · θ + (1 - share) · θ_ref: 1 replaces the reference, a small share is a moving average.

        For adapters the factors are mixed, which is not the mean of the two products.
        """
        for name, tensor in self.tensors().items():
            live = self.live.model.get_parameter(name)
            tensor.copy_(share * live + (1 - share) * tensor)

    def state(self) -> dict[str, Tensor]:
        """Name → whole tensor of the copy, on the CPU. With split weights, every rank must call it."""
        return {name: whole_tensor(tensor).cpu() for name, tensor in self.tensors().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copy a `state()` back, in place.

        Raises:
            CheckpointError: it is the state of another model.
        """
        mine = self.tensors()
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in state.items()}:
            raise CheckpointError(
                f"the saved reference ({len(state)} tensors) is not of this model ({len(mine)} trained tensors); "
                "is model.adapter the same as when it was saved?"
            )
        for name, tensor in mine.items():
            tensor.data.copy_(shard_like(state[name], tensor))

    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor of the copy, in place: this rank's share where the weights are split.

        Raises:
            RuntimeError: the kind has no copy.
        """
        if self.model is None:
            raise RuntimeError(f"a reference of kind {self.kind!r} has no copy that could move: keep a 'moving' one")
        trained = {n for n, p in self.live.model.named_parameters() if p.requires_grad}
        return {n: p.detach() for n, p in self.model.named_parameters() if n in trained}


def keep_reference(policy: Policy, kind: ReferenceKind) -> Reference:
    """Keep the present weights as the reference. A copy of an adapted policy holds the adapters alone.

    Raises:
        RuntimeError: `adapter_off` for a policy without adapters.
    """
    if kind == "adapter_off" and not policy.has_adapter:
        raise RuntimeError("a reference of kind 'adapter_off' needs a policy with adapters; keep a 'frozen' one")
    if kind in ("none", "adapter_off"):
        return Reference(live=policy, kind=kind)
    shared = {id(p): p for p in policy.model.parameters() if not p.requires_grad}
    copied = copy.deepcopy(policy.model, shared).requires_grad_(False).eval()
    return Reference(live=policy, kind=kind, model=copied)
