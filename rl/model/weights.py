"""The weights of a policy: copied out, put back, saved, split over ranks, and identified by a digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coupled.rl.errors import CheckpointError
from coupled.rl.model.policy import Policy

DIFFUSION_FILE = "diffusion.json"
"""File in an adapter's folder with the settings that its base was opened with."""


def trainable_state(policy: Policy) -> dict[str, Tensor]:
    """Name → tensor of everything that training changes, on the CPU. With split weights, every rank must call it."""
    return {n: whole_tensor(p.detach()).cpu() for n, p in policy.model.named_parameters() if p.requires_grad}


def load_trainable_state(policy: Policy, state: dict[str, Tensor]) -> None:
    """Copy the `trainable_state` of an equal policy into this one, in place.

    Raises:
        CheckpointError: names or shapes differ.
    """
    mine = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    if mine.keys() != state.keys():
        odd = sorted(mine.keys() ^ state.keys())[:3]
        raise CheckpointError(
            f"the saved weights are not of this model: {len(mine)} trainable tensors here, {len(state)} saved, "
            f"differing in {odd}; is model.adapter the same as when they were saved?"
        )
    for name, parameter in mine.items():
        if parameter.shape != state[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(parameter.shape)} here and {tuple(state[name].shape)} in the checkpoint"
            )
        parameter.data.copy_(shard_like(state[name], parameter))


def save_policy(policy: Policy, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write an adapter, or the whole model, with the tokenizer: a folder that `load_policy` opens.

    Args:
        weights: the whole weights by name, for a model that holds only this rank's share of them.
    """
    # Adapters never train embeddings, and a new MASK gets the same row whenever its base is opened.
    chosen: dict[str, Any] = {"save_embedding_layers": False} if policy.has_adapter else {}
    if weights is not None:
        chosen["state_dict"] = weights
    policy.model.save_pretrained(folder, **chosen)  # type: ignore[operator]
    policy.tokenizer.save_pretrained(folder)
    if policy.has_adapter:
        # The base's own files may lack the settings that it was opened with.
        (folder / DIFFUSION_FILE).write_text(json.dumps(_opened_with(policy)) + "\n")


def _opened_with(policy: Policy) -> dict[str, Any]:
    stated = getattr(policy.config, "diffusion", None) or {}
    return {
        "family": policy.family.name,
        "shift": policy.family.shift,
        "block_length": policy.family.block_length or 0,
        "mask_token": policy.tokenizer.convert_ids_to_tokens(policy.mask_id),
        "end_tokens": policy.tokenizer.convert_ids_to_tokens(stated.get("end_ids", [])),
    }


def digest_of(state: dict[str, Tensor]) -> str:
    """SHA-256 of weights, in hexadecimal: equal for equal names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- weights that are split over ranks ------------------------------------------------------------------------------


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is split over ranks, which must all call it. Other tensors are returned unchanged."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """This rank's share of a tensor that every rank has whole, split as `like` is; the whole if `like` is not split."""
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def is_split(tensor: Tensor) -> bool:
    """True for a DTensor. The class is not imported for the comparison: that takes a third of a second."""
    return hasattr(tensor, "device_mesh")
