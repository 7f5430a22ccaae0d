"""Which positions see which in a model that writes block by block [BD3-LM; Stable-DiffCoder §3.3].

Positions count from the first real token and are cut into blocks of `block_length` on that absolute grid: position p
lies in block p // block_length, wherever the prompt ends. Padding has position -1, hence block -1. Masks are true
where a query (row) sees a key (column); every query sees at least itself, so that no softmax is empty.

Shapes: B rows, S positions, N positions of the noisy stream (all S, or those that are scored).
"""

from __future__ import annotations

import torch
from torch import Tensor

from coupled.rl.shapes import Bool, Int

PADDING = -1
"""Block, and document, of a position that holds no token."""


def blocks_of(positions: Int[Tensor, "B S"], block_length: int) -> Int[Tensor, "B S"]:
    """The block of each position. Example: positions [-1, 0, 1, 2, 3, 4] in blocks of 2 → [-1, 0, 0, 1, 1, 2]."""
    return positions.div(block_length, rounding_mode="floor")


def block_causal_mask(blocks: Int[Tensor, "B S"], documents: Int[Tensor, "B S"] | None = None) -> Bool[Tensor, "B S S"]:
    """A position sees its own block, both ways, and all earlier blocks. Blocks of one position: causal attention.

    Example for blocks [0, 0, 1]: [[1, 1, 0], [1, 1, 0], [1, 1, 1]].

    Args:
        documents: of rows that hold several, packed: which one each position is of. None of them sees another.
    """
    seen = blocks[:, None, :] <= blocks[:, :, None]
    return _of_tokens(seen, blocks, blocks, documents, documents) | _itself(blocks)


def two_stream_mask(
    noisy: Int[Tensor, "B N"],
    clean: Int[Tensor, "B S"],
    noisy_documents: Int[Tensor, "B N"] | None = None,
    clean_documents: Int[Tensor, "B S"] | None = None,
) -> Bool[Tensor, "B N+S N+S"]:
    """The mask of one forward pass over `[noisy ; clean]` that denoises every block as if it were the only one.

    A noisy position sees its own block in the noisy stream and all earlier blocks in the clean one: what the sampler
    shows it while it denoises that block. The clean stream is block-causal and never sees noise, so it is what a cache
    of finished blocks would hold. Both streams number positions alike.

    Example for one block of one position after another: noisy [1], clean [0, 1] → [[1, 1, 0], [0, 1, 0], [0, 1, 1]].

    Args:
        noisy: blocks of the noisy stream.
        clean: blocks of the clean stream.
        noisy_documents: as in `block_causal_mask`.
        clean_documents: likewise.
    """
    own = noisy[:, None, :] == noisy[:, :, None]
    own = _of_tokens(own, noisy, noisy, noisy_documents, noisy_documents) | _itself(noisy)
    earlier = clean[:, None, :] < noisy[:, :, None]
    earlier = _of_tokens(earlier, noisy, clean, noisy_documents, clean_documents)
    never = torch.zeros_like(earlier).transpose(1, 2)
    finished = block_causal_mask(clean, clean_documents)
    return torch.cat((torch.cat((own, earlier), dim=2), torch.cat((never, finished), dim=2)), dim=1)


def _of_tokens(
    seen: Bool[Tensor, "B Q K"],
    queries: Int[Tensor, "B Q"],
    keys: Int[Tensor, "B K"],
    query_documents: Int[Tensor, "B Q"] | None,
    key_documents: Int[Tensor, "B K"] | None,
) -> Bool[Tensor, "B Q K"]:
    """`seen` without padding and, where there are documents, without those of others."""
    if (query_documents is None) != (key_documents is None):
        raise ValueError("documents must be given for both streams or for neither")
    seen = seen & (queries != PADDING)[:, :, None] & (keys != PADDING)[:, None, :]
    if query_documents is None or key_documents is None:
        return seen
    return seen & (query_documents[:, :, None] == key_documents[:, None, :])


def _itself(blocks: Int[Tensor, "B S"]) -> Bool[Tensor, "1 S S"]:
    return torch.eye(blocks.shape[1], dtype=torch.bool, device=blocks.device)[None]
