"""Small passes in few shapes, so that on a GPU each is captured once as a CUDA graph and then replayed.

A pass over some hundred columns takes a GPU less time than launching its kernels one by one; a graph is launched at
once. Larger passes hide that, and go their usual way. A graph reads the weights where they were when it was captured:
their addresses are part of what it is known by, and it is captured anew when they have moved.

Off unless `model.has_cuda_graphs` is set. Not measured, and captured nowhere yet: no GPU was there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coupled.rl.shapes import Int

MOST_COLUMNS = 2048
"""Of all rows of a pass: an H200 needs some 17 µs for each of them with 7.6 B parameters."""
READ_COLUMNS = 32
"""The columns that are read of a row are filled up to a multiple of it."""
MOST_GRAPHS = 64
"""When there are so many, all of them are given back."""

Pass = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captured:
    """A graph, where it reads its inputs from, and where it leaves what it gives."""

    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class Graphs:
    """The graphs of one model."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Captured] = {}

    def run(self, model: nn.Module, one_pass: Pass, inputs: tuple[Tensor, ...]) -> Tensor:
        """`one_pass(*inputs)`, which on a GPU is replayed where these shapes and weights were met before.

        What it returns stands only until the next call. The pass must not look at values on the host.
        """
        if inputs[0].device.type != "cuda":
            return one_pass(*inputs)
        weights = tuple(p.data_ptr() for p in model.parameters())
        key = (*(tuple(x.shape) for x in inputs), hash(weights))
        if key not in self._known:
            if len(self._known) == MOST_GRAPHS:
                self._known.clear()
            self._known[key] = _capture(one_pass, inputs)
        known = self._known[key]
        for place, value in zip(known.inputs, inputs, strict=True):
            place.copy_(value)
        known.graph.replay()
        return known.output


def is_small(ids: Int[Tensor, "R S"]) -> bool:
    """Whether a pass is worth a graph."""
    return ids.numel() <= MOST_COLUMNS


def fill_up(columns: Int[Tensor, "R M"], width: int) -> Int[Tensor, "R _"]:
    """Columns filled up with the first one to a multiple of `READ_COLUMNS`, or to all of the width."""
    wanted = min(width, -(-columns.shape[1] // READ_COLUMNS) * READ_COLUMNS)
    return nn.functional.pad(columns, (0, wanted - columns.shape[1]))


def _capture(one_pass: Pass, inputs: tuple[Tensor, ...]) -> Captured:
    places = tuple(x.clone() for x in inputs)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # libraries make their workspaces when they are first used
        one_pass(*places)
        one_pass(*places)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = one_pass(*places)
    return Captured(graph=graph, inputs=places, output=output)
