"""The reference tensors of Dream: a tiny random checkpoint, and what Dream's published code computed with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from coupled.rl.policy import Policy, load_policy

DREAM = Path(__file__).parents[2] / "../shared/data/golden/dream"


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The golden checkpoint through `load_policy`, with a tokenizer of its 512 tokens."""
    if not (DREAM / "model.safetensors").is_file():
        pytest.skip(f"no reference tensors at {DREAM}")
    folder = tmp_path_factory.mktemp("dream")
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to((DREAM / name).resolve())
    words = {"<mask>": 500, "<end>": 501} | {f"w{i}": i for i in range(512) if i not in (500, 501)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="<mask>", eos_token="<end>", pad_token="<end>", unk_token="w0"
    ).save_pretrained(folder)
    return load_policy(folder)


@pytest.fixture(scope="module")
def dream_tensors(dream: Policy) -> dict[str, torch.Tensor]:
    return load_file(DREAM / "io.safetensors")
