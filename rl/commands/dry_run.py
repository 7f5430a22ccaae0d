"""Memory of the trainer and time of a step, estimated from the model's shape and the recipe alone.

Arithmetic, not measurement: operations divided by the processor's peak times the share of it that large matrix products
reach in practice. The estimate shows whether a recipe fits a machine, and which part of a step takes the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from coupled.rl.errors import CheckpointError
from coupled.rl.estimators import scoring_cost
from coupled.rl.estimators.cost import ScoringCost
from coupled.rl.model.families import Family, family_of
from coupled.rl.model.reference import reference_kind
from coupled.rl.model.vocabulary import CHUNK_LOGITS
from coupled.rl.recipe.schema import AnyRecipe, LikelihoodRecipe, Recipe
from coupled.rl.rollout.sampler import plan_steps, steps_per_block

PEAK_TFLOPS = {"H200": 790.0, "A100": 250.0}
"""bfloat16, dense: third-party measurement on large products (H200), or the published peak (A100)."""
UTILISATION = 0.5
GIB = 2.0**30

PUBLISHED: dict[str, dict[str, Any]] = {
    "dream": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "model_type": "Dream",
    },
    "llada": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 126464, "model_type": "llada",
    },
    "stable_diffcoder": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 155136, "model_type": "llama",
        "architectures": ["StableDiffcoderForCausalLM"],
    },
    "sdar": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "model_type": "sdar", "block_size": 4,
    },
}  # fmt: skip
"""Shapes of checkpoints that recipes name on the hub, for machines without access to it."""
# The autoregressive models that Dream-7B and Stable-DiffCoder were adapted from.
PUBLISHED["qwen2"] = PUBLISHED["dream"] | {"model_type": "qwen2"}
PUBLISHED["llama"] = PUBLISHED["stable_diffcoder"] | {"architectures": ["LlamaForCausalLM"]}
HUB_NAMES = {
    "apple/DiffuCoder-7B-Base": "dream",
    "apple/DiffuCoder-7B-Instruct": "dream",
    "Dream-org/Dream-v0-Instruct-7B": "dream",
    "GSAI-ML/LLaDA-8B-Instruct": "llada",
    "ByteDance-Seed/Stable-DiffCoder-8B-Instruct": "stable_diffcoder",
    "ByteDance-Seed/Stable-DiffCoder-8B-Base": "stable_diffcoder",
    "JetLM/SDAR-8B-Chat": "sdar",
    "Qwen/Qwen2.5-Coder-7B": "qwen2",
    "ByteDance-Seed/Seed-Coder-8B-Base": "llama",
}
"""Hub name → key of PUBLISHED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Dimensions of a transformer."""

    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    is_tied: bool

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's matrices, by name."""
        queries, keys = self.heads * self.head_dim, self.groups * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.inner, self.hidden),
            "up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }

    @property
    def body(self) -> int:
        """Parameters of all layers, without norms."""
        return self.layers * sum(rows * columns for rows, columns in self.linear.values())

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.body + self.head * (1 if self.is_tied else 2)

    def adapter(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of LoRA factors: r (rows + columns) for each matrix."""
        return self.layers * sum(rank * sum(size) for name, size in self.linear.items() if name in targets)

    def forward_flops(self, tokens: int, context: int, head_rows: int) -> int:
        """2 operations per parameter and token, attention over the context, and the head at `head_rows` positions."""
        attention = 4 * self.layers * self.heads * self.head_dim * context
        return tokens * (2 * self.body + attention) + 2 * self.head * head_rows


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape given by a translated `config.json`."""
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        is_tied=bool(config.get("tie_word_embeddings", False)),
    )


def memory_gib(recipe: AnyRecipe, shape: Shape, family: Family) -> dict[str, float]:
    """Peak memory of a device of the trainer, part by part, in GiB.

    Trained weights have a gradient and two moments, all float32. Activations: per token and layer, the inputs of norms,
    projections and the inner layer that the backward pass needs, kept for one micro-batch of all the estimator's masked
    inputs, or of one with `has_two_passes`; with gradient checkpointing, the input of each layer and all of one.
    Sharded weights count with the device's share, plus the part that is gathered at a time.
    """
    adapter = recipe.model.adapter
    bytes_each = 2 if recipe.model.weights_dtype == "bfloat16" else 4
    trained = shape.parameters if adapter is None else shape.adapter(adapter.rank, adapter.targets)
    shares = recipe.cluster.trainer_ranks if adapter is None else 1
    parts = {"weights": shape.parameters * bytes_each / shares, "gradients and moments": trained * 12 / shares}
    if adapter is not None:
        parts["adapter"] = trained * 4
    kind = reference_kind(recipe.loss, has_adapter=adapter is not None) if isinstance(recipe, Recipe) else "none"
    if kind != "none":
        parts["reference"] = (0 if kind == "adapter_off" else trained) * bytes_each / shares
    compute_bytes = 2 if recipe.model.compute_dtype == "bfloat16" else 4
    if shares > 1:
        parts["gathered"] = _gathered(recipe, shape, compute_bytes)
    elif compute_bytes == 2 and bytes_each == 4:
        parts["autocast copies"] = shape.body * 2
    streams = 2 if _has_two_streams(recipe, family) else 1
    if isinstance(recipe, Recipe):
        rows, canvas = recipe.optimizer.micro_batch_size, recipe.rollout.canvas
        inputs = rows if recipe.optimizer.has_two_passes else scoring_rows(recipe, family, rows)
        length = recipe.data.max_prompt_tokens + canvas
    else:
        rows = inputs = recipe.fit_micro_batch_size
        canvas = recipe.fit.context or recipe.fit.canvas
        length = recipe.fit.context or recipe.data.max_prompt_tokens + canvas
    tokens = inputs * streams * length
    of_layer = 16 * shape.hidden + 3 * shape.inner
    kept = shape.layers * of_layer
    if recipe.optimizer.has_gradient_checkpointing:
        kept = shape.layers * shape.hidden + of_layer
    parts["activations"] = tokens * kept * compute_bytes
    parts["logits"] = min(rows * canvas * shape.vocabulary, CHUNK_LOGITS["cuda"]) * 4 * 3
    return {name: size / GIB for name, size in parts.items()}


def _gathered(recipe: AnyRecipe, shape: Shape, compute_bytes: int) -> int:
    """Bytes of sharded weights that are gathered at a time: the part outside of the layers in fp32, and layers in the
    compute type, all of them for rollouts and scoring. Likelihood training: two layers, gradients of one and the rest.
    """
    outside, layer = shape.parameters - shape.body, shape.body // shape.layers
    if isinstance(recipe, Recipe):
        return outside * 4 + shape.body * compute_bytes
    return outside * 8 + layer * (2 * compute_bytes + 4)


def fit_step_flops(recipe: LikelihoodRecipe, shape: Shape, family: Family) -> dict[str, int]:
    """Operations of one step of likelihood training: forward and backward pass over every row, streams included."""
    length = recipe.fit.context or recipe.data.max_prompt_tokens + recipe.fit.canvas
    streams = 2 if _has_two_streams(recipe, family) else 1
    once = recipe.fit.batch_size * shape.forward_flops(length * streams, length, length // 2)
    backward = 2 if recipe.model.adapter is None else 1  # frozen weights need no gradient
    return {"training": once * (1 + backward)}


def rl_step_flops(recipe: Recipe, shape: Shape, family: Family) -> dict[str, int]:
    """Operations of one RL step: denoising the completions, then scoring them and training on them."""
    rollout = recipe.rollout
    rows = rollout.num_prompts * rollout.group_size
    canvas, prompt = rollout.canvas, recipe.data.max_prompt_tokens
    length = prompt + canvas
    size = family.block_length
    if size is None:
        passes = rollout.denoising_steps
        made = rows * passes * shape.forward_flops(length, length, canvas // 2)
    else:
        per_block = steps_per_block(rollout, size)
        tokens = (per_block + 1) * canvas
        made = rows * shape.forward_flops(tokens, length - canvas // 2, per_block * canvas // 2)
        made += rollout.num_prompts * shape.forward_flops(prompt, prompt, 0)
    streams = 1 if size is None else 2
    tokens = scoring_rows(recipe, family, rows) * length * streams
    once = shape.forward_flops(tokens, length, round(rows * scoring_cost_of(recipe, family).scored))
    has_reference = reference_kind(recipe.loss, has_adapter=recipe.model.adapter is not None) != "none"
    scored = once * (recipe.num_updates * int(has_reference) + recipe.num_updates - 1)
    backward = 2 if recipe.model.adapter is None else 1  # frozen weights need no gradient
    return {"rollout": made, "scoring": scored, "update": recipe.num_updates * once * (1 + backward)}


def scoring_rows(recipe: Recipe, family: Family, num_completions: int) -> int:
    """Rows of all forward passes that score `num_completions` completions once, group by group.

    Completions of a group share their fully masked rows within a micro-batch where their inputs are equal: the
    attention is full, positions after the end are MASK, and no prompt token is hidden. (Completions that fill the
    canvas also share them otherwise; the estimate ignores that.)
    """
    cost = scoring_cost_of(recipe, family)
    estimator, size, group = recipe.estimator, recipe.optimizer.micro_batch_size, recipe.rollout.group_size
    is_shared = family.block_length is None and estimator.post_eos == "mask" and estimator.prompt_mask_probability == 0
    distinct = len({(row // size, row // group) for row in range(num_completions)}) if is_shared else num_completions
    return cost.own_views * num_completions + cost.shared_views * distinct


def scoring_cost_of(recipe: Recipe, family: Family) -> ScoringCost:
    """Masked inputs of a completion that fills the canvas and takes the maximum number of steps."""
    sampler, size = recipe.rollout, family.block_length
    if size is None:
        steps = len(plan_steps(sampler))
    else:
        steps = min(steps_per_block(sampler, size) * -(-sampler.canvas // size), sampler.canvas)
    return scoring_cost(recipe.estimator, sampler.canvas, steps)


def _has_two_streams(recipe: AnyRecipe, family: Family) -> bool:
    if isinstance(recipe, Recipe) or recipe.fit.objective is None:
        return family.block_length is not None
    return recipe.fit.objective == "block_diffusion"


def estimate_run(recipe: AnyRecipe) -> str:
    """The estimate as a few lines; one line with the reason when the model's shape is not available."""
    try:
        config = _config_of(recipe)
        family = family_of(
            config,
            name=recipe.model.family,
            shift=recipe.model.shift,
            block_length=recipe.model.block_length,
        )
        shape = shape_of(family.translate(config))
    except (CheckpointError, KeyError) as error:
        return f"# no estimate: {str(error).splitlines()[0]}"
    memory = memory_gib(recipe, shape, family)
    lines = [
        f"# estimate (arithmetic, not measured): {shape.parameters / 1e9:.2f} G parameters, family {family.name}",
        f"# memory: {sum(memory.values()):.1f} GiB = "
        + " + ".join(f"{name} {size:.1f}" for name, size in memory.items() if size),
    ]
    if isinstance(recipe, Recipe):
        flops = rl_step_flops(recipe, shape, family)
    else:
        flops = fit_step_flops(recipe, shape, family)
    ranks = recipe.cluster.trainer_ranks
    for name, peak in PEAK_TFLOPS.items():
        seconds = {part: work / (peak * 1e12 * UTILISATION * ranks) for part, work in flops.items()}
        parts = ", ".join(f"{part} {value:.3g} s" for part, value in seconds.items())
        count = "one" if ranks == 1 else str(ranks)
        total = sum(seconds.values())
        lines.append(
            f"# {count} {name} at {UTILISATION:.0%} of {peak:g} TFLOP/s: {total:.3g} s a step ({parts}), "
            f"{total * recipe.num_steps / 3600:.3g} h in all"
        )
    return "\n".join(lines)


def _config_of(recipe: AnyRecipe) -> dict[str, Any]:
    path = recipe.model.path
    if not Path(path).is_dir() and path in HUB_NAMES:
        return PUBLISHED[HUB_NAMES[path]]
    if path.startswith("owner/"):
        raise CheckpointError(f"{path} is a placeholder for your checkpoint: set model.path")
    try:
        values, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the configuration of {path}: {error}") from error
    return values
