"""What a checkpoint holds, and how it is read back into a live policy and optimizer.

The weights are always whole files, which every command opens. Optimizer and moving reference are one file each, or
where the weights are split over ranks, shards that each rank writes for itself. Either is read by any number of ranks.
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
from coupled.rl.model.policy import Policy, is_split, shard_like, whole_tensor

STATE = "state.json"
OPTIMIZER = "optimizer.pt"
REFERENCE = "reference.pt"
SHARDS = "shards"
"""The folder of what ranks write for themselves, in the format of torch.distributed.checkpoint."""
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


def write_sharded_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, is_first: bool
) -> None:
    """The same from ranks that hold shares of the weights: all call it, and the first writes what is not a share.

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
    if policy.has_moving_reference:
        shards |= {f"reference.{name}": tensor for name, tensor in policy.reference_tensors().items()}
    try:
        dcp.save(shards, checkpoint_id=folder / SHARDS)
        if is_first:
            policy.save(folder, weights)
            (folder / STATE).write_text(json.dumps(state) + "\n")
    except (RuntimeError, SafetensorError, dcp.api.CheckpointException) as error:
        raise OSError(str(error)) from error


def read_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint into `policy` (and its moving reference, if it has one) and `optimizer`; returns its state.

    Raises:
        CheckpointError: a part is missing, or the weights are of another model.
    """
    has_shards = (folder / SHARDS).is_dir()
    needed = [STATE] if has_shards else [STATE, OPTIMIZER, *([REFERENCE] if policy.has_moving_reference else [])]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {' and '.join(missing)}: it cannot be resumed from, only evaluated")
    saved = load_policy(
        folder,
        family=policy.family.name,
        shift=policy.family.shift,
        block_length=policy.family.block_length or 0,
    )
    policy.load_trainable_state(saved.trainable_state())
    if has_shards:
        _read_shards(folder / SHARDS, policy, optimizer)
    else:
        # To the CPU first: what was on the first rank's GPU is not to go there again from all ranks.
        whole = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(_shared_out(whole, optimizer))
        if policy.has_moving_reference:
            policy.load_reference_state(torch.load(folder / REFERENCE, weights_only=True))
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def _read_shards(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Each rank reads what is its own, however many ranks wrote."""
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
    reference = policy.reference_tensors() if policy.has_moving_reference else {}
    wanted |= {f"reference.{name}": tensor for name, tensor in reference.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one rank has none
            dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    except (RuntimeError, dcp.api.CheckpointException) as error:
        raise CheckpointError(f"{folder} is not of this model, or not whole: {error}") from error
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _shared_out(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer of whole weights, for one of which this rank holds shares."""
    for index, parameter in enumerate(_parameters(optimizer)):
        if is_split(parameter):
            state = saved["state"].get(index, {})
            state |= {k: shard_like(t, parameter) for k, t in state.items() if t.shape == parameter.shape}
    return saved


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
