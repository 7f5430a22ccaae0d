"""Positions and masks: literal tables, and that padding and packing change no row's logits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.toys import FIRST_LETTER, NUM_TOKENS, MakePolicy, plain_logits
from torch import Tensor

from coupled.rl.model.attention import (
    Layout,
    additive,
    first_column_of_blocks,
    left_padded,
    may_attend,
    packed,
    two_streams,
)
from coupled.rl.model.policy import Policy

LENGTHS = (3, 8, 1, 6)
KINDS = {
    "full": {"shift": 0},
    "full, shifted": {"shift": 1},
    "blocks of 1": {"shift": 0, "block_length": 1},
    "blocks of 3": {"shift": 0, "block_length": 3},
    "blocks of 4": {"shift": 0, "block_length": 4},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def table(allowed: Tensor) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in allowed.tolist()]


# --- tables -------------------------------------------------------------------------------------------------------


def test_layouts_count_from_the_first_real_token() -> None:
    left = left_padded(torch.tensor([2, 0]), 4)
    assert left.position.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert left.sequence.tolist() == [[-1, -1, 0, 0], [0, 0, 0, 0]]
    right = packed(((1,), (3,)))
    assert right.position.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert right.sequence.tolist() == [[0, -1, -1], [0, 0, 0]]
    together = packed(((3, 2), (1,)))
    assert together.position.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert together.sequence.tolist() == [[0, 0, 0, 1, 1], [0, -1, -1, -1, -1]]


def test_who_attends_to_whom() -> None:
    row = left_padded(torch.tensor([1]), 6)
    assert may_attend(row, row).tolist() == [[[False, True, True, True, True, True]]]
    assert table(may_attend(row, row, block_length=2)[0])[1:] == [".xx...", ".xx...", ".xxxx.", ".xxxx.", ".xxxxx"]
    assert table(may_attend(row, row, block_length=1)[0])[1:] == [".x....", ".xx...", ".xxx..", ".xxxx.", ".xxxxx"]
    two = packed(((3, 2),))
    assert table(may_attend(two, two)[0]) == ["xxx..", "xxx..", "xxx..", "...xx", "...xx"]
    assert table(may_attend(two, two, block_length=2)[0]) == ["xx...", "xx...", "xxx..", "...xx", "...xx"]


def test_the_noisy_stream_reads_its_own_block_and_earlier_clean_ones() -> None:
    row = left_padded(torch.tensor([0]), 4)
    assert table(two_streams(row, row, 2)[0]) == [
        "xx......",
        "xx......",
        "..xxxx..",
        "..xxxx..",
        "....xx..",
        "....xx..",
        "....xxxx",
        "....xxxx",
    ]


def test_what_is_forbidden_gets_the_lowest_number() -> None:
    mask = additive(torch.tensor([[[True, False]]]), torch.bfloat16)
    assert mask.tolist() == [[[[0.0, torch.finfo(torch.bfloat16).min]]]]


@pytest.mark.parametrize(
    ("pads", "asked", "expected"),
    [([0], [6], 4), ([0], [4, 7], 4), ([0], [3, 7], 0), ([1], [6], 5), ([3], [3], 3), ([0, 1], [7], 4), ([0], [], 0)],
)
def test_the_first_column_of_the_blocks_that_are_asked_for(pads: list[int], asked: list[int], expected: int) -> None:
    rows = torch.zeros((len(pads), 8), dtype=torch.bool)
    rows[:, asked] = True
    assert first_column_of_blocks(left_padded(torch.tensor(pads), 8), rows, 4) == expected


# --- one row, a batch, padded on either side, packed ----------------------------------------------------------------


def sequences(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    stream = torch.Generator().manual_seed(0)
    return [torch.randint(FIRST_LETTER, NUM_TOKENS, (n,), generator=stream) for n in lengths]


def in_rows(parts: list[list[Tensor]], layout: Layout, filler: int) -> Tensor:
    """The sequences of each row, one after the other, at the real columns of the layout."""
    ids = torch.full(layout.position.shape, filler)
    for row, of_row in enumerate(parts):
        ids[row, layout.is_real[row]] = torch.cat(of_row)
    return ids


def logits_of(policy: Policy, ids: Tensor, layout: Layout) -> Tensor:
    """At all real positions but the first of each sequence, which a shifted family has no source for."""
    rows = layout.is_real & (layout.position > 0)
    return policy.without_mask_token(policy.logits_at(ids, layout, rows))


@every_kind
@torch.no_grad()
def test_single_batched_padded_and_packed_rows_have_the_same_logits(tiny_policy: MakePolicy, kind: str) -> None:
    policy, parts = tiny_policy(**KINDS[kind]), sequences()
    expected = torch.cat([plain_logits(policy, part.tolist())[1:] for part in parts])
    lengths, width = torch.tensor(LENGTHS), max(LENGTHS)
    layouts = {
        "left": left_padded(width - lengths, width),
        "right": packed(tuple((length,) for length in LENGTHS)),
        "left, more": left_padded(width + 3 - lengths, width + 3),
    }
    for name, layout in layouts.items():
        for filler in (0, 17):
            found = logits_of(policy, in_rows([[p] for p in parts], layout, filler), layout)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    whole = packed((LENGTHS,))
    torch.testing.assert_close(logits_of(policy, in_rows([parts], whole, 0), whole), expected, atol=1e-5, rtol=1e-5)
    halves = packed((LENGTHS[:2], LENGTHS[2:]))
    ids = in_rows([parts[:2], parts[2:]], halves, 0)
    torch.testing.assert_close(logits_of(policy, ids, halves), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_causal_rows_have_the_same_logits_packed_and_padded(tiny_policy: MakePolicy) -> None:
    policy, parts = tiny_policy(), sequences()
    policy.attend(1)
    width = max(LENGTHS)
    left, whole = left_padded(width - torch.tensor(LENGTHS), width), packed((LENGTHS,))
    one = logits_of(policy, in_rows([[p] for p in parts], left, 9), left)
    other = logits_of(policy, in_rows([parts], whole, 0), whole)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 5, 16])
@torch.no_grad()
def test_two_streams_equal_a_forward_pass_per_block_after_a_clean_prefix(
    tiny_policy: MakePolicy, block_length: int, shift: int
) -> None:
    """Prompts of 0 to 2 B tokens would be masked just so; here any positions are."""
    policy, parts = tiny_policy(shift=shift, block_length=block_length), sequences((5, 9, 2, 12))
    stream = torch.Generator().manual_seed(1)
    noisy = [torch.where(torch.rand(p.shape, generator=stream) < 0.5, policy.mask_id, p) for p in parts]
    for n, p in zip(noisy, parts, strict=True):
        n[:shift] = p[:shift]  # with a shift the first token has no source
    expected = [plain_logits(policy, n.tolist(), p.tolist()) for n, p in zip(noisy, parts, strict=True)]
    width = 12
    for layout, hold in (
        (left_padded(width - torch.tensor([5, 9, 2, 12]), width), [[p] for p in parts]),
        (packed(((5, 9, 2, 12),)), [parts]),
    ):
        is_packed = len(hold) == 1
        ids = in_rows([noisy] if is_packed else [[n] for n in noisy], layout, 0)
        clean = in_rows(hold, layout, 0)
        rows = layout.is_real & (ids == policy.mask_id)
        assert rows.any()
        found = policy.without_mask_token(policy.logits_at(ids, layout, rows, clean))
        wanted = torch.cat([e[n == policy.mask_id] for e, n in zip(expected, noisy, strict=True)])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        last = rows & (layout.position >= layout.position.max() // block_length * block_length)
        if last.any():
            assert torch.allclose(
                policy.logits_at(ids, layout, last, clean), policy.logits_at(ids, layout, rows, clean)[last[rows]],
                atol=1e-5,
            )  # fmt: skip


@pytest.mark.parametrize("block_length", [1, 2, 3, 4, 32])
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_two_streams_are_what_the_words_say(block_length: int, pad: int) -> None:
    """For every pair of places in [noisy ; clean] of real tokens."""
    size = 9
    layout = left_padded(torch.tensor([pad]), size)
    allowed = two_streams(layout, layout, block_length)[0]
    for query in range(2 * size):
        for key in range(2 * size):
            (q_clean, q), (k_clean, k) = divmod(query, size), divmod(key, size)
            if q < pad:
                continue  # what padding reads is of no account
            q_block, k_block = (q - pad) // block_length, (k - pad) // block_length
            if q_clean:
                expected = bool(k_clean) and k_block <= q_block
            else:
                expected = k_block < q_block if k_clean else k_block == q_block
            assert bool(allowed[query, key]) == (expected and k >= pad)


def test_two_streams_of_packed_sequences_are_those_of_each_alone() -> None:
    layout = packed(((3, 2),))
    allowed = two_streams(layout, layout, 2)[0].view(2, 5, 2, 5)
    for places in (torch.arange(3), torch.arange(3, 5)):
        own = left_padded(torch.tensor([0]), len(places))
        alone = two_streams(own, own, 2)[0].view(2, len(places), 2, len(places))
        assert torch.equal(allowed[:, places][:, :, :, places], alone)
        others = torch.tensor([i for i in range(5) if i not in places])
        assert not allowed[:, places][:, :, :, others].any()
