"""Opening checkpoints: published ones as they are, our own, adapters, and autoregressive models to be adapted.

No code of a checkpoint is run. Its `config.json` names the family, a class of transformers computes it, and the loaded
model is compared with the files: every weight has its place, and buffers that no file holds equal those that the
configuration implies.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from coupled.rl.errors import CheckpointError
from coupled.rl.keys import integer_seed
from coupled.rl.model.families import Family, family_of
from coupled.rl.model.policy import Policy
from coupled.rl.model.weights import DIFFUSION_FILE

ADAPTER_CONFIG = "adapter_config.json"
REMOTE_CODE_WARNING = (
    "model.trust_remote_code: running the code in {path}. The code may do anything that you may do; it works with few "
    "versions of transformers, and with some it loads and computes something else; and its masking of padding has not "
    "been checked. Leave the setting out if the family is supported"
)


def load_policy(
    path: Path | str,
    *,
    family: str | None = None,
    shift: int | None = None,
    block_length: int | None = None,
    mask_token: str | None = None,
    end_tokens: tuple[str, ...] = (),
    compute_dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype = torch.float32,
    from_scratch_seed: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Policy:
    """Open a checkpoint: a model folder, or an adapter folder that names its base.

    Args:
        family, shift, block_length, mask_token, end_tokens: override the checkpoint's and its family's settings; a
            `block_length` of 0 is attention to the whole sequence. For an autoregressive model, `mask_token` is added
            to the vocabulary if the tokenizer has no token of that name.
        from_scratch_seed: read only `config.json` and the tokenizer, and draw the weights.
        trust_remote_code: run the modelling code in the checkpoint's folder instead of the family's class.

    Raises:
        CheckpointError: no such folder, a missing file, an unknown family, or weights that do not fill the model.
    """
    folder = Path(path)
    is_local = folder.is_dir()
    if is_local:
        path = folder = folder.resolve()  # an adapter remembers this path, and may be opened from elsewhere
    _refuse_no_checkpoint(path, is_local=is_local, needs_weights=from_scratch_seed is None)
    if is_local and (folder / ADAPTER_CONFIG).is_file():
        chosen: dict[str, Any] = {"family": family, "shift": shift, "block_length": block_length}
        chosen |= {"mask_token": mask_token, "end_tokens": end_tokens or None}
        return _load_adapter(
            folder,
            {k: v for k, v in chosen.items() if v is not None},
            compute_dtype=compute_dtype,
            weights_dtype=weights_dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    try:
        values, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the configuration of {path}: {error}") from error
    found = family_of(values, name=family, shift=shift, block_length=block_length)
    # Eager attention trains about twice as fast as SDPA on a CPU at lengths under 100; on a GPU SDPA wins.
    attention = "eager" if device == "cpu" else "sdpa"
    if trust_remote_code:
        model = _run_remote_code(path, weights_dtype)
    else:
        config = AutoConfig.for_model(found.model_type, **found.translate(values))
        config.is_causal = False
        config._attn_implementation = attention
        config.use_cache = False
        if from_scratch_seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(integer_seed(from_scratch_seed, "init"))
                model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        else:
            model = _load_weights(path, found, config, attention, weights_dtype)
        verify_buffers(model)
    tokenizer = load_tokenizer(path)
    model.config.diffusion = found.stated()
    stated = values.get("diffusion") or {}
    if end_tokens or stated.get("end_ids"):
        model.config.diffusion["end_ids"] = _ids_of(end_tokens, tokenizer) if end_tokens else stated["end_ids"]
    if mask_token is not None:
        _settle_mask_token(mask_token, tokenizer, model, found)
    return Policy(model.to(device).eval(), tokenizer, found, compute_dtype)


def add_adapter(policy: Policy, *, rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> Policy:
    """The policy with LoRA adapters in its layers, which alone are trained [Hu et al. 2021].

    `lora_B` starts at zero, so the policy with fresh adapters equals its base exactly. The adapters are put into the
    layers of the given policy, which must not be used any more.

    Raises:
        CheckpointError: `targets` are not linear layers of the model.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, "adapter"))
        with _without_deprecations():
            try:
                return policy.replaced(model=get_peft_model(policy.model, config).eval())
            except ValueError as error:
                raise CheckpointError(
                    f"model.adapter.targets must name linear layers of the model; {list(targets)} does not: {error}"
                ) from error


def merge_adapter(policy: Policy) -> Policy:
    """The policy without adapters, whose product is added to the weights they adapt, in place: W ← W + α/r · B A."""
    model: Any = policy.model
    with _without_deprecations():
        return policy.replaced(model=model.merge_and_unload())


# --- weights --------------------------------------------------------------------------------------------------------


def published_weights(folder: Path, family: Family, config: Any) -> dict[str, Tensor]:
    """All tensors of a folder under the names that the transformers class has for them.

    Raises:
        CheckpointError: two tensors would take the same name, or a fused one has a wrong number of rows.
    """
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                for part, tensor in _parts(family.rename(name), tensors.get_tensor(name), family, config):
                    if part in weights:
                        raise CheckpointError(f"two weights of {folder} are both {part} of the {family.name} family")
                    weights[part] = tensor
    return weights


def verify_buffers(model: nn.Module) -> None:
    """Compare the rotary frequencies, which no checkpoint holds, with those that the configuration implies.

    transformers builds models without memory first; buffers that are not filled afterwards hold arbitrary values, and
    the model computes nonsense silently.

    Raises:
        CheckpointError: they differ, or a weight was never filled.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{name} was never filled; the checkpoint or this transformers version is broken")
    for name, module in model.named_modules():
        if "inv_freq" in dict(module.named_buffers(recurse=False)):
            fresh: Any = type(module)(config=module.config)
            kept = module.get_buffer("inv_freq").cpu()
            if not torch.equal(kept.float(), fresh.inv_freq.cpu().float()):
                raise CheckpointError(
                    f"{name}.inv_freq is not what the configuration gives: the rotary frequencies were not initialised"
                )


def _load_weights(path: Path | str, family: Family, config: Any, attention: str, dtype: torch.dtype) -> Any:
    options = {
        "config": config,
        "dtype": dtype,
        "attn_implementation": attention,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are reported below, with everything else that does not fit
    }
    source: Path | str | None = path
    try:
        if family.renames or family.fused:
            options["state_dict"] = published_weights(_local(path), family, config)
            source = None
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(source, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights of {path}: {error}. Copy the checkpoint again") from error
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost or info["unexpected_keys"]:
        raise CheckpointError(
            f"{path} does not fill the {family.model_type} architecture: "
            f"missing {lost[:3]}, unexpected {sorted(info['unexpected_keys'])[:3]}; "
            "is model.family right for this checkpoint?"
        )
    if Path(path).is_dir():
        _compare_sizes(Path(path), model)
    model.name_or_path = str(path)  # an adapter remembers it
    return model


def _compare_sizes(folder: Path, model: nn.Module) -> None:
    """Compare the count of numbers in the files and in the model: two weights in the same place would leave too few."""
    in_files = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            in_files += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    state = model.state_dict()
    in_model = sum(t.numel() for t in state.values())
    # Tied weights appear twice in the state, and once or twice in the files.
    distinct = sum(t.numel() for t in {t.data_ptr(): t for t in state.values()}.values())
    if not distinct <= in_files <= in_model:
        raise CheckpointError(
            f"the files of {folder} hold {in_files} numbers and the model {in_model}: some weights were not loaded, or "
            "two were loaded into one place; is model.family right for this checkpoint?"
        )


def _parts(name: str, tensor: Tensor, family: Family, config: Any) -> Iterator[tuple[str, Tensor]]:
    for fused, parts in family.fused:
        if f".{fused}." in name:
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            rows = [n * config.head_dim for n in (heads, groups, groups)]
            if len(tensor) != sum(rows):
                raise CheckpointError(f"{name} has {len(tensor)} rows; its parts {parts} need {sum(rows)}")
            for part, piece in zip(parts, tensor.split(rows), strict=True):
                yield name.replace(fused, part), piece.contiguous()
            return
    yield name, tensor


def _local(path: Path | str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))


def _refuse_no_checkpoint(path: Path | str, *, is_local: bool, needs_weights: bool) -> None:
    folder = Path(path)
    if not is_local:
        if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
            raise CheckpointError(
                f"model.path must be a checkpoint folder or a hub name 'owner/name'; {path} is neither"
            )
        return
    if (folder / ADAPTER_CONFIG).is_file():
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint folder")
    if needs_weights and not list(folder.glob("*.safetensors*")):
        raise CheckpointError(
            f"{folder} has a configuration but no weights (*.safetensors). Point model.path at a checkpoint that has "
            "them, or draw fresh ones with model.init=random"
        )
    index = folder / "model.safetensors.index.json"
    if needs_weights and index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of {len(shards)} weight files, {missing[0]} among them; copy the "
                "checkpoint again"
            )


def _run_remote_code(path: Path | str, dtype: torch.dtype) -> Any:
    print(REMOTE_CODE_WARNING.format(path=path), file=sys.stderr)
    errors = []
    for loader in (AutoModelForCausalLM, AutoModel):
        try:
            model = loader.from_pretrained(path, trust_remote_code=True, dtype=dtype)
        except Exception as error:  # the checkpoint's own code: any type
            errors.append(f"{loader.__name__}: {error}")
            continue
        if isinstance(getattr(model, "model", None), nn.Module) and hasattr(model, "lm_head"):
            return model
        errors.append(f"{loader.__name__}: its class {type(model).__name__} has no body `model` and head `lm_head`")
    raise CheckpointError(
        f"the code in {path} cannot be used: {'; '.join(errors)}. Open the checkpoint through its family, without "
        "model.trust_remote_code, or with the transformers version that its authors name"
    )


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer of a checkpoint folder, or of a hub name."""
    # A tokenizer.json is complete. AutoTokenizer would replace its pre-tokenizer by the one it knows for the model
    # type, and split the same text into other tokens.
    is_complete = (Path(path) / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if is_complete else AutoTokenizer).from_pretrained(path)


def _ids_of(tokens: tuple[str, ...], tokenizer: Any) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in tokens if token not in vocabulary]
    if unknown:
        raise CheckpointError(f"model.end_tokens must be tokens of the checkpoint; {unknown[0]!r} is not one")
    return [vocabulary[token] for token in tokens]


def _settle_mask_token(token: str, tokenizer: Any, model: Any, family: Family) -> None:
    """Take a token of the vocabulary as MASK, or add one: its embedding is the mean of all, and is trained."""
    if token not in tokenizer.get_vocab():
        if not family.is_autoregressive:
            raise CheckpointError(
                f"model.mask_token {token!r} is not in the checkpoint's vocabulary, and a {family.name} model has been "
                "trained with a mask token of its vocabulary; leave model.mask_token out"
            )
        tokenizer.add_special_tokens({"mask_token": token})
        new = tokenizer.mask_token_id
        embedding = model.get_input_embeddings().weight
        if new >= len(embedding):
            with torch.random.fork_rng(devices=[]):  # transformers draws the rows that are set below
                torch.manual_seed(0)
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[new] = table[:new].mean(0)
    tokenizer.mask_token = token


# --- adapters ---------------------------------------------------------------------------------------------------------


def _load_adapter(folder: Path, chosen: Mapping[str, Any], **options: Any) -> Policy:
    from peft import PeftModel

    base_path = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    remembered: dict[str, Any] = {}
    if (folder / DIFFUSION_FILE).is_file():
        remembered = json.loads((folder / DIFFUSION_FILE).read_text())
        remembered["end_tokens"] = tuple(remembered.get("end_tokens", ()))
    policy = load_policy(base_path, **(remembered | dict(chosen)), **options)
    with _without_deprecations():
        adapted = PeftModel.from_pretrained(policy.model, str(folder), is_trainable=True).eval()
    return policy.replaced(model=adapted)


@contextmanager
def _without_deprecations() -> Iterator[None]:
    # peft reads deprecated attributes of transformers; our users cannot change that.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def require_end_token(tokenizer: Any, path: Path | str) -> None:
    """Return if the tokenizer has an end token.

    Raises:
        CheckpointError: it has none, so that no completion could ever end.
    """
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"the tokenizer of {path} names no end token, so no completion would ever end: set eos_token in its "
            "tokenizer_config.json to the token that ends an answer"
        )
