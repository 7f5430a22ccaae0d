"""Subsets of the valid positions, from the numbers of a keyed stream."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def bernoulli(numbers: np.ndarray, ratio: float, valid: np.ndarray) -> np.ndarray:
    """Each valid position with probability `ratio`, independently. Bool [C]."""
    return (numbers < ratio) & valid


def exact_count(numbers: np.ndarray, size: int, valid: np.ndarray) -> np.ndarray:
    """A uniform subset: the `size` valid positions with the smallest numbers. Bool [C].

    Example: numbers [.3, .1, .9, .2], size 2, all valid → [0, 1, 0, 1].
    """
    chosen = np.zeros(len(valid), dtype=bool)
    chosen[np.argsort(np.where(valid, numbers, np.inf), kind="stable")[:size]] = True
    return chosen


def nearest_count(ratio: float, length: int, *, most: int) -> int:
    """`ratio · length` to the nearest whole number, at least 1 and at most `most`. Example: (.5, 5, most=4) → 3."""
    return min(max(math.floor(ratio * length + 0.5), 1), most)


def stack(rows: list[np.ndarray], like: Tensor) -> Tensor:
    """Rows of a batch as one tensor, on the device of `like`."""
    return torch.from_numpy(np.stack(rows)).to(like.device)


def column(values: list[float], like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """One number a row as a tensor [B], on the device of `like`."""
    return torch.tensor(values, dtype=dtype, device=like.device)
