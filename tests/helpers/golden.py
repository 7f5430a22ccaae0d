"""Tiny random checkpoints of published families, and what the published code computed with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).parents[2] / "../shared/data/golden"
FAMILIES = ("dream", "llada", "llada_moe", "llada2", "sdar", "sdar_moe", "stable_diffcoder")


def golden_folder(name: str, into: Path, *, has_mask_token: bool = True) -> Path:
    """The golden checkpoint's own files, with a tokenizer of its 512 tokens."""
    source = GOLDEN / name
    if not (source / "model.safetensors").is_file():
        pytest.skip(f"no reference tensors at {source}")
    into.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        if not (into / file).exists():
            (into / file).symlink_to((source / file).resolve())
    config = json.loads((source / "config.json").read_text())
    mask, end = config.get("mask_token_id", 5 if name == "stable_diffcoder" else 500), config.get("eos_token_id", 501)
    words = {f"w{i}": i for i in range(512) if i not in (mask, end)} | {"<mask>": mask, "<end>": end}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    special = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "w0"}
    if has_mask_token:
        special["mask_token"] = "<mask>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(into)
    return into
