"""Checkpoints: written from a live policy, reference and optimizer, and read back into them.

The weights are always whole files, which every command opens. Optimizer and moving reference are one file each or,
where the weights are split over ranks, shards that each rank writes for itself. Any number of ranks reads either form.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coupled.rl.errors import CheckpointError
from coupled.rl.model.loading import load_policy
from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import Reference
from coupled.rl.model.weights import (
    is_split,
    load_trainable_state,
    save_policy,
    shard_like,
    trainable_state,
    whole_tensor,
)

STATE = "state.json"
OPTIMIZER = "optimizer.pt"
REFERENCE = "reference.pt"
SHARDS = "shards"
"""Folder of the shards that ranks write for themselves, in the format of torch.distributed.checkpoint."""
CARRIED = "rollout_weights"
"""Folder of earlier weights, apart from the model's own weight files."""


def write_checkpoint(
    folder: Path, policy: Policy, reference: Reference, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write weights or adapter, tokenizer, optimizer and `state` (steps done, keys) into an empty folder.

    There is no generator state to write: all randomness is a function of the seed and the step. Of the references only
    a moving one is written; the others are made again from the recipe.

    Raises:
        OSError: the disk is full or not writable; other types in which libraries report it are converted.
    """
    try:
        save_policy(policy, folder)
        torch.save(optimizer.state_dict(), folder / OPTIMIZER)
        if reference.kind == "moving":
            torch.save(reference.state(), folder / REFERENCE)
        (folder / STATE).write_text(json.dumps(state) + "\n")
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error)) from error


def write_sharded_checkpoint(
    folder: Path,
    policy: Policy,
    reference: Reference,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    is_first: bool,
) -> None:
    """Write the same from ranks that hold shares of the weights: all call it, and the first writes the whole files.

    Raises:
        OSError: as `write_checkpoint`.
    """
    import torch.distributed.checkpoint as dcp

    weights: dict[str, Tensor] = {}
    for name, parameter in policy.model.named_parameters():
        whole = whole_tensor(parameter.detach())
        if is_first:
            weights[name] = whole.cpu()
    shards = {
        f"optimizer.{name}.{key}": tensor
        for name, parameter in policy.model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
    shards |= _moving_tensors(reference)
    try:
        dcp.save(shards, checkpoint_id=folder / SHARDS)
        if is_first:
            save_policy(policy, folder, weights)
            (folder / STATE).write_text(json.dumps(state) + "\n")
    except (RuntimeError, SafetensorError, dcp.api.CheckpointException) as error:
        raise OSError(str(error)) from error


def read_checkpoint(
    folder: Path, policy: Policy, reference: Reference, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint into `policy`, a moving `reference` and `optimizer`; returns its state.

    Raises:
        CheckpointError: a part is missing, or the weights are of another model.
    """
    has_shards = (folder / SHARDS).is_dir()
    is_moving = reference.kind == "moving"
    needed = [STATE] if has_shards else [STATE, OPTIMIZER, *([REFERENCE] if is_moving else [])]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {' and '.join(missing)}: it cannot be resumed from, only evaluated")
    saved = load_policy(
        folder,
        family=policy.family.name,
        shift=policy.family.shift,
        block_length=policy.family.block_length or 0,
    )
    load_trainable_state(policy, trainable_state(saved))
    if has_shards:
        _read_shards(folder / SHARDS, policy, reference, optimizer)
    else:
        # To the CPU first: otherwise every rank would load it to the first rank's GPU, where it was written from.
        whole = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(_shared_out(whole, optimizer))
        if is_moving:
            reference.load_state(torch.load(folder / REFERENCE, weights_only=True))
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def _moving_tensors(reference: Reference) -> dict[str, Tensor]:
    """The tensors of a moving reference under the names of a sharded checkpoint; none of the other kinds."""
    tensors = reference.tensors() if reference.kind == "moving" else {}
    return {f"reference.{name}": tensor for name, tensor in tensors.items()}


def _read_shards(folder: Path, policy: Policy, reference: Reference, optimizer: torch.optim.Optimizer) -> None:
    """Read this rank's share, from the shards of any number of ranks."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    known = reader.read_metadata().state_dict_metadata
    names = {id(p): name for name, p in policy.model.named_parameters()}
    wanted: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        prefix = f"optimizer.{names[id(parameter)]}."
        for key in (name.removeprefix(prefix) for name in known if name.startswith(prefix)):
            place = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
            wanted[prefix + key] = states.setdefault(index, {})[key] = place
    wanted |= _moving_tensors(reference)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one rank has none
            dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    except (RuntimeError, dcp.api.CheckpointException) as error:
        raise CheckpointError(f"{folder} is not of this model, or not whole: {error}") from error
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _shared_out(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer of whole weights, cut to this rank's shares where `optimizer` has split ones."""
    for index, parameter in enumerate(_parameters(optimizer)):
        if is_split(parameter):
            state = saved["state"].get(index, {})
            state |= {k: shard_like(t, parameter) for k, t in state.items() if t.shape == parameter.shape}
    return saved


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def write_carried(folder: Path, carried: dict[int, dict[str, Tensor]]) -> None:
    """Write the earlier weights that rollouts under way began with, so that a resumed run continues those rollouts.

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
    """Weights by version, as `write_carried` wrote them."""
    files = sorted((folder / CARRIED).glob("version_*.safetensors"))
    return {int(file.stem.removeprefix("version_")): load_file(file) for file in files}
