from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coupled.rl.block_mask import PADDING, block_causal_mask, blocks_of, two_stream_mask


def rows(mask: Tensor) -> list[str]:
    """The mask of the first row as text: one line a query."""
    return ["".join("x" if seen else "." for seen in line) for line in mask[0].tolist()]


def test_positions_lie_on_an_absolute_grid_and_padding_on_none() -> None:
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    assert blocks_of(positions, 1).tolist() == positions.tolist()
    assert blocks_of(positions, 2).tolist() == [[-1, -1, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2, 3]]
    assert blocks_of(positions, 4).tolist() == [[-1, -1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1]]


def test_a_position_sees_its_block_and_all_earlier_ones() -> None:
    assert rows(block_causal_mask(torch.tensor([[0, 0, 1, 1, 2]]))) == ["xx...", "xx...", "xxxx.", "xxxx.", "xxxxx"]


def test_blocks_of_one_are_causal_attention_and_one_block_is_full_attention() -> None:
    positions = torch.arange(6)[None]
    assert torch.equal(block_causal_mask(blocks_of(positions, 1))[0], torch.ones(6, 6).tril().bool())
    assert block_causal_mask(blocks_of(positions, 6)).all()


def test_padding_is_seen_by_itself_alone() -> None:
    assert rows(block_causal_mask(torch.tensor([[-1, -1, 0, 0, 1]]))) == ["x....", ".x...", "..xx.", "..xx.", "..xxx"]


def test_packed_documents_do_not_see_each_other() -> None:
    blocks, documents = torch.tensor([[0, 0, 1, 0, 0, -1]]), torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert rows(block_causal_mask(blocks, documents)) == ["xx....", "xx....", "xxx...", "...xx.", "...xx.", ".....x"]


def test_the_noisy_stream_sees_its_own_block_and_the_clean_blocks_before_it() -> None:
    """Blocks of 2 over four positions: noisy 0 1 2 3, then clean 0 1 2 3."""
    blocks = torch.tensor([[0, 0, 1, 1]])
    assert rows(two_stream_mask(blocks, blocks)) == [
        "xx......",
        "xx......",
        "..xxxx..",
        "..xxxx..",
        "....xx..",
        "....xx..",
        "....xxxx",
        "....xxxx",
    ]


def test_the_noisy_stream_may_hold_the_scored_positions_alone() -> None:
    """Block 0 is a prompt block; the canvas begins at position 2, in the middle of nothing."""
    assert rows(two_stream_mask(torch.tensor([[1, 1, 2]]), torch.tensor([[0, 0, 1, 1, 2]]))) == [
        "xx.xx...",
        "xx.xx...",
        "..xxxxx.",
        "...xx...",
        "...xx...",
        "...xxxx.",
        "...xxxx.",
        "...xxxxx",
    ]


def test_two_streams_of_packed_documents_are_those_of_each_document_alone() -> None:
    blocks, documents = torch.tensor([[-1, 0, 0, 1, 0, 0]]), torch.tensor([[-1, 0, 0, 0, 1, 1]])
    mask = two_stream_mask(blocks, blocks, documents, documents)[0].view(2, 6, 2, 6)
    for document in (0, 1):
        own = torch.nonzero(documents[0] == document)[:, 0]
        alone = two_stream_mask(blocks[:, own], blocks[:, own])[0].view(2, len(own), 2, len(own))
        assert torch.equal(mask[:, own][:, :, :, own], alone)
        others = torch.nonzero(documents[0] != document)[:, 0]
        assert not mask[:, own][:, :, :, others].any()


@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 32])
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_the_masks_are_what_the_words_say(block_length: int, pad: int) -> None:
    """Position by position, for every pair of places in [noisy ; clean]."""
    size = 9
    positions = torch.tensor([[*[PADDING] * pad, *range(size - pad)]])
    blocks = blocks_of(positions, block_length)
    mask = two_stream_mask(blocks, blocks)
    for query in range(2 * size):
        for key in range(2 * size):
            (q_clean, q), (k_clean, k) = divmod(query, size), divmod(key, size)
            q_block, k_block = int(blocks[0, q]), int(blocks[0, k])
            is_real = q_block != PADDING and k_block != PADDING
            if q_clean:
                expected = bool(k_clean) and k_block <= q_block
            else:
                expected = k_block < q_block if k_clean else k_block == q_block
            assert bool(mask[0, query, key]) == ((expected and is_real) or query == key)
    assert torch.equal(mask[:, size:, size:], block_causal_mask(blocks))


def test_every_query_sees_something() -> None:
    blocks = torch.tensor([[-1, -1, 0, 1], [-1, -1, -1, -1]])
    assert two_stream_mask(blocks, blocks).any(-1).all()


def test_documents_of_one_stream_alone_are_refused() -> None:
    blocks = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="for both streams or for neither"):
        two_stream_mask(blocks, blocks, blocks)
