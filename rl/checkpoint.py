"""What a checkpoint holds, and how it is read back into a live policy and optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coupled.rl.errors import CheckpointError
from coupled.rl.policy import Policy, add_adapter, load_policy
from coupled.rl.recipe import Model, Recipe

STATE = "state.json"
OPTIMIZER = "optimizer.pt"
REFERENCE = "reference.pt"
CARRIED = "rollout_weights"
"""A folder, so that no one takes it for the model's own weights."""


def write_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Weights or adapter, tokenizer, optimizer and `state` (steps done, keys) into an empty folder.

    There is no generator state to keep: all randomness is a function of the seed and the step. A reference that stays
    where the run began is not kept either; one that moves is.

    Raises:
        OSError: the disk is full or not writable, whatever type the libraries say it with.
    """
    try:
        policy.save(folder)
        torch.save(optimizer.state_dict(), folder / OPTIMIZER)
        if policy.has_moving_reference:
            torch.save(policy.reference_state(), folder / REFERENCE)
        (folder / STATE).write_text(json.dumps(state) + "\n")
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error)) from error


def read_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint into `policy` (and its moving reference, if it has one) and `optimizer`; returns its state.

    Raises:
        CheckpointError: a part is missing, or the weights are of another model.
    """
    parts = (STATE, OPTIMIZER, REFERENCE) if policy.has_moving_reference else (STATE, OPTIMIZER)
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {' and '.join(missing)}: it cannot be resumed from, only evaluated")
    saved = load_policy(folder, family=policy.family.name, shift=policy.family.shift)
    policy.load_trainable_state(saved.trainable_state())
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True))
    if policy.has_moving_reference:
        policy.load_reference_state(torch.load(folder / REFERENCE, weights_only=True))
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def write_carried(folder: Path, carried: dict[int, dict[str, Tensor]]) -> None:
    """Earlier weights that rollouts under way were begun with: a resumed run goes on with those rollouts as they were.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        for version, state in carried.items():
            path = folder / CARRIED / f"version_{version:06d}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error)) from error


def read_carried(folder: Path) -> dict[int, dict[str, Tensor]]:
    """What `write_carried` wrote: version → weights."""
    files = sorted((folder / CARRIED).glob("version_*.safetensors"))
    return {int(file.stem.removeprefix("version_")): load_file(file) for file in files}


def open_policy(model: Model, seed: int) -> Policy:
    """The policy a recipe asks for: a checkpoint or a fresh architecture, with adapters if wanted.

    Raises:
        CheckpointError: see `load_policy`; or a device that is not there.
    """
    device = pick_device(model.device)
    policy = load_policy(
        model.path,
        family=model.family,
        shift=model.shift,
        compute_dtype=getattr(torch, model.compute_dtype),
        from_scratch_seed=seed if model.init == "random" else None,
        device=device,
    )
    if model.adapter is not None and not policy.has_adapter:
        adapter = model.adapter
        add_adapter(policy, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets, seed=seed)
    return policy


def pick_device(wanted: str) -> str:
    """The torch device for `model.device`."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise CheckpointError(
            "model.device is 'cuda' but torch sees no GPU; use 'auto' or 'cpu', or run coupled doctor"
        )
    return "cuda" if has_gpu and wanted != "cpu" else "cpu"


def use_threads(recipe: Recipe) -> None:
    """Set torch's thread count for this process, when the recipe names one."""
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
