"""Rows of several lengths in one line of tokens, without padding.

A layer treats each token by itself except in attention, so that rows may stand one after the other. Attention is within
each row: neighbours of equal length are cut out of the line as a batch, and no mask is needed.

Shapes: R rows, S columns, T real columns of all rows, N read ones, H heads, K of keys and values, E their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from coupled.rl.shapes import Bool, Float, Int

WITHIN_RUNS = "within_runs"
"""Name of `attend_within_runs` in a configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring rows of equal length."""

    num_rows: int
    queries: int
    """Columns of each row that are queries."""
    keys: int
    """Columns of each row that are keys."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """Rows one after the other, the shorter ones first.

    Example: rows of 3 and 2 tokens, of which the last one is read each: `runs` of 1 row of 2 and 1 row of 3, `columns`
    [1, 4], and `back` [1, 0].
    """

    ids: Int[Tensor, "1 T"]
    position: Int[Tensor, "1 T"]
    runs: tuple[Run, ...]
    columns: Int[Tensor, "1 N"]
    """The columns whose states are read."""
    read_runs: tuple[Run, ...]
    """`runs` with only these columns as queries."""
    back: Int[Tensor, " N"]
    """Index in `columns` of each column that is read, row by row."""


def line_up(ids: Int[Tensor, "R S"], pad_lengths: Int[Tensor, " R"], read: Bool[Tensor, "R S"]) -> Line:
    """The line of rows that are padded on the left, and the columns to read."""
    width = ids.shape[1]
    sizes = [(width - pad, count) for pad, count in zip(pad_lengths.tolist(), read.sum(-1).tolist(), strict=True)]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    place = torch.arange(width, device=ids.device)[None, :] - pad_lengths[order][:, None]
    is_real = place >= 0
    in_order = read[order]
    number = torch.zeros_like(ids)
    number[order] = (in_order.flatten().cumsum(0) - 1).reshape(ids.shape)
    return Line(
        ids=ids[order][is_real][None],
        position=place[is_real][None],
        runs=_runs([(keys, keys) for keys, _ in sorted(sizes)]),
        columns=in_order[is_real].nonzero()[:, 0][None],
        read_runs=_runs([(queries, keys) for keys, queries in sorted(sizes)]),
        back=number[read],
    )


@contextmanager
def within_runs(config: Any) -> Iterator[None]:
    """Let layers of this configuration attend within the runs of each pass, for the duration of the block."""
    # The import loads all of transformers' modelling; a program with a model has loaded it already.
    from transformers import AttentionInterface

    AttentionInterface.register(WITHIN_RUNS, attend_within_runs)
    usual = config._attn_implementation
    config._attn_implementation = WITHIN_RUNS
    try:
        yield
    finally:
        config._attn_implementation = usual


def attend_within_runs(
    _: nn.Module,
    query: Float[Tensor, "1 H N E"],
    key: Float[Tensor, "1 K T E"],
    value: Float[Tensor, "1 K T E"],
    __: Tensor | None,
    *,
    runs: tuple[Run, ...],
    scaling: float,
    **___: Any,
) -> tuple[Float[Tensor, "1 N H E"], None]:
    """Attention of every row to itself, as an attention function of transformers."""
    parts, at_query, at_key = [], 0, 0
    for run in runs:
        num_queries, num_keys = run.num_rows * run.queries, run.num_rows * run.keys
        if num_queries:
            q, k, v = (
                states[0, :, at : at + num].unflatten(1, (run.num_rows, -1)).transpose(0, 1)
                for states, at, num in (
                    (query, at_query, num_queries),
                    (key, at_key, num_keys),
                    (value, at_key, num_keys),
                )
            )
            found = nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True)
            parts.append(found.transpose(1, 2).flatten(0, 1))
        at_query, at_key = at_query + num_queries, at_key + num_keys
    return torch.cat(parts)[None], None


def _runs(sizes: list[tuple[int, int]]) -> tuple[Run, ...]:
    """Runs of neighbours with equal numbers of queries and keys."""
    return tuple(Run(num_rows=len(list(same)), queries=size[0], keys=size[1]) for size, same in groupby(sizes))
