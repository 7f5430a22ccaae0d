"""Export of a checkpoint as a separate model folder: adapters optionally merged, weights in the chosen type."""

from __future__ import annotations

from pathlib import Path

import torch

from coupled.rl.errors import CheckpointError
from coupled.rl.model.loading import load_policy, merge_adapter
from coupled.rl.model.weights import save_policy
from coupled.rl.run_folder.find import find_checkpoint


def export_checkpoint(path: Path, out: Path, *, merge: bool, dtype: torch.dtype) -> Path:
    """Write a checkpoint (for a run folder: its newest) into the new folder `out`, which `load_policy` opens.

    With `merge` adapters are added to the weights they adapt, in float32, before rounding to `dtype`. Weights
    have the names of the transformers class; for Dream, SDAR and Stable-DiffCoder these are the published names.

    Raises:
        CheckpointError: no checkpoint, a folder that is not empty, or no adapter to merge.
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
