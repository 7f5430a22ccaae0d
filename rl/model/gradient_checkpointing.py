"""Gradient checkpointing: layers keep their inputs alone, and are computed a second time in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from coupled.rl.model.policy import Policy


def checkpoint_gradients(policy: Policy) -> None:
    """From here on the layers of the policy recompute. Gradients stay what they are: nothing in a layer is random.

    The switch that transformers has works in training mode only, and a policy is always in evaluation mode: scoring
    must see what the rollout saw, whatever dropout the checkpoint's configuration names.
    """
    for layer in policy.layers:
        # Of the bound method, so that a copy of the layer recomputes itself and not this one.
        layer.forward = partial(_recompute, layer.forward)


def _recompute(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)
