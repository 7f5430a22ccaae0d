"""Opens the policy that a recipe describes: checkpoint or fresh weights, device, adapters."""

from __future__ import annotations

import os
from typing import Any

import torch

from coupled.rl.errors import CheckpointError
from coupled.rl.model.loading import add_adapter, load_policy
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.model import Model
from coupled.rl.recipe.schema import RunRecipe


def open_policy(model: Model, seed: int) -> Policy:
    """The policy that a recipe describes: a checkpoint or a fresh architecture, with adapters if it has some.

    Raises:
        CheckpointError: see `load_policy`; or the device is absent.
    """
    device = pick_device(model.device)
    policy = load_policy(
        model.path,
        **how_to_open(model),
        weights_dtype=getattr(torch, model.weights_dtype),
        compute_dtype=getattr(torch, model.compute_dtype),
        from_scratch_seed=seed if model.init == "random" else None,
        device=device,
    )
    if model.adapter is not None and not policy.has_adapter:
        adapter = model.adapter
        return add_adapter(policy, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets, seed=seed)
    return policy


def how_to_open(model: Model) -> dict[str, Any]:
    """Recipe settings that override the checkpoint's metadata, as keyword arguments of `load_policy`."""
    return {
        "family": model.family,
        "shift": model.shift,
        "block_length": model.block_length,
        "mask_token": model.mask_token,
        "end_tokens": model.end_tokens,
        "trust_remote_code": model.trust_remote_code,
    }


def pick_device(wanted: str) -> str:
    """The torch device for `model.device`."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise CheckpointError(
            "model.device is 'cuda' but torch sees no GPU; use 'auto' or 'cpu', or run coupled doctor"
        )
    return "cuda" if has_gpu and wanted != "cpu" else "cpu"


def use_threads(recipe: RunRecipe) -> None:
    """Set torch's thread count for this process where the recipe names one, or where several ranks share the cores."""
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    elif (num_ranks := recipe.cluster.trainer_ranks) > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
