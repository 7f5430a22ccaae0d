"""One process among the ranks of a trainer: its share of the work, and its exchange with the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Index and number of ranks. A single rank exchanges nothing, and needs no process group."""

    index: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The first rank is the run's own process: it alone logs and writes unsharded files."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part of a list that all ranks know. Example: of 5 items rank 1 of 2 gets the 2nd and the 4th."""
        return list(items[self.index :: self.size])

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, item: Item) -> list[Item]:
        """The items of all ranks, in their order, on the first rank; nothing on the others."""
        if self.size == 1:
            return [item]
        found: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(item, found)
        return found or []

    def broadcast(self, item: Item | None) -> Item:
        """The first rank's item, on all ranks."""
        box = [item]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]  # type: ignore[return-value]

    def leave(self) -> None:
        """End the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = Ranks()


def join(store: dist.Store, *, index: int, size: int, is_gpu: bool, timeout_seconds: float) -> Ranks:
    """Join the other ranks at `store`: tensors travel by gloo on a CPU and by NCCL between GPUs, objects by gloo."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
        store=dist.PrefixStore("ranks", store),
        rank=index,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return Ranks(index=index, size=size)


def add_gradients(ranks: Ranks, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradient of each rank's rows by the sum over all ranks, in fp32. A rank may have no rows."""
    trained = list(parameters)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = ranks.add(torch.cat([part.float().flatten() for part in parts]))
    for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def moved(value: Any, device: torch.device | str) -> Any:
    """The same records with their tensors on `device`. Example: a TrainBatch to send, on the CPU."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **changed)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    return value
