"""Log-probabilities and hidden states of a diffusion language model at chosen positions, the same for every family."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from coupled.rl.errors import CheckpointError
from coupled.rl.model.attention import Layout, additive, first_column_of_blocks, left_padded, may_attend, two_streams
from coupled.rl.model.families import Family
from coupled.rl.model.last_layer import is_known, only, read_columns
from coupled.rl.model.packing import line_up, within_runs
from coupled.rl.model.special_tokens import find_end_ids, find_mask_id
from coupled.rl.model.vocabulary import OutputHead, forbid, project, token_logp
from coupled.rl.shapes import Bool, Float, Int


class Policy:
    """A diffusion language model with its tokenizer, and with LoRA adapters if its model is wrapped in them.

    Args:
        model: a transformers causal-LM class whose body is `model.model` and whose head is `model.lm_head`.
        tokenizer: must have a mask token and at least one end token.
        family: logit shift, attention and architecture.
        compute_dtype: float32, or bfloat16 for autocast in the forward pass. Log-softmax is fp32 in either case.

    Raises:
        CheckpointError: no mask token, no end token, or a tokenizer with more tokens than the model embeds.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, family: Family, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.family = family
        self.compute_dtype = compute_dtype
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

    def replaced(
        self, *, model: nn.Module | None = None, family: Family | None = None, mask_id: int | None = None
    ) -> Policy:
        """The same policy with another model, family or mask token. What is not named is shared, not copied."""
        other = copy.copy(self)
        other.model = self.model if model is None else model
        other.family = self.family if family is None else family
        other.mask_id = self.mask_id if mask_id is None else mask_id
        return other

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
    def body(self) -> nn.Module:
        """Embedding and layers, without the head: every forward pass calls this module once."""
        body: nn.Module = self._base.model
        return body

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
        """The states that predict the tokens *at* the positions `rows`, aligned for any logit shift of the family.

        Padding (the first `pad_lengths` positions of a row, or the padding of a `Layout`) is never attended, and
        positions count from the first real token. With block attention, `clean` holds the tokens of earlier blocks, so
        that one forward pass reads every block as decoding meets it (None: `ids` themselves). With full attention
        there are no earlier blocks, and `clean` is ignored.
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
        """`hidden_at` for full attention without gradients: without padding; the last layer is evaluated only at the
        columns that are read. Falls back to `hidden_at` where a layer is of an unknown class."""
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
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with only(layers[-1], columns):
            return self.hidden_after(ids, position, torch.ones_like(ids, dtype=torch.bool)[:, None])[is_there]

    def logits_at(
        self,
        ids: Int[Tensor, "B S"],
        pad_lengths: Int[Tensor, " B"] | Layout,
        rows: Bool[Tensor, "B S"],
        clean: Int[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "N V"]:
        """Raw logits for the tokens at the positions `rows`, at least fp32; arguments as for `hidden_at`.

        Only these positions are projected: [B, S, V] never exists.
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
        """`logp_at` for any number of tokens per position: token m is scored at the `line_m`-th of `rows`.

        `clean` holds the tokens of earlier blocks, as in `hidden_at`.
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
        """Hidden states of `ids` at `positions`. The keys are the cached ones, then the columns' own, which are cached.

        All Q columns are returned, or those that `last_layer.only` selects. `others` are passed to the attention
        function.
        """
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
        """Switch to attention within blocks (None: full), also in the configuration that is saved with the weights."""
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

        One pass reads both streams; the noisy one begins at the first block that `rows` touches. With shift 1 the first
        position of a block is predicted from the last position of the block before it, in the clean stream: the state
        that a decoder has when that block is done.
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


def before(rows: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    """The positions one to the left of `rows`. Example: [0, 1, 1, 0] → [1, 1, 0, 0]."""
    return torch.cat((rows[:, 1:], torch.zeros_like(rows[:, :1])), dim=1)
