"""The model behind one small protocol: log-probabilities of tokens at chosen positions, whatever the family."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from coupled.rl.errors import CheckpointError
from coupled.rl.families import Family, family_of
from coupled.rl.keys import integer_seed
from coupled.rl.shapes import Bool, Float, Int

ADAPTER_CONFIG = "adapter_config.json"
DIFFUSION_FILE = "diffusion.json"
"""In an adapter's folder: how its base is opened."""


class Policy:
    """A diffusion language model with its tokenizer, and LoRA adapters if asked for.

    Args:
        model: a transformers causal-LM class whose body is `model.model` and whose head is `model.lm_head`.
        tokenizer: must know a mask token and at least one end token.
        family: logit shift and architecture.
        compute_dtype: float32, or bfloat16 for autocast in the forward pass. Log-softmax is fp32 in either case.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, family: Family, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.family = family
        self.compute_dtype = compute_dtype
        self.is_causal = family.block_length == 1
        self._reference_model: nn.Module | None = None
        self.has_moving_reference = False
        config = self._base.config
        mask_id = tokenizer.mask_token_id
        if mask_id is None:
            mask_id = getattr(config, "mask_token_id", None)
        if mask_id is None:
            raise CheckpointError(
                "a diffusion model needs a mask token: neither tokenizer.mask_token nor config.mask_token_id is set; "
                "add one of them to the checkpoint"
            )
        self.mask_id = int(mask_id)
        if tokenizer.eos_token_id is None:
            raise CheckpointError(
                "a completion ends with an end token, and tokenizer.eos_token is not set; set it in the checkpoint's "
                "tokenizer_config.json"
            )
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.end_ids: tuple[int, ...] = tuple(
            sorted({i for i in (tokenizer.eos_token_id, self.pad_id) if i is not None})
        )
        if len(tokenizer) > config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens but the model embeds only {config.vocab_size}; "
                "they are not of the same checkpoint: point model.path at a folder that holds both"
            )

    @property
    def _base(self) -> Any:
        """The transformers model, without the peft wrapper if there is one."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self._base.config

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def num_vocabulary(self) -> int:
        """Rows of the output head that the tokenizer can name; a padded head has more."""
        return len(self.tokenizer)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def logits_at(
        self,
        ids: Int[Tensor, "B S"],
        pad_lengths: Int[Tensor, " B"],
        rows: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "N V"]:
        """Logits for the tokens *at* the positions `rows`, aligned whatever the family's shift.

        The vocabulary is projected at those positions only: [B, S, V] never exists. Padding (the first
        `pad_lengths` positions of a row) is never attended, and positions count from the first real token.
        """
        hidden = self._hidden(ids, pad_lengths)
        source = rows
        if self.family.shift:
            source = torch.zeros_like(rows)
            source[:, : -self.family.shift] = rows[:, self.family.shift :]
        with self._autocast():
            logits = self._base.lm_head(hidden[source])
        return logits.float()

    def logp_at(
        self,
        ids: Int[Tensor, "B S"],
        pad_lengths: Int[Tensor, " B"],
        rows: Bool[Tensor, "B S"],
        targets: Int[Tensor, "B S"],
        temperature: float = 1.0,
    ) -> Float[Tensor, " N"]:
        """log p(targets | ids) at the positions `rows`, in nats, fp32; MASK has probability zero."""
        logits = self.without_mask_token(self.logits_at(ids, pad_lengths, rows))
        return torch.log_softmax(logits / temperature, dim=-1).gather(-1, targets[rows][:, None])[:, 0]

    def without_mask_token(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Forbid MASK (a completion never contains it) and head rows that no token names."""
        forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        forbidden[self.mask_id] = True
        forbidden[self.num_vocabulary :] = True
        return logits.masked_fill(forbidden, float("-inf"))

    def logits_seeing(
        self,
        ids: Int[Tensor, "B S"],
        positions: Int[Tensor, "B S"],
        seen: Bool[Tensor, "B S S"],
        sources: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "N V"]:
        """Logits made of the hidden states at `sources`, where the query position q sees the keys `seen[:, q]`.

        For training, which attends in more ways than the family does: several samples in a row, two streams of one
        sample. Nothing is shifted here.
        """
        hidden = self._hidden_seeing(ids, positions, seen[:, None])
        with self._autocast():
            logits = self._base.lm_head(hidden[sources])
        return logits.float()

    def attend(self, block_length: int | None) -> None:
        """Switch how positions see each other, and say so in the configuration that is saved with the weights."""
        self.family = replace(self.family, block_length=block_length)
        self.is_causal = block_length == 1
        self.config.diffusion = self.family.stated()

    def _hidden(self, ids: Int[Tensor, "B S"], pad_lengths: Int[Tensor, " B"]) -> Float[Tensor, "B S D"]:
        if self.family.block_length is not None and self.family.block_length > 1:
            raise CheckpointError(
                f"this checkpoint writes in blocks of {self.family.block_length} positions, which rollout and scoring "
                "do not do yet; train on with fit.objective=block_diffusion or masked_diffusion"
            )
        length = ids.shape[1]
        place = torch.arange(length, device=ids.device)
        is_real = place[None, :] >= pad_lengths[:, None]
        allowed = is_real[:, None, None, :]
        if self.is_causal:
            allowed = allowed & (place[:, None] >= place[None, :])
        return self._hidden_seeing(ids, place[None, :] - pad_lengths[:, None], allowed)

    def _hidden_seeing(
        self, ids: Int[Tensor, "B S"], positions: Int[Tensor, "B S"], seen: Bool[Tensor, "B 1 _ S"]
    ) -> Float[Tensor, "B S D"]:
        # An explicit additive mask: with none, transformers would fall back to causal attention for some classes,
        # and eager attention silently adds a boolean mask as 0/1.
        dtype = self.compute_dtype
        lowest = torch.finfo(dtype).min
        attention = torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill(~seen, lowest)
        places = positions.clamp(min=0)
        with self._autocast():
            out = self._base.model(input_ids=ids, attention_mask=attention, position_ids=places, use_cache=False)
        return out.last_hidden_state

    def _autocast(self) -> Any:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    # --- the reference that KL pulls towards -------------------------------------------------------------------

    def freeze_reference(self, *, is_moving: bool = False) -> None:
        """Remember the present weights as the reference; with adapters they are simply turned off.

        `is_moving`: the reference is to follow by `mix_reference`, so that with adapters, too, it is a copy. A copy
        shares whatever is not trained: of an adapted policy it holds the adapters alone.
        """
        self.has_moving_reference = is_moving
        if is_moving or not self.has_adapter:
            shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
            self._reference_model = copy.deepcopy(self.model, shared).requires_grad_(False).eval()

    @torch.no_grad()
    def mix_reference(self, share: float) -> None:
        """θ_ref ← share · θ + (1 - share) · θ_ref: 1 replaces the reference, a small share is a moving average.

        Of adapters the factors are mixed, which is not the mean of the two products.
        """
        for name, tensor in self._reference_tensors().items():
            live = self.model.get_parameter(name)
            tensor.copy_(share * live + (1 - share) * tensor)

    def reference_state(self) -> dict[str, Tensor]:
        """Name → tensor of a copied reference, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self._reference_tensors().items()}

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Put `reference_state()` back, in place.

        Raises:
            CheckpointError: it is the state of another model.
        """
        mine = self._reference_tensors()
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in state.items()}:
            raise CheckpointError(
                f"the saved reference ({len(state)} tensors) is not of this model ({len(mine)} trained tensors); "
                "is model.adapter the same as when it was saved?"
            )
        for name, tensor in mine.items():
            tensor.data.copy_(state[name])

    def _reference_tensors(self) -> dict[str, Tensor]:
        if self._reference_model is None:
            raise RuntimeError("freeze_reference(is_moving=True) was not called: there is no copy that could move")
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        return {n: p.detach() for n, p in self._reference_model.named_parameters() if n in trained}

    @contextmanager
    def reference(self) -> Iterator[Policy]:
        """The policy with the reference weights: the copy, or else adapters off."""
        if self._reference_model is None and self.has_adapter:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield self
            return
        if self._reference_model is None:
            raise RuntimeError("freeze_reference() was not called before reference()")
        live, self.model = self.model, self._reference_model
        try:
            yield self
        finally:
            self.model = live

    # --- weights ------------------------------------------------------------------------------------------------

    def trainable_state(self) -> dict[str, Tensor]:
        """Name → tensor of everything that training changes, on the CPU."""
        return {n: p.detach().cpu() for n, p in self.model.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put `trainable_state()` of an equal policy into this one, in place.

        Raises:
            CheckpointError: names or shapes differ.
        """
        mine = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if mine.keys() != state.keys():
            odd = sorted(mine.keys() ^ state.keys())[:3]
            raise CheckpointError(
                f"the saved weights are not of this model: {len(mine)} trainable tensors here, {len(state)} saved, "
                f"differing in {odd}; is model.adapter the same as when they were saved?"
            )
        for name, parameter in mine.items():
            if parameter.shape != state[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(parameter.shape)} here and {tuple(state[name].shape)} in the checkpoint"
                )
            parameter.data.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write an adapter, or the whole model, with the tokenizer: a folder that `load_policy` opens."""
        # The embedding of an added mask token is made anew when an adapter is opened: see `give_mask_token`.
        options = {"save_embedding_layers": False} if self.has_adapter else {}
        self.model.save_pretrained(folder, safe_serialization=True, **options)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)
        if self.has_adapter:
            stated = {**self.family.stated(), "block_length": self.family.block_length}
            stated["mask_token"] = self.tokenizer.convert_ids_to_tokens(self.mask_id)
            (folder / DIFFUSION_FILE).write_text(json.dumps(stated) + "\n")


def give_mask_token(model: Any, tokenizer: Any, token: str) -> None:
    """Make `token` the mask token: one that the vocabulary has is reused, with its embedding; else one is added.

    The rows of an added token, in the embedding and in the head, are the mean of the others, so that training starts
    from no token in particular; a head that is larger than the vocabulary has room, and is made larger otherwise.

    Raises:
        CheckpointError: the tokenizer has another mask token.
    """
    if tokenizer.mask_token not in (None, token):
        raise CheckpointError(
            f"model.mask_token is {token!r}, but the tokenizer has {tokenizer.mask_token!r}; leave model.mask_token out"
        )
    is_new = token not in tokenizer.get_vocab()
    num_known = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": token})
    if is_new:
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
                layer.weight[tokenizer.mask_token_id] = layer.weight[:num_known].mean(0)
    model.config.mask_token_id = tokenizer.mask_token_id


def load_policy(
    path: Path | str,
    *,
    family: str | None = None,
    shift: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
    from_scratch_seed: int | None = None,
    device: str = "cpu",
    mask_token: str | None = None,
) -> Policy:
    """Open a checkpoint: a model folder, or an adapter folder that names its base.

    With `from_scratch_seed` only `config.json` and the tokenizer are read, and weights are drawn. `mask_token` is for a
    checkpoint that has none, such as an autoregressive one.

    Raises:
        CheckpointError: no such folder, a missing file, an unknown family, or weights that do not fill the model.
    """
    folder = Path(path)
    is_local = folder.is_dir()
    if is_local:
        path = folder = folder.resolve()  # an adapter remembers this path, and may be opened from elsewhere
    if not is_local and (folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1):
        raise CheckpointError(f"model.path must be a checkpoint folder or a hub name 'owner/name'; {path} is neither")
    if is_local and (folder / ADAPTER_CONFIG).is_file():
        options = {"compute_dtype": compute_dtype, "device": device, "mask_token": mask_token}
        return _load_adapter(folder, family=family, shift=shift, **options)
    if is_local and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint folder")
    if is_local and from_scratch_seed is None and not list(folder.glob("*.safetensors*")):
        raise CheckpointError(
            f"{folder} has a configuration but no weights (*.safetensors). Point model.path at a checkpoint that has "
            "them, or draw fresh ones with model.init=random"
        )
    try:
        values, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the configuration of {path}: {error}") from error
    found = family_of(values, name=family, shift=shift)
    # The checkpoint's own model_type may need remote code; the family says which class of transformers computes it.
    values = {k: v for k, v in values.items() if k not in ("model_type", "auto_map", "architectures")}
    config = AutoConfig.for_model(found.model_type, **values)
    config.is_causal = False
    config.diffusion = found.stated()
    # Eager attention trains about twice as fast as SDPA on a CPU at lengths under 100; on a GPU SDPA wins.
    config._attn_implementation = "eager" if device == "cpu" else "sdpa"
    config.use_cache = False
    if from_scratch_seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer_seed(from_scratch_seed, "init"))
            model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    else:
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                attn_implementation=config._attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported below, with everything else that does not fit
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the weights of {path}: {error}. Copy the checkpoint again") from error
        lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if lost or info["unexpected_keys"]:
            raise CheckpointError(
                f"{path} does not fill the {found.model_type} architecture: "
                f"missing {lost[:3]}, unexpected {sorted(info['unexpected_keys'])[:3]}; "
                "is model.family right for this checkpoint?"
            )
    tokenizer = _load_tokenizer(path)
    if mask_token is not None:
        give_mask_token(model, tokenizer, mask_token)
    return Policy(model.to(device).eval(), tokenizer, found, compute_dtype)


def _load_tokenizer(path: Path | str) -> Any:
    # A tokenizer.json is complete. AutoTokenizer would replace its pre-tokenizer by the one it knows for the model
    # type, and split the same text into other tokens.
    is_complete = (Path(path) / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if is_complete else AutoTokenizer).from_pretrained(path)


def _load_adapter(folder: Path, **options: Any) -> Policy:
    from peft import PeftModel

    base_path = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    # The base may be an autoregressive checkpoint, or attend otherwise: what it is now is said beside the adapter.
    file = folder / DIFFUSION_FILE
    stated = json.loads(file.read_text()) if file.is_file() else {}
    for name in ("family", "shift", "mask_token"):
        options[name] = stated.get(name) if options[name] is None else options[name]
    policy = load_policy(base_path, **options)
    if stated:
        policy.attend(stated["block_length"])
    with _without_deprecations():
        policy.model = PeftModel.from_pretrained(policy.model, str(folder), is_trainable=True).eval()
    return policy


def add_adapter(policy: Policy, *, rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> None:
    """Wrap the model with LoRA adapters [Hu et al. 2021]; only they are trained.

    `lora_B` starts at zero, so the policy with fresh adapters equals its base exactly.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, "adapter"))
        with _without_deprecations():
            try:
                policy.model = get_peft_model(policy.model, config).eval()
            except ValueError as error:
                raise CheckpointError(
                    f"model.adapter.targets must name linear layers of the model; {list(targets)} does not: {error}"
                ) from error


@contextmanager
def _without_deprecations() -> Iterator[None]:
    # peft asks transformers for attributes that are on their way out; a user of ours can do nothing about it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
