"""Gradient checkpointing: layers keep only their inputs, and are computed a second time in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from coupled.rl.model.policy import Policy


def checkpoint_gradients(policy: Policy) -> None:
    """Let the layers of the policy recompute from here on. Gradients do not change: nothing in a layer is random.

    The switch of transformers works in training mode only, and a policy is always in evaluation mode: scoring and
    rollout must compute the same, whatever dropout the checkpoint's configuration has.
    """
    for layer in policy.layers:
        # The bound method is wrapped, so that a copy of the layer recomputes itself and not this one.
        layer.forward = partial(_recompute, layer.forward)


def _recompute(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)
