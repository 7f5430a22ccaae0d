"""Rows of a likelihood-training step: samples that share a row, as tensors.

Shapes: B rows, S positions of a row, C trailing ones that may carry loss (the canvas, or all of a packed row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coupled.rl.keys import generator
from coupled.rl.likelihood.samples import Cursor, Example, Source
from coupled.rl.model.attention import Layout, left_padded, packed
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.likelihood import Fit
from coupled.rl.shapes import Bool, Int

PackedRow = tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LikelihoodBatch:
    """Rows of token ids. A row holds one sample with its prompt on the left, or several samples, packed."""

    ids: Int[Tensor, "B S"]
    layout: Layout
    """The sample that each position of a row belongs to, and its place in the sample."""
    carries_loss: Bool[Tensor, "B C"]
    """The positions, among the last C, that are learned, and therefore masked where the objective masks."""

    def rows(self, index: slice) -> LikelihoodBatch:
        return LikelihoodBatch(
            ids=self.ids[index],
            layout=self.layout.rows(index),
            carries_loss=self.carries_loss[index],
        )


class RowMaker:
    """Makes rows from the samples of a source. `cursor` is the place in the source after the finished rows."""

    def __init__(self, source: Source, fit: Fit, seed: int, end_id: int, cursor: Cursor) -> None:
        self._fit = fit
        self._seed = seed
        self._end_id = end_id
        self._samples = source.read(cursor)
        self._next: tuple[Example, Cursor, Cursor] | None = None
        self.cursor = cursor

    def rows_of_step(self, step: int) -> list[PackedRow]:
        """The rows of step `step` (from 0). No sample is skipped or repeated within an epoch."""
        first = step * self._fit.batch_size
        return [self._row(first + i) for i in range(self._fit.batch_size)]

    def _row(self, number: int) -> PackedRow:
        if not self._fit.context:
            example, before, after = self._peek()
            self._take(after)
            return (self._with_ends(example, before, self._fit.canvas - len(example.response_ids)),)
        row: list[Example] = []
        space = self._length(number)
        while space > 0:
            example, before, after = self._peek()
            if not example.prompt_ids:  # plain text is cut where the row ends, and continues in the next row
                piece = example.response_ids[before.offset : before.offset + space]
                row.append(Example(prompt_ids=(), response_ids=piece))
                space -= len(piece)
                reached = before.offset + len(piece)
                is_done = reached == len(example.response_ids)
                self._take(after) if is_done else self._keep(example, replace(before, offset=reached), after)
                continue
            if len(example) > space and row:
                break
            # A short row still takes one whole sample, which might fit into no other row than a full one.
            full = self._with_ends(example, before, max(space, self._fit.context * (not row)) - len(example))
            row.append(full)
            space -= len(full)
            self._take(after)
        return tuple(row)

    def _length(self, number: int) -> int:
        """Positions of a packed row: all of `context`, or, for a share of the rows, a random part of it [LLaDA]."""
        context, share = self._fit.context, self._fit.random_length
        if not share:
            return context
        draws = generator(self._seed, "fit-length", number)
        return int(draws.integers(1, context + 1)) if draws.random() < share else context

    def _with_ends(self, example: Example, at: Cursor, space: int) -> Example:
        """The sample with as many end tokens as are drawn for it in this epoch and fit [Stable-DiffCoder §4.1].

        From them a block model learns to fill the block in which a response ends.
        """
        low, high = self._fit.end_tokens
        if high == 1:
            return example
        wanted = int(generator(self._seed, "fit-ends", at.epoch, at.row).integers(low, high + 1))
        more = (self._end_id,) * min(wanted - 1, space)
        return replace(example, response_ids=(*example.response_ids, *more))

    def _peek(self) -> tuple[Example, Cursor, Cursor]:
        if self._next is None:
            self._next = next(self._samples)
        return self._next

    def _take(self, after: Cursor) -> None:
        self._next, self.cursor = None, after

    def _keep(self, example: Example, before: Cursor, after: Cursor) -> None:
        self._next, self.cursor = (example, before, after), before


def collate(rows: Sequence[PackedRow], policy: Policy, fit: Fit) -> LikelihoodBatch:
    """Token ids of rows, in the layout of the objective."""
    needs_first = fit.objective == "autoregressive" or policy.family.shift == 1
    if fit.context or fit.objective == "block_diffusion":
        batch = _packed(rows, policy.pad_id, needs_first)
    else:
        batch = _one_sample_each([row[0] for row in rows], policy.pad_id, fit)
    return LikelihoodBatch(
        ids=batch.ids.to(policy.device),
        layout=batch.layout.to(policy.device),
        carries_loss=batch.carries_loss.to(policy.device),
    )


def _one_sample_each(examples: Sequence[Example], pad_id: int, fit: Fit) -> LikelihoodBatch:
    """Prompts end where the canvas begins; responses are filled with pad tokens, which diffusion also learns.

    The sampler starts from a canvas of fixed length, so the positions after the end token must be learned. Next-token
    prediction needs no positions beyond the longest response.
    """
    is_filled = fit.objective != "autoregressive"
    canvas = fit.canvas if is_filled else max(len(e.response_ids) for e in examples)
    width = max(len(e.prompt_ids) for e in examples)
    ids = torch.full((len(examples), width + canvas), pad_id)
    carries_loss = torch.full((len(examples), canvas), is_filled)
    for row, example in enumerate(examples):
        first = width - len(example.prompt_ids)
        ids[row, first : first + len(example)] = torch.tensor((*example.prompt_ids, *example.response_ids))
        carries_loss[row, : len(example.response_ids)] = True
    pads = torch.tensor([width - len(example.prompt_ids) for example in examples])
    return LikelihoodBatch(ids=ids, layout=left_padded(pads, ids.shape[1]), carries_loss=carries_loss)


def _packed(rows: Sequence[PackedRow], pad_id: int, is_first_given: bool) -> LikelihoodBatch:
    """Samples one after another, padding on the right. Where position p is predicted from p - 1, a sample's first token
    has no position to be predicted from, and carries no loss."""
    width = max(sum(len(example) for example in row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    carries_loss = torch.zeros(ids.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example)
            ids[number, start:end] = torch.tensor((*example.prompt_ids, *example.response_ids))
            given = max(len(example.prompt_ids), int(is_first_given))
            carries_loss[number, start + given : end] = True
            start = end
    layout = packed(tuple(tuple(len(example) for example in row) for row in rows))
    return LikelihoodBatch(ids=ids, layout=layout, carries_loss=carries_loss)
