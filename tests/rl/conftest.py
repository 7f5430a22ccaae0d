"""The reference tensors of Dream: a tiny random checkpoint, and what Dream's published code computed with it."""

from __future__ import annotations

import pytest
import torch
from helpers.golden import GOLDEN, golden_folder
from safetensors.torch import load_file

from coupled.rl.model.loading import load_policy
from coupled.rl.model.policy import Policy


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The golden checkpoint through `load_policy`, with a tokenizer of its 512 tokens."""
    return load_policy(golden_folder("dream", tmp_path_factory.mktemp("dream") / "checkpoint"))


@pytest.fixture(scope="module")
def dream_tensors(dream: Policy) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "dream" / "io.safetensors")
