"""Model families as data: which transformers class, which names, which logit shift, which attention.

A family is not a modelling file: the classes of transformers reproduce the published modelling code, given an
attention mask. The differences are names and numbers, listed here; `docs/families.md` describes how to add a family.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from coupled.rl.errors import CheckpointError, nearest

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Description of a kind of diffusion language models: everything that is needed besides the weights."""

    name: str
    model_type: str
    """The transformers architecture that computes it."""
    shift: int
    """1: position p is predicted from the hidden state at p - 1 (Dream, DiffuCoder). 0: at p itself (LLaDA)."""
    block_length: int | None = None
    """None: every position attends to all of its sequence. B: to its own block of B and to all earlier blocks; blocks
    are counted from the first token of the prompt. Blocks of 1 are causal attention."""
    members: str = ""
    """The published models, for messages."""
    signs: tuple[str, ...] = ()
    """`model_type` or class names in a checkpoint's `config.json` by which the family is recognised, in lower case."""
    mask_token: str | None = None
    """The mask token by name, for tokenizers that do not declare one."""
    mask_id: int | None = None
    """The mask token by number, where neither the tokenizer nor `config.json` has one."""
    end_tokens: tuple[str, ...] = ()
    """Tokens that end a completion besides the tokenizer's own end and pad tokens; those that it lacks are skipped."""
    settings: Renames = ()
    """`config.json` key → the name that the transformers class has for it."""
    block_setting: str | None = None
    """The `config.json` key that holds the block length."""
    required: tuple[tuple[str, Any], ...] = ()
    """`config.json` values (where present) without which the architecture would compute something else."""
    constants: tuple[tuple[str, Any], ...] = ()
    """Settings of the transformers class that `config.json` does not have; those that it has win."""
    renames: Renames = ()
    """Weight names, as regular expression → replacement, applied in turn. Saved checkpoints have the new names."""
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Weights (by their new names) that hold several of the class's, one above the other."""
    is_autoregressive: bool = False
    """An autoregressive architecture that is opened as a diffusion model, to be adapted."""

    def stated(self) -> dict[str, str | int | None]:
        """Entries of a saved configuration from which the checkpoint can be opened without further settings."""
        stated: dict[str, str | int | None] = {"family": self.name, "shift": self.shift}
        if self.block_length is None and FAMILIES[self.name].block_length is None:
            return stated
        return {**stated, "block_length": self.block_length}

    def rename(self, weight: str) -> str:
        """The transformers class's name of a published weight."""
        for pattern, replacement in self.renames:
            weight = re.sub(pattern, replacement, weight)
        return weight

    def translate(self, config: dict[str, Any]) -> dict[str, Any]:
        """The settings of the transformers class, from a published `config.json`.

        Raises:
            CheckpointError: a setting that the class does not have is switched on.
        """
        for key, value in self.required:
            if key in config and config[key] != value:
                raise CheckpointError(
                    f"family {self.name!r} computes checkpoints with {key} = {value!r}; this one has {config[key]!r}, "
                    "which would silently compute something else"
                )
        names = dict(self.settings)
        kept = {k: v for k, v in config.items() if k not in names and k not in OF_THE_PUBLISHED_CODE}
        return dict(self.constants) | kept | {names[k]: v for k, v in config.items() if k in names and v is not None}


OF_THE_PUBLISHED_CODE = ("model_type", "auto_map", "architectures", "attn_implementation", "_attn_implementation")
"""Keys of `config.json` that describe modelling code, which is not run."""

QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")

FAMILIES = {
    family.name: family
    for family in (
        # Also the embedded model.
        Family(
            name="dream",
            model_type="qwen2",
            shift=1,
            members="Dream, Dream-Coder, DiffuCoder",
            signs=("dream", "dreammodel"),
            mask_token="<|mask|>",
            end_tokens=(*QWEN_ENDS, "<|dlm_pad|>"),
            required=(("use_sliding_window", False), ("use_mrope", False)),
        ),
        Family(
            name="llada",
            model_type="llama",
            shift=0,
            members="LLaDA-8B, LLaDA-1.5",
            signs=("llada", "lladamodellm"),
            mask_token="<|mdm_mask|>",
            end_tokens=("<|eot_id|>",),
            settings=(
                ("d_model", "hidden_size"),
                ("n_heads", "num_attention_heads"),
                ("n_kv_heads", "num_key_value_heads"),
                ("n_layers", "num_hidden_layers"),
                ("mlp_hidden_size", "intermediate_size"),
                ("max_sequence_length", "max_position_embeddings"),
                ("embedding_size", "vocab_size"),
                ("weight_tying", "tie_word_embeddings"),
            ),
            required=(
                ("activation_type", "silu"),
                ("alibi", False),
                ("attention_layer_norm", False),
                ("block_type", "llama"),
                ("include_bias", False),
                ("include_qkv_bias", False),
                ("input_emb_norm", False),
                ("layer_norm_type", "rms"),
                ("rope", True),
                ("scale_logits", False),
            ),
            renames=(
                (r"^model\.transformer\.wte\.", "model.embed_tokens."),
                (r"^model\.transformer\.ln_f\.", "model.norm."),
                (r"^model\.transformer\.ff_out\.", "lm_head."),
                (r"^model\.transformer\.blocks\.", "model.layers."),
                (r"(layers\.\d+)\.attn_norm\.", r"\1.input_layernorm."),
                (r"(layers\.\d+)\.ff_norm\.", r"\1.post_attention_layernorm."),
                (r"(layers\.\d+)\.([qkv])_proj\.", r"\1.self_attn.\2_proj."),
                (r"(layers\.\d+)\.attn_out\.", r"\1.self_attn.o_proj."),
                (r"(layers\.\d+)\.ff_proj\.", r"\1.mlp.gate_proj."),
                (r"(layers\.\d+)\.up_proj\.", r"\1.mlp.up_proj."),
                (r"(layers\.\d+)\.ff_out\.", r"\1.mlp.down_proj."),
            ),
        ),
        Family(
            name="llada_moe",
            model_type="qwen3_moe",
            shift=0,
            members="LLaDA-MoE-7B-A1B",
            signs=("llada_moe", "lladamoemodellm"),
            mask_token="<|mask|>",
            mask_id=156895,
            settings=(
                ("expert_intermediate_size", "moe_intermediate_size"),
                ("dense_intermediate_size", "intermediate_size"),
            ),
            required=(
                ("qk_layernorm", True),
                ("shared_expert_intermediate_size", None),
                ("partial_rotary_factor", 1.0),
                ("router_num_group", None),
                ("moe_router_score_function", "softmax"),
                ("moe_router_enable_expert_bias", False),
            ),
            # Its heads share hidden_size, and its RMS norm has the 1e-5 of its own configuration class.
            constants=(("rms_norm_eps", 1e-5), ("norm_topk_prob", False)),
        ),
        Family(
            name="llada2",
            model_type="glm4_moe",
            shift=0,
            block_length=32,
            members="LLaDA2.0-mini, LLaDA2.1-mini",
            signs=("llada2_moe", "llada2moemodellm"),
            mask_token="<|mask|>",
            mask_id=156895,
            end_tokens=("<|role_end|>",),
            settings=(
                ("num_experts", "n_routed_experts"),
                ("num_shared_experts", "n_shared_experts"),
                ("use_qkv_bias", "attention_bias"),
            ),
            required=(
                ("score_function", "sigmoid"),
                ("moe_router_enable_expert_bias", True),
                ("norm_head", False),
                ("norm_softmax", False),
                ("use_bias", False),
                ("use_rmsnorm", True),
                ("use_qk_norm", True),
                ("use_sliding_window", False),
                ("rope_scaling", None),
            ),
            constants=(("use_qk_norm", True),),
            renames=(
                (r"^model\.word_embeddings\.", "model.embed_tokens."),
                (r"\.attention\.", ".self_attn."),
                (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
                (r"\.query_layernorm\.", ".q_norm."),
                (r"\.key_layernorm\.", ".k_norm."),
                (r"\.gate\.expert_bias$", ".gate.e_score_correction_bias"),
            ),
            fused=((r"query_key_value", ("q_proj", "k_proj", "v_proj")),),
        ),
        Family(
            name="sdar",
            model_type="qwen3",
            shift=0,
            block_length=4,
            members="SDAR, TraDo",
            signs=("sdar", "sdarforcausallm"),
            mask_token="<|MASK|>",
            end_tokens=QWEN_ENDS,
            block_setting="block_size",
            required=(("use_sliding_window", False), ("attention_bias", False)),
        ),
        Family(
            name="sdar_moe",
            model_type="qwen3_moe",
            shift=0,
            block_length=4,
            members="SDAR-30B-A3B",
            signs=("sdar_moe", "sdarmoeforcausallm"),
            mask_token="<|MASK|>",
            end_tokens=QWEN_ENDS,
            block_setting="block_size",
            required=(("use_sliding_window", False), ("attention_bias", False)),
        ),
        Family(
            name="stable_diffcoder",
            model_type="llama",
            shift=0,
            block_length=4,
            members="Stable-DiffCoder",
            signs=("stablediffcoderforcausallm",),
            mask_token="<[MASK_TOKEN]>",
            mask_id=5,
            required=(("attention_bias", False), ("mlp_bias", False)),
        ),
        Family(name="qwen2", model_type="qwen2", shift=1, members="Qwen2, Qwen2.5-Coder", is_autoregressive=True),
        Family(name="qwen3", model_type="qwen3", shift=1, members="Qwen3", is_autoregressive=True),
        Family(name="llama", model_type="llama", shift=1, members="Llama, Seed-Coder", is_autoregressive=True),
    )
}


def family_of(
    config: dict[str, Any], *, name: str | None = None, shift: int | None = None, block_length: int | None = None
) -> Family:
    """The family of a checkpoint, from its own `config.json` or from the recipe's settings.

    A checkpoint saved by this project carries `diffusion: {family, shift}`, and `block_length` where attention goes by
    blocks. Otherwise `model_type` and the class names decide. `block_length` 0 is attention to the whole sequence.

    Raises:
        CheckpointError: the checkpoint is not a diffusion model that is known here.
    """
    stated = config.get("diffusion") or {}
    chosen = name or stated.get("family") or _recognised(config)
    if chosen is None:
        raise CheckpointError(_what_it_is(config))
    if chosen not in FAMILIES:
        raise CheckpointError(f"unknown model family {chosen!r}; {nearest(chosen, FAMILIES)}\n{supported()}")
    family = FAMILIES[chosen]
    if "block_length" in stated:
        blocks = stated["block_length"]
    else:
        blocks = config.get(family.block_setting or "", family.block_length)
    if block_length is not None:
        blocks = block_length
    blocks = blocks or None
    # An autoregressive model predicts the next token; with blocks it has to learn to predict the token itself.
    default_shift = 0 if family.is_autoregressive and blocks not in (None, 1) else family.shift
    chosen_shift = stated.get("shift", default_shift) if shift is None else shift
    return replace(family, shift=chosen_shift, block_length=blocks)


def supported() -> str:
    """The families, one per line, and the page that describes how to add one."""
    diffusion = [f for f in FAMILIES.values() if not f.is_autoregressive]
    lines = [f"  {f.name:<17} {f.members}" for f in diffusion]
    adapted = ", ".join(f.name for f in FAMILIES.values() if f.is_autoregressive)
    return "\n".join(
        (
            "supported families (model.family):",
            *lines,
            f"autoregressive models that can be opened as diffusion models, to be adapted: {adapted}.",
            "docs/families.md describes how to add a family.",
        )
    )


def _recognised(config: dict[str, Any]) -> str | None:
    published = {str(config.get("model_type")), *(config.get("architectures") or ())}
    published |= {str(value).rpartition(".")[2] for value in (config.get("auto_map") or {}).values()}
    names = {name.lower() for name in published}
    return next((f.name for f in FAMILIES.values() if names & set(f.signs)), None)


def _what_it_is(config: dict[str, Any]) -> str:
    model_type, classes = config.get("model_type"), ", ".join(config.get("architectures") or ()) or "none"
    if model_type in FAMILIES and FAMILIES[model_type].is_autoregressive:
        return (
            f"the checkpoint does not say which diffusion family it is of, and {model_type!r} ({classes}) is an "
            "autoregressive model. If it is a diffusion model, name its family with model.family. To open it as one "
            f"and train it to be one (stage pretrain or sft), set model.family={model_type} and model.mask_token\n"
            + supported()
        )
    return (
        f"the checkpoint does not say which diffusion family it is of (model_type {model_type!r}, architectures: "
        f"{classes}); set model.family if it is one of these\n" + supported()
    )
