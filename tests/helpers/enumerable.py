"""A model small enough to enumerate: 4 positions, 3 words, one random table of logits per state of the canvas. fp64."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coupled.rl.model.attention import Layout
from coupled.rl.model.families import Family
from coupled.rl.model.policy import Policy
from coupled.rl.model.vocabulary import OutputHead
from coupled.rl.types import TrainBatch

CANVAS, WORDS, TOY_MASK = 4, 3, 3


class Toy(Policy):
    """Logits looked up by the whole canvas: any dependence on the visible tokens that can be."""

    def __init__(self, seed: int = 0) -> None:
        self.family = Family(name="toy", model_type="none", shift=0)
        self.mask_id = TOY_MASK
        self.compute_dtype = torch.float32
        self.tokenizer: Any = range(WORDS + 1)
        stream = np.random.default_rng(seed)
        self.table = torch.from_numpy(stream.normal(size=((WORDS + 1) ** CANVAS, CANVAS, WORDS + 1)))
        self.num_rows = 0

    @property
    def head(self) -> OutputHead:
        return OutputHead(module=nn.Identity(), mask_id=TOY_MASK, num_tokens=WORDS + 1)

    def hidden_at(self, ids: Tensor, pad_lengths: Tensor | Layout, rows: Tensor, clean: Tensor | None = None) -> Tensor:
        """The logits themselves, for a head that leaves them as they are."""
        self.num_rows += len(ids)
        state = (ids[:, -CANVAS:] * (WORDS + 1) ** torch.arange(CANVAS)).sum(-1)
        return self.table[state][rows[:, -CANVAS:]]

    def exact(self, words: Sequence[int], masked: Collection[int], k: int) -> float:
        """ℓ_k(M), in numpy."""
        state = sum((TOY_MASK if i in masked else w) * (WORDS + 1) ** i for i, w in enumerate(words))
        logits = self.table[state, k, :WORDS].detach().numpy()
        return float(logits[words[k]] - np.log(np.exp(logits).sum()))


def toy_batch(words: Sequence[int], size: int, commit_step: Sequence[int] | None = None) -> TrainBatch:
    """One completion of four valid words, `size` times over."""
    return TrainBatch(
        uids=tuple(f"toy-{i}" for i in range(size)),
        ids=torch.tensor([[0, *words]]).repeat(size, 1),
        pad_lengths=torch.zeros(size, dtype=torch.int64),
        valid=torch.ones((size, CANVAS), dtype=torch.bool),
        advantages=torch.zeros(size),
        is_scored=torch.ones(size, dtype=torch.bool),
        commit_step=None if commit_step is None else torch.tensor([list(commit_step)]).repeat(size, 1),
    )
