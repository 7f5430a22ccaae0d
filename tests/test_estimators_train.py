"""Every estimator through a whole run of the embedded model: rollouts, judge, anchors and updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coupled.rl.monitoring.metrics import DETERMINISTIC_EXCEPT
from coupled.rl.recipe.read import load_recipe
from coupled.rl.run_folder.folder import read_rows
from coupled.rl.train import train

ROOT = Path(__file__).parents[1]
TINY = (
    "num_threads=1",
    "num_steps=1",
    "num_updates=2",
    "optimizer.warmup_steps=0",
    "optimizer.micro_batch_size=5",
    "rollout.num_prompts=2",
    "rollout.group_size=4",
    "rollout.denoising_steps=8",
    "sandbox.num_workers=1",
    "data.eval_path=null",
    "estimator.num_pairs=1",
    "checkpoint.every=1",
    "advantage=mean",
    # Completions differ in length, so the advantages of a group are not all 0 even where none passes.
    "reward.functions=[{path: length.py:score}]",
)


def _long(*overrides: str) -> Any:
    """Estimators whose draws, scores and gradients are proven without a run."""
    return pytest.param(overrides, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "overrides",
    [
        _long("name=random_mask", "draw=exact_count"),
        ("name=coupled", "weights=normalized", "draw=exact_count", "prompt_mask_probability=0.15"),
        _long("name=decoupled", "weights=antithetic"),
        _long("name=espo"),
        ("name=gdpo", "num_nodes=2"),
        _long("name=trajectory"),
        ("name=trajectory", "shrink=2", "num_sampled_steps=2", "post_eos=mask"),
        ("name=ar_order",),
    ],
    ids=" ".join,
)
def test_every_estimator_trains_and_moves_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    (tmp_path / "length.py").write_text(
        "def score(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = (*TINY, f"output_dir={tmp_path}", *(f"estimator.{setting}" for setting in overrides))
    result = train(load_recipe(ROOT / "recipes" / "quickstart.yaml", settings))
    (row,) = read_rows(result.path / "metrics.jsonl")
    assert all(torch.isfinite(torch.tensor([row["loss"], row["grad_norm"], row["kl"], row["ratio"]])))
    assert row["grad_norm"] > 0
    base = load_file(ROOT / "recipes" / "tiny" / "checkpoint" / "model.safetensors")
    (file,) = result.checkpoint.glob("*.safetensors")
    moved = load_file(file)
    assert any(not torch.equal(moved[name], base[name]) for name in base)


def test_a_run_that_saves_memory_learns_the_same(tmp_path: Path) -> None:
    """Two passes and recomputed layers change rounding at most."""
    rows = []
    for has_it in ("false", "true"):
        settings = (
            *TINY,
            f"output_dir={tmp_path}",
            "reward.functions=[{name: format}]",
            f"optimizer.has_two_passes={has_it}",
            f"optimizer.has_gradient_checkpointing={has_it}",
        )
        result = train(load_recipe(ROOT / "recipes" / "quickstart.yaml", settings))
        rows += read_rows(result.path / "metrics.jsonl")
    one_pass, two_passes = ({k: v for k, v in row.items() if not k.startswith(DETERMINISTIC_EXCEPT)} for row in rows)
    assert one_pass["grad_norm"] > 0
    assert two_passes == pytest.approx(one_pass, rel=1e-4, abs=1e-6)
