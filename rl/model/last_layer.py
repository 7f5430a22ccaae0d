"""The last layer of a body, evaluated only at the columns whose states are read.

Every column reads the keys and values of all others. Its query, its attention output, its feed-forward part and the
last norm concern that column alone, and no layer follows: for columns that no token is predicted from, the last layer
needs only keys and values. The layer's own forward pass runs on the columns that are read; the keys and values of all
columns are passed to it in place of a cache.

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
"""Attention classes whose keys are a projection rotated by position → whether the keys are normed. Layers with another
class run whole, as do layers of a checkpoint's own code, even under these names."""


def is_known(layer: nn.Module) -> bool:
    """True if the layer's way to make keys and values is known."""
    return _name(getattr(layer, "self_attn", None)) in HAS_KEY_NORM


def _name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def read_columns(rows: Bool[Tensor, "R S"]) -> tuple[Int[Tensor, "R M"], Bool[Tensor, "R M"]]:
    """The columns that are read of each row, padded to the same number, and a mask that is False at the padding.

    Example: rows [0 1 1] and [1 0 0] → [1 2] and [0 1], of which the last entry is padding.
    """
    counts = rows.sum(-1)
    columns = rows.byte().sort(dim=-1, descending=True, stable=True).indices[:, : int(counts.max())]
    return columns, torch.arange(columns.shape[1], device=rows.device) < counts[:, None]


@contextmanager
def only(layer: Any, columns: Int[Tensor, "R M"], **others: Any) -> Iterator[None]:
    """Let the layer return the states of these columns of each row, [R, M, D], for the duration of the block.

    `others` replace keyword arguments of the attention function.
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
    """Stands for the cache of an attention: returns these keys and values in place of the attention's own."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._both = keys, values

    def update(self, *_: Any) -> tuple[Tensor, Tensor]:
        return self._both


def _keys_and_values(
    layer: Any, hidden: Float[Tensor, "R S D"], turns: tuple[Tensor, Tensor]
) -> tuple[Float[Tensor, "R K S E"], Float[Tensor, "R K S E"]]:
    """Keys and values of all columns, as the layer's attention makes them."""
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
