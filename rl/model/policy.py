"""The model behind one small protocol: log-probabilities of tokens at chosen positions, whatever the family."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from coupled.rl.errors import CheckpointError
from coupled.rl.model.attention import Layout, additive, first_column_of_blocks, left_padded, may_attend, two_streams
from coupled.rl.model.cuda_graphs import Graphs, fill_up, is_small
from coupled.rl.model.families import Family
from coupled.rl.model.last_layer import is_known, only, read_columns
from coupled.rl.model.packing import line_up, within_runs
from coupled.rl.model.vocabulary import OutputHead, forbid, project, token_logp
from coupled.rl.shapes import Bool, Float, Int

DIFFUSION_FILE = "diffusion.json"
"""In an adapter's folder: how its base was opened."""


class Policy:
    """A diffusion language model with its tokenizer, and LoRA adapters if asked for.

    Args:
        model: a transformers causal-LM class whose body is `model.model` and whose head is `model.lm_head`.
        tokenizer: must know a mask token and at least one end token.
        family: logit shift, attention and architecture.
        compute_dtype: float32, or bfloat16 for autocast in the forward pass. Log-softmax is fp32 in either case.
    """

    is_in_lockstep = False
    """Set while other ranks, who hold parts of the weights, make as many passes as this one does."""

    graphs: Graphs | None = None
    """Where rollouts replay small passes."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, family: Family, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.family = family
        self.compute_dtype = compute_dtype
        self._reference_model: nn.Module | None = None
        self.has_moving_reference = False
        config = self._base.config
        self.mask_id = find_mask_id(tokenizer, config, family)
        self.end_ids = find_end_ids(tokenizer, config, family)
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, self.end_ids[0])
        self.pad_id: int = next(token for token in pads if token is not None)
        if len(tokenizer) > config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens but the model embeds only {config.vocab_size}; "
                "they are not of the same checkpoint: point model.path at a folder that holds both"
            )

        self.on_pass: Callable[[], None] = lambda: None
        """Called before each pass through the layers."""

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

    @property
    def layers(self) -> Iterator[nn.Module]:
        """The blocks of the body, from the input to the output."""
        yield from self._base.model.layers

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def head(self) -> OutputHead:
        """The projection onto the vocabulary."""
        return OutputHead(
            module=self._base.lm_head,
            mask_id=self.mask_id,
            num_tokens=self.num_vocabulary,
            compute_dtype=self.compute_dtype,
        )

    def hidden_at(
        self,
        ids: Int[Tensor, "B S"],
        pad_lengths: Int[Tensor, " B"] | Layout,
        rows: Bool[Tensor, "B S"],
        clean: Int[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "N D"]:
        """The states that predict the tokens *at* the positions `rows`, aligned whatever the family's shift.

        Padding (the first `pad_lengths` positions of a row, or what a `Layout` says) is never attended, and positions
        count from the first real token. With block attention, `clean` is what earlier blocks hold, so that all blocks
        are read as they are met while decoding, in one forward pass (None: `ids` themselves); with full attention
        there are no earlier blocks, and it is not read.
        """
        layout = pad_lengths if isinstance(pad_lengths, Layout) else left_padded(pad_lengths, ids.shape[1])
        block_length = self.family.block_length
        if clean is not None and block_length is not None:
            return self._hidden_after_clean_blocks(ids, clean, layout, rows, block_length)[rows]
        hidden = self.hidden_after(ids, layout.position, may_attend(layout, layout, block_length=block_length))
        return hidden[before(rows) if self.family.shift else rows]

    def hidden_read(
        self, ids: Int[Tensor, "B S"], pad_lengths: Int[Tensor, " B"], rows: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "N D"]:
        """As `hidden_at`, with full attention and without gradients: no padding, and not more of the last layer than is
        read. Where a layer is of an unknown class it is the same as `hidden_at`."""
        layers = list(self.layers)
        if not all(map(is_known, layers)):
            return self.hidden_at(ids, pad_lengths, rows)
        source = before(rows) if self.family.shift else rows
        if bool((pad_lengths > 0).any()):
            line = line_up(ids, pad_lengths, source)
            with within_runs(self._base.model.config), only(layers[-1], line.columns, runs=line.read_runs):
                nothing = torch.ones((1, 1, 1), dtype=torch.bool, device=ids.device)
                return self.hidden_after(line.ids, line.position, nothing, runs=line.runs)[0, line.back]
        columns, is_there = read_columns(source)
        if self.graphs is None or not is_small(ids):
            return self._whole_rows(ids, columns)[is_there]
        self.on_pass()
        found = self.graphs.run(self.model, self._whole_rows, (ids, fill_up(columns, ids.shape[1])))
        return found[:, : columns.shape[1]][is_there]

    def _whole_rows(self, ids: Int[Tensor, "B S"], columns: Int[Tensor, "B M"]) -> Float[Tensor, "B M D"]:
        """The states of some columns of rows without padding; nothing is looked at on the host."""
        *_, last = self.layers
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with only(last, columns):
            return self.hidden_after(ids, position, torch.ones_like(ids, dtype=torch.bool)[:, None])

    def logits_at(
        self,
        ids: Int[Tensor, "B S"],
        pad_lengths: Int[Tensor, " B"] | Layout,
        rows: Bool[Tensor, "B S"],
        clean: Int[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "N V"]:
        """Logits for the tokens at the positions `rows`, as `hidden_at` reads them, raw and at least fp32.

        They are projected there only: [B, S, V] never exists.
        """
        return project(self.head, self.hidden_at(ids, pad_lengths, rows, clean))

    def logp_at(
        self,
        ids: Int[Tensor, "B S"],
        pad_lengths: Int[Tensor, " B"] | Layout,
        rows: Bool[Tensor, "B S"],
        targets: Int[Tensor, "B S"],
        temperature: float = 1.0,
    ) -> Float[Tensor, " N"]:
        """log p(targets | ids) at the positions `rows`, in nats, fp32; MASK has probability zero.

        `targets` is the whole finished sequence: with block attention, earlier blocks are read from it.
        """
        line = torch.arange(int(rows.sum()), device=ids.device)
        return self.logp_of(ids, pad_lengths, rows, line, targets[rows], temperature, targets)

    def logp_of(
        self,
        ids: Int[Tensor, "B S"],
        pad_lengths: Int[Tensor, " B"] | Layout,
        rows: Bool[Tensor, "B S"],
        line: Int[Tensor, " M"],
        targets: Int[Tensor, " M"],
        temperature: float = 1.0,
        clean: Int[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, " M"]:
        """As `logp_at`, for any number of tokens at a position: token m is scored at the `line_m`-th of `rows`.

        `clean` is what earlier blocks hold, as in `hidden_at`.
        """
        return token_logp(self.head, self.hidden_at(ids, pad_lengths, rows, clean), line, targets, temperature)

    def without_mask_token(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Forbid MASK (a completion never contains it) and head rows that no token names."""
        return forbid(self.head, logits)

    def hidden_after(
        self,
        ids: Int[Tensor, "B Q"],
        positions: Int[Tensor, "B Q"],
        allowed: Bool[Tensor, "B _ _"],
        cache: Cache | None = None,
        **others: Any,
    ) -> Float[Tensor, "B _ D"]:
        """Hidden states of `ids` at `positions`; the keys are those in the cache, then their own, which are added.

        Of all Q columns, unless the last layer was told of which (`last_layer.only`). `others` are handed to the
        attention function.
        """
        self.on_pass()
        attention = additive(allowed, self._mask_dtype)
        with self._autocast():
            out = self._base.model(
                input_ids=ids,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                **others,
            )
        return out.last_hidden_state

    def attend(self, block_length: int | None) -> None:
        """Switch who attends to whom, and say so in the configuration that is saved with the weights."""
        self.family = replace(self.family, block_length=block_length)
        self.config.diffusion = {**(getattr(self.config, "diffusion", None) or {}), **self.family.stated()}
        if "block_length" not in self.family.stated():
            self.config.diffusion.pop("block_length", None)

    def _hidden_after_clean_blocks(
        self,
        ids: Int[Tensor, "B S"],
        clean: Int[Tensor, "B S"],
        layout: Layout,
        rows: Bool[Tensor, "B S"],
        block_length: int,
    ) -> Float[Tensor, "B S D"]:
        """The states that predict each position of `rows`, moved to it by the family's shift.

        Both streams in one pass; of the noisy one only the blocks from the first that is asked for. With shift 1 the
        first position of a block is predicted from the last one of the block before it, which is in the clean stream:
        what a decoder has, too, once that block is done.
        """
        first = first_column_of_blocks(layout, rows, block_length)
        noisy = layout.columns(slice(first, None))
        hidden = self.hidden_after(
            torch.cat((ids[:, first:], clean), dim=1),
            torch.cat((noisy.position, layout.position), dim=1),
            two_streams(noisy, layout, block_length),
        )
        width = ids.shape[1] - first
        from_noisy = torch.cat((hidden.new_zeros((len(ids), first, hidden.shape[-1])), hidden[:, :width]), dim=1)
        if not self.family.shift:
            return from_noisy
        is_first = (layout.position % block_length == 0)[:, 1:, None]
        moved = torch.where(is_first, hidden[:, width:-1], from_noisy[:, :-1])
        return torch.cat((torch.zeros_like(moved[:, :1]), moved), dim=1)

    @property
    def _mask_dtype(self) -> torch.dtype:
        return self._base.dtype if self.compute_dtype == torch.float32 else self.compute_dtype

    def _autocast(self) -> Any:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    # --- the reference that KL pulls towards -------------------------------------------------------------------

    def freeze_reference(self, *, is_moving: bool = False, copied: nn.Module | None = None) -> None:
        """Remember the present weights as the reference; with adapters they are simply turned off.

        `is_moving`: the reference is to follow by `mix_reference`, so that with adapters, too, it is a copy. A copy
        shares whatever is not trained: of an adapted policy it holds the adapters alone. `copied`: the copy, where it
        is not to be made here.
        """
        self.has_moving_reference = is_moving
        if copied is not None:
            self._reference_model = copied
        elif is_moving or not self.has_adapter:
            shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
            self._reference_model = copy.deepcopy(self.model, shared).requires_grad_(False).eval()

    @torch.no_grad()
    def mix_reference(self, share: float) -> None:
        """θ_ref ← share · θ + (1 - share) · θ_ref: 1 replaces the reference, a small share is a moving average.

        Of adapters the factors are mixed, which is not the mean of the two products.
        """
        for name, tensor in self.reference_tensors().items():
            live = self.model.get_parameter(name)
            tensor.copy_(share * live + (1 - share) * tensor)

    def reference_state(self) -> dict[str, Tensor]:
        """Name → tensor of a copied reference, on the CPU."""
        return {name: whole_tensor(tensor).cpu() for name, tensor in self.reference_tensors().items()}

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Put `reference_state()` back, in place.

        Raises:
            CheckpointError: it is the state of another model.
        """
        mine = self.reference_tensors()
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in state.items()}:
            raise CheckpointError(
                f"the saved reference ({len(state)} tensors) is not of this model ({len(mine)} trained tensors); "
                "is model.adapter the same as when it was saved?"
            )
        for name, tensor in mine.items():
            tensor.data.copy_(shard_like(state[name], tensor))

    def reference_tensors(self) -> dict[str, Tensor]:
        """Name → tensor of a copied reference, in place: this rank's share where the weights are split."""
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
        """Name → tensor of everything that training changes, on the CPU. Of split weights all ranks must ask."""
        return {n: whole_tensor(p.detach()).cpu() for n, p in self.model.named_parameters() if p.requires_grad}

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
            parameter.data.copy_(shard_like(state[name], parameter))

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write an adapter, or the whole model, with the tokenizer: a folder that `load_policy` opens.

        `weights`: all of them, where the model holds a part.
        """
        # Adapters never train embeddings, and a new MASK gets the same row whenever its base is opened.
        chosen: dict[str, Any] = {"save_embedding_layers": False} if self.has_adapter else {}
        if weights is not None:
            chosen["state_dict"] = weights
        self.model.save_pretrained(folder, **chosen)  # type: ignore[operator]
        self.tokenizer.save_pretrained(folder)
        if self.has_adapter:
            # The base's own files may not say how it was opened.
            (folder / DIFFUSION_FILE).write_text(json.dumps(self._how_opened()) + "\n")

    def _how_opened(self) -> dict[str, Any]:
        stated = getattr(self.config, "diffusion", None) or {}
        return {
            "family": self.family.name,
            "shift": self.family.shift,
            "block_length": self.family.block_length or 0,
            "mask_token": self.tokenizer.convert_ids_to_tokens(self.mask_id),
            "end_tokens": self.tokenizer.convert_ids_to_tokens(stated.get("end_ids", [])),
        }


def before(rows: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    """The positions one to the left of `rows`. Example: [0, 1, 1, 0] → [1, 1, 0, 0]."""
    return torch.cat((rows[:, 1:], torch.zeros_like(rows[:, :1])), dim=1)


def digest_of(state: dict[str, Tensor]) -> str:
    """Names weights by their contents: equal digests, equal names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which ranks hold shares; all of them must ask. Others are returned as they are."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """This rank's share of a tensor that every rank has whole, split as `like` is; all of it if that is not split."""
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def is_split(tensor: Tensor) -> bool:
    """Whether ranks hold shares of it: a DTensor, whose module costs a third of a second to import."""
    return hasattr(tensor, "device_mesh")


def find_mask_id(tokenizer: Any, config: Any, family: Family) -> int:
    """The mask token: what the tokenizer says, else `config.json`, else the family by name, else by number.

    Raises:
        CheckpointError: none of them does.
    """
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if getattr(config, "mask_token_id", None) is not None:
        return int(config.mask_token_id)
    if family.mask_token is not None and (found := _known_ids(tokenizer, (family.mask_token,))):
        return found[0]
    if family.mask_id is not None:
        return family.mask_id
    raise CheckpointError(
        "a diffusion model needs a mask token: neither tokenizer.mask_token nor config.mask_token_id is set; "
        "set model.mask_token, to a token of the checkpoint that is to be reused or to a new one"
    )


def find_end_ids(tokenizer: Any, config: Any, family: Family) -> tuple[int, ...]:
    """What ends a completion: the tokenizer's end and pad tokens, and those that the family has besides.

    Raises:
        CheckpointError: nothing does.
    """
    stated = (getattr(config, "diffusion", None) or {}).get("end_ids")
    if stated:
        return tuple(sorted(stated))
    ids = {tokenizer.eos_token_id, tokenizer.pad_token_id, *_known_ids(tokenizer, family.end_tokens)} - {None}
    if not ids:
        raise CheckpointError(
            "the tokenizer names no end token (tokenizer.eos_token), so no completion would ever end; set "
            "model.end_tokens to the tokens that end one"
        )
    return tuple(sorted(ids))


def _known_ids(tokenizer: Any, names: tuple[str, ...]) -> list[int]:
    vocabulary = tokenizer.get_vocab() if names else {}
    return [vocabulary[name] for name in names if name in vocabulary]
