"""Positions and attention masks of batched sequences, for any padding.

A `Layout` has the sequence that every column belongs to, and the column's position in it. Rows may be padded on either
side, or hold several sequences one after the other. The masks follow from it:

    full attention      a token attends to all tokens of its own sequence
    block attention     to its own block of B positions and to all earlier blocks of its sequence; blocks are counted
                        from the first token
    causal attention    blocks of one position: to itself and all earlier tokens

Shapes: B rows, S columns, Q query columns, K key columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coupled.rl.shapes import Bool, Float, Int

PADDING = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Sequence and position of every token. Example: two sequences of 3 and 2 tokens packed into a row of 6 have
    `sequence` [0, 0, 0, 1, 1, -1] and `position` [0, 1, 2, 0, 1, 0]."""

    sequence: Int[Tensor, "B S"]
    """Number of the sequence in its row; -1 is padding."""
    position: Int[Tensor, "B S"]
    """Position in the sequence, counted from its first token; 0 in padding."""

    @property
    def is_real(self) -> Bool[Tensor, "B S"]:
        return self.sequence != PADDING

    def rows(self, chosen: slice) -> Layout:
        """The same record for some of its rows."""
        return Layout(sequence=self.sequence[chosen], position=self.position[chosen])

    def to(self, device: torch.device) -> Layout:
        """The same record on another device."""
        return Layout(sequence=self.sequence.to(device), position=self.position.to(device))

    def columns(self, chosen: slice) -> Layout:
        """The same record for some of its columns."""
        return Layout(sequence=self.sequence[:, chosen], position=self.position[:, chosen])


def left_padded(pad_lengths: Int[Tensor, " B"], length: int) -> Layout:
    """One sequence a row, after `pad_lengths` columns of padding."""
    position = torch.arange(length, device=pad_lengths.device)[None, :] - pad_lengths[:, None]
    return Layout(sequence=torch.where(position >= 0, 0, PADDING), position=position.clamp(min=0))


def packed(lengths: tuple[tuple[int, ...], ...]) -> Layout:
    """Several sequences per row without gaps, on the CPU; `lengths` holds the lengths of each row's sequences."""
    width = max(sum(row) for row in lengths)
    sequence = torch.full((len(lengths), width), PADDING)
    position = torch.zeros((len(lengths), width), dtype=torch.int64)
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes):
            sequence[row, start : start + size] = number
            position[row, start : start + size] = torch.arange(size)
            start += size
    return Layout(sequence=sequence, position=position)


def may_attend(query: Layout, key: Layout, *, block_length: int | None = None) -> Bool[Tensor, "B Q K"]:
    """Keys that each query reads. Padding is never read; the reads of padding itself are unspecified."""
    allowed = key.is_real[:, None, :]
    if bool((key.sequence > 0).any()):  # packed
        allowed = allowed & (query.sequence[:, :, None] == key.sequence[:, None, :])
    if block_length is not None:
        own, other = query.position // block_length, key.position // block_length
        return allowed & (own[:, :, None] >= other[:, None, :])
    # All queries of a row read the same keys: a query dimension of size 1 is broadcast.
    return allowed


def two_streams(noisy: Layout, clean: Layout, block_length: int) -> Bool[Tensor, "B Q K"]:
    """Attention over `[noisy ; clean]`: every block as the sampler met it, in one forward pass [BD3-LM].

    The clean stream holds the finished sequence, the noisy one has masked positions. A noisy token reads its own block
    in the noisy stream and all earlier blocks in the clean one, as it does while the block is being denoised with the
    earlier blocks in the cache. The clean stream does not read the noisy one.
    """
    own, other = noisy.position // block_length, clean.position // block_length
    same_sequence = noisy.sequence[:, :, None] == clean.sequence[:, None, :]
    to_noisy = (
        (noisy.sequence[:, :, None] == noisy.sequence[:, None, :])
        & noisy.is_real[:, None, :]
        & (own[:, :, None] == own[:, None, :])
    )
    to_clean = same_sequence & clean.is_real[:, None, :] & (own[:, :, None] > other[:, None, :])
    clean_to_clean = may_attend(clean, clean, block_length=block_length)
    nothing = torch.zeros_like(to_clean).transpose(1, 2)
    return torch.cat((torch.cat((to_noisy, to_clean), dim=2), torch.cat((nothing, clean_to_clean), dim=2)), dim=1)


def additive(allowed: Bool[Tensor, "B Q K"], dtype: torch.dtype) -> Float[Tensor, "B 1 Q K"]:
    """0 where attention is allowed, the lowest number elsewhere.

    Explicit and additive: without a mask some classes of transformers fall back to causal attention, and eager
    attention silently adds a boolean mask as 0/1.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def first_column_of_blocks(layout: Layout, rows: Bool[Tensor, "B S"], block_length: int) -> int:
    """The first column of any block with a token in `rows`, over the whole batch; 0 if there is none.

    Example: blocks of 4, no padding, the first of `rows` at position 6 → 4.
    """
    starts = torch.arange(rows.shape[1], device=rows.device) - layout.position % block_length
    starts = torch.where(rows, starts, rows.shape[1])
    first = int(starts.min()) if bool(rows.any()) else 0
    return max(0, first)
