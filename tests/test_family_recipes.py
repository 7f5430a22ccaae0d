"""The recipes for published checkpoints: estimated at full size, and run on tiny random checkpoints of their family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coupled.rl.cli import main
from coupled.rl.commands.dry_run import (
    HUB_NAMES,
    PUBLISHED,
    estimate_run,
    fit_step_flops,
    memory_gib,
    rl_step_flops,
    shape_of,
)
from coupled.rl.model.families import family_of
from coupled.rl.model.loading import load_policy
from coupled.rl.model.weights import save_policy
from coupled.rl.recipe.cluster import Cluster
from coupled.rl.recipe.read import load_recipe
from coupled.rl.run_folder.folder import read_rows
from coupled.rl.train import train

ROOT = Path(__file__).parents[1]
RECIPES = {
    "diffucoder-7b-lora": "dream",
    "diffucoder-7b-paper": "dream",
    "dream-7b": "dream",
    "llada-8b": "llada",
    "stable-diffcoder-8b": "stable_diffcoder",
    "sdar-8b": "sdar",
}
every_recipe = pytest.mark.parametrize("name", RECIPES)
TOKENS = {"vocab_size": 896, "eos_token_id": 3, "pad_token_id": 0, "mask_token_id": 4, "tie_word_embeddings": False}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
USUAL = TOKENS | SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "dream": USUAL | {"model_type": "Dream", "architectures": ["DreamModel"]},
    "llada": TOKENS
    | {"model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 32, "mlp_hidden_size": 64, "n_layers": 2}
    | {"n_heads": 4, "n_kv_heads": 4, "max_sequence_length": 256, "weight_tying": False, "embedding_size": 896},
    "stable_diffcoder": USUAL | {"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"]},
    "sdar": USUAL | {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "head_dim": 8, "block_size": 4},
    "autoregressive": USUAL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
}
SMALL = (
    "num_threads=1",
    "num_steps=2",
    "data.columns={}",
    "rollout.num_prompts=2",
    "rollout.group_size=3",
    "rollout.canvas=12",
    "rollout.denoising_steps=12",
    "rollout.batch_size=6",
    "sandbox.num_workers=1",
    "checkpoint.every=1",
    "optimizer.learning_rate=1e-3",
    # Completions differ in length, so the advantages of a group are not all 0 although none passes.
    "reward.functions=[{path: length.py:score}]",
)


def tiny_checkpoint(family: str, folder: Path) -> Path:
    """Random weights in the shape of a family, with the embedded model's tokenizer."""
    source = folder / "architecture"
    shutil.copytree(ROOT / "recipes" / "tiny" / "architecture", source)
    (source / "config.json").write_text(json.dumps(CONFIGS[family]))
    options: dict[str, Any] = {"family": "llama", "mask_token": "<|mask|>"} if family == "autoregressive" else {}
    policy = load_policy(source, from_scratch_seed=0, **options)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15, generator=stream)
    save_policy(policy, folder / "checkpoint")
    return folder / "checkpoint"


# --- estimates ----------------------------------------------------------------------------------------------------


@every_recipe
def test_a_recipe_is_valid_and_estimated_where_there_is_no_checkpoint(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    text = estimate_run(recipe)
    assert f"family {RECIPES[name]}" in text
    assert "memory: " in text
    assert f"{'8' if name == 'diffucoder-7b-paper' else 'one'} H200 at 50% of 790 TFLOP/s" in text
    shape = shape_of(family_of(PUBLISHED[RECIPES[name]]).translate(PUBLISHED[RECIPES[name]]))
    total = sum(memory_gib(recipe, shape, family_of(PUBLISHED[RECIPES[name]])).values())
    assert total < 80, "a GPU of the recipe's holds what is said to fit"
    if recipe.model.adapter is None:
        one = recipe.model_copy(update={"cluster": Cluster()})
        assert sum(memory_gib(one, shape, family_of(PUBLISHED[RECIPES[name]])).values()) > 141, "none would alone"


@pytest.mark.parametrize(
    ("name", "family", "tokens"),
    [
        ("diffucoder/adapt", "qwen2", 65e9),
        ("diffucoder/sft", "dream", 0),
        ("stable-diffcoder/cpt", "llama", 21e9),
        ("stable-diffcoder/sft", "stable_diffcoder", 0),
    ],
)
def test_a_stage_before_rl_is_estimated(name: str, family: str, tokens: float) -> None:
    """6 operations a parameter and token, or 12 where there are two streams, and what attention costs."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    text = estimate_run(recipe)
    assert f"family {family}" in text
    assert "s a step (training " in text
    if tokens:
        shape = shape_of(family_of(PUBLISHED[family], name=family).translate(PUBLISHED[family]))
        flops = fit_step_flops(recipe, shape, family_of(PUBLISHED[family], name=family))["training"]
        streams = 2 if recipe.fit.objective == "block_diffusion" else 1
        least = 6 * shape.body * tokens * streams / recipe.num_steps
        assert least < flops < 1.5 * least


def test_ranks_share_the_memory_of_a_stage_before_rl() -> None:
    recipe = load_recipe(ROOT / "recipes" / "diffucoder" / "adapt.yaml", ("fit.micro_batch_size=0",))
    family = family_of(PUBLISHED["qwen2"], name="qwen2")
    shape = shape_of(family.translate(PUBLISHED["qwen2"]))
    one, eight = (
        memory_gib(recipe.model_copy(update={"cluster": Cluster(trainer_ranks=n)}), shape, family) for n in (1, 8)
    )
    for part in ("weights", "gradients and moments", "activations"):
        assert eight[part] == pytest.approx(one[part] / 8)
    outside, layer = 2 * shape.head, shape.body / shape.layers
    assert eight["gathered"] * 2**30 == pytest.approx(8 * outside + (2 * 2 + 4) * layer)


def test_a_checkpoint_that_is_yours_to_name_has_no_estimate() -> None:
    assert "# no estimate: owner/" in estimate_run(load_recipe(ROOT / "recipes" / "diffucoder" / "midtrain.yaml"))


@pytest.mark.parametrize(
    ("family", "billions"), [("dream", 7.6), ("llada", 8.0), ("stable_diffcoder", 8.25), ("sdar", 8.2)]
)
def test_the_published_shapes_have_as_many_parameters_as_is_said(family: str, billions: float) -> None:
    shape = shape_of(family_of(PUBLISHED[family]).translate(PUBLISHED[family]))
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.02)
    assert set(HUB_NAMES.values()) == set(PUBLISHED)


def test_counted_parameters_are_those_of_the_class(tmp_path: Path) -> None:
    folder = tiny_checkpoint("sdar", tmp_path)
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    weights = load_file(folder / "model.safetensors")
    assert shape.parameters == sum(t.numel() for name, t in weights.items() if "norm" not in name)


def test_a_step_of_the_published_recipe_costs_what_others_computed() -> None:
    """Ten rollouts of 256 tokens after 200 in 256 steps: 6175 GFLOP a token, 20.0 s on an H200 at its peak."""
    recipe = load_recipe(ROOT / "recipes" / "diffucoder-7b-lora.yaml", ("rollout.num_prompts=1",))
    shape = shape_of(PUBLISHED["dream"])
    flops = rl_step_flops(recipe, shape, family_of(PUBLISHED["dream"]))
    assert flops["rollout"] / 2560 == pytest.approx(6175e9, rel=0.01)
    assert flops["rollout"] / 790e12 == pytest.approx(20.0, rel=0.01)


def test_dry_run_prints_the_estimate_beside_the_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["coupled", "train", str(ROOT / "recipes" / "quickstart.yaml"), "--dry-run"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    printed = capsys.readouterr()
    assert "stage: rl" in printed.out
    assert "estimate" not in printed.out, "the recipe can be piped into a file"
    assert "# estimate (arithmetic, not measured): 0.00 G parameters, family dream" in printed.err


# --- runs ---------------------------------------------------------------------------------------------------------


@every_recipe
def test_a_recipe_trains_a_tiny_random_checkpoint_of_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Rollouts, the parity check, anchors, updates, a checkpoint, and its export, with the recipe's own settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "length.py").write_text(
        "def score(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    checkpoint = tiny_checkpoint(RECIPES[name], tmp_path)
    data = ROOT / "recipes" / "tiny" / "tasks" / "rl.jsonl"
    settings = (*SMALL, f"model.path={checkpoint}", f"data.path={data}", f"output_dir={tmp_path}")
    has_ranks = load_recipe(ROOT / "recipes" / f"{name}.yaml").cluster.trainer_ranks > 1
    settings += ("cluster.trainer_ranks=2", "rollout.batch_size=3") if has_ranks else ()
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", settings)
    result = train(recipe)
    assert "scoring agrees with 4 replayed rollouts" in capsys.readouterr().out
    rows = read_rows(result.path / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert all(torch.isfinite(torch.tensor([row["loss"], row["grad_norm"], row["kl"], row["ratio"]])))
        assert row["grad_norm"] > 0
    trained = load_policy(result.checkpoint)
    assert trained.family.name == RECIPES[name]
    out = tmp_path / "exported"
    merge = ["--merge"] if recipe.model.adapter is not None else []
    monkeypatch.setattr("sys.argv", ["coupled", "export", str(result.path), str(out), "--dtype", "float32", *merge])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    exported = load_policy(out)
    assert not exported.has_adapter
    assert (exported.family, exported.mask_id, exported.end_ids) == (trained.family, trained.mask_id, trained.end_ids)
    base, moved = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert base.keys() == moved.keys()
    assert any(not torch.equal(base[key], moved[key]) for key in base)


@pytest.mark.parametrize("model", [(), ("model.block_length=4",)], ids=["whole", "blocks"])
@pytest.mark.parametrize("family", ["autoregressive", "sdar", "llada"])
def test_likelihood_training_adapts_every_kind_of_model(tmp_path: Path, family: str, model: tuple[str, ...]) -> None:
    checkpoint = tiny_checkpoint(family, tmp_path)
    settings = (
        f"model.path={checkpoint}",
        f"output_dir={tmp_path}",
        "num_steps=8",
        "fit.batch_size=8",
        "fit.mask_ratio=[0.3, 1.0]",
        "optimizer.learning_rate=5e-3",
        "optimizer.warmup_steps=0",
        "model.compute_dtype=float32",
        "fit.objective=null",
        *model,
        *(("model.shift=0",) if model and family == "autoregressive" else ()),
    )
    from coupled.rl.fit import fit

    fit(load_recipe(ROOT / "recipes" / "tiny" / "sft.yaml", settings))
    (metrics,) = tmp_path.glob("*/metrics.jsonl")
    losses = [row["loss"] for row in read_rows(metrics)]
    assert sum(losses[-3:]) < sum(losses[:3]), losses
