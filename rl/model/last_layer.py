"""The last layer of a body, for those columns alone whose states are read.

Every column reads the keys and values of all others. Its query, what attention gives it, its feed-forward part and the
last norm are its own, and nothing comes after them: of the last layer only keys and values are wanted of the columns
that nobody predicts from. The layer's own forward pass runs on the others; the keys and values of all columns are
handed to it as what it takes for a cache.

Shapes: R rows, S columns, M columns of a row that are read, D hidden size, H heads, K of keys and values, E their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coupled.rl.shapes import Bool, Float, Int

HAS_KEY_NORM = {
    "transformers.models.llama.modeling_llama.LlamaAttention": False,
    "transformers.models.qwen2.modeling_qwen2.Qwen2Attention": False,
    "transformers.models.qwen3.modeling_qwen3.Qwen3Attention": True,
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention": True,
}
"""Attention whose keys are a projection, normed or not, and turned by position. Layers with another one run whole; so
does one of these names in the code of a checkpoint."""


def is_known(layer: nn.Module) -> bool:
    """Whether it is known how the layer makes keys and values."""
    return _name(getattr(layer, "self_attn", None)) in HAS_KEY_NORM


def _name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def read_columns(rows: Bool[Tensor, "R S"]) -> tuple[Int[Tensor, "R M"], Bool[Tensor, "R M"]]:
    """The columns that are read of each row, as many as of the row with most, and which of them are no filling.

    Example: rows [0 1 1] and [1 0 0] → [1 2] and [0 1], of which the last one is filling.
    """
    counts = rows.sum(-1)
    columns = rows.byte().sort(dim=-1, descending=True, stable=True).indices[:, : int(counts.max())]
    return columns, torch.arange(columns.shape[1], device=rows.device) < counts[:, None]


@contextmanager
def only(layer: Any, columns: Int[Tensor, "R M"], **others: Any) -> Iterator[None]:
    """While it is open, the layer gives the states of these columns of each row, [R, M, D].

    `others` take the place of what is handed to the attention function.
    """

    def select(
        _: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        (hidden,) = arguments
        mask = keywords["attention_mask"]
        turns = keywords["position_embeddings"]
        return (_take(hidden, columns),), keywords | others | {
            "past_key_values": _OfAllColumns(*_keys_and_values(layer, hidden, turns)),
            "attention_mask": mask if mask.shape[2] == 1 else _take(mask[:, 0], columns)[:, None],
            "position_embeddings": tuple(_take(turn.expand(len(hidden), -1, -1), columns) for turn in turns),
            "position_ids": keywords["position_ids"].expand(len(hidden), -1).gather(1, columns),
        }

    handle = layer.register_forward_pre_hook(select, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _OfAllColumns:
    """What an attention takes for its cache: instead of its own keys and values it gets these."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._both = keys, values

    def update(self, *_: Any) -> tuple[Tensor, Tensor]:
        return self._both


def _keys_and_values(
    layer: Any, hidden: Float[Tensor, "R S D"], turns: tuple[Tensor, Tensor]
) -> tuple[Float[Tensor, "R K S E"], Float[Tensor, "R K S E"]]:
    """Of all columns, as the layer's attention makes them."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    by_head = (*hidden.shape[:2], -1, attention.head_dim)
    keys = attention.k_proj(normed).view(by_head)
    if HAS_KEY_NORM[_name(attention)]:
        keys = attention.k_norm(keys)
    keys = keys.transpose(1, 2)
    cos, sin = (turn[:, None] for turn in turns)
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat((-second, first), dim=-1) * sin, attention.v_proj(normed).view(by_head).transpose(
        1, 2
    )


def _take(states: Float[Tensor, "R S D"], columns: Int[Tensor, "R M"]) -> Float[Tensor, "R M D"]:
    return states.gather(1, columns[:, :, None].expand(-1, -1, states.shape[-1]))
