"""A checkpoint of a run as a folder of its own: adapters merged if wanted, weights in the type they are used in."""

from __future__ import annotations

from pathlib import Path

import torch

from coupled.rl.errors import CheckpointError
from coupled.rl.model.loading import load_policy, merge_adapter
from coupled.rl.model.weights import save_policy
from coupled.rl.run_folder.find import find_checkpoint


def export_checkpoint(path: Path, out: Path, *, merge: bool, dtype: torch.dtype) -> Path:
    """Write a checkpoint (of a run folder: its newest) into the new folder `out`, which `load_policy` opens.

    With `merge` adapters are added to the weights they adapt, in float32, before anything is rounded to `dtype`.
    Weights have the names of the transformers class: those of Dream, SDAR and Stable-DiffCoder are the published ones.

    Raises:
        CheckpointError: no checkpoint, a folder that holds something already, or nothing to merge.
    """
    checkpoint = find_checkpoint(path)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; name a folder that does not exist yet")
    policy = load_policy(checkpoint)
    if merge:
        if not policy.has_adapter:
            raise CheckpointError(f"{checkpoint} holds all weights and no adapter: there is nothing to merge")
        policy = merge_adapter(policy)
    out.mkdir(parents=True, exist_ok=True)
    policy.model.to(dtype)
    save_policy(policy, out)
    return out
