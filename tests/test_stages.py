"""The chain of recipes on the embedded model, a step of each: every stage opens what the one before left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupled.rl.fit import fit
from coupled.rl.recipe.read import load_recipe
from coupled.rl.run_folder.folder import read_rows
from coupled.rl.train import train

TINY = Path(__file__).parents[1] / "recipes" / "tiny"
SMALL = ("num_threads=1", "num_steps=2", "optimizer.warmup_steps=0", "checkpoint.every=2")


def settings(tmp_path: Path, model: Path | None, *more: str) -> tuple[str, ...]:
    start = () if model is None else (f"model.path={model}",)
    return (*SMALL, f"output_dir={tmp_path / 'runs'}", *start, *more)


@pytest.mark.slow
def test_every_stage_of_the_chain_goes_on_from_the_one_before(tmp_path: Path) -> None:
    checkpoint, losses = None, {}
    for stage in ("ar", "adapt", "sft"):
        checkpoint = fit(load_recipe(TINY / f"{stage}.yaml", settings(tmp_path, checkpoint, "fit.batch_size=4")))
        losses[stage] = [row["loss"] for row in read_rows(checkpoint.parents[1] / "metrics.jsonl")]
        stated = json.loads((checkpoint / "config.json").read_text())["diffusion"]
        assert stated == {"family": "dream", "shift": 1} | ({"block_length": 1} if stage == "ar" else {})
    assert all(len(found) == 2 for found in losses.values())
    small = ("rollout.num_prompts=2", "rollout.group_size=2", "rollout.denoising_steps=4", "data.eval_path=null")
    more = (*small, "sandbox.num_workers=1", "optimizer.micro_batch_size=4")
    result = train(load_recipe(TINY / "rl.yaml", settings(tmp_path, checkpoint, *more)))
    assert len(read_rows(result.path / "metrics.jsonl")) == 2


def test_the_chain_s_checkpoint_is_configured_as_the_embedded_one(tmp_path: Path) -> None:
    """One step of adapt.yaml on the embedded weights leaves its config.json as it is."""
    recipe = load_recipe(
        TINY / "adapt.yaml", settings(tmp_path, TINY / "checkpoint", "fit.batch_size=4", "num_steps=1")
    )
    folder = fit(recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 1})}))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_text() == (TINY / "checkpoint" / name).read_text()
