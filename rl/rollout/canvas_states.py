"""Hidden states of canvases during denoising: equal inputs are computed once, and a cache can supply a part.

Attention is to the whole sequence, so that one committed token changes every state: no cache of keys and values is
exact. Sharing equal inputs is exact: the completions of a prompt start from one canvas, and are computed once as long
as they agree.

With a cache (approximate), some columns keep the keys and values of the last refresh [Fast-dLLM]:

    prefix   all columns before the block that is denoised
    dual     all columns outside of that block; those behind it are MASK, or as they were at the last refresh

Shapes: R rows, S prompt + canvas, N wanted positions, U distinct states, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from coupled.rl.model.attention import left_padded, may_attend
from coupled.rl.model.policy import Policy
from coupled.rl.recipe.rollout import Sampler
from coupled.rl.rollout.sampler import Step
from coupled.rl.shapes import Bool, Float, Int


def distinct_states(
    policy: Policy, ids: Int[Tensor, "R S"], pad_lengths: Int[Tensor, " R"], wanted: Bool[Tensor, "R S"]
) -> tuple[Float[Tensor, "U D"], Int[Tensor, " N"]]:
    """The states that predict the wanted positions, and which of them each position has; rows that are equal are
    computed once."""
    first, which = distinct_rows(torch.cat((pad_lengths[:, None], ids), dim=1))
    if len(first) == len(ids):
        return _each(policy.hidden_read(ids, pad_lengths, wanted))
    # Equal rows may want different positions: where the order is drawn, each has its own.
    union = torch.zeros((len(first), ids.shape[1]), dtype=torch.int64, device=ids.device)
    union = union.index_add(0, which, wanted.long()) > 0
    hidden = policy.hidden_read(ids[first], pad_lengths[first], union)
    number = (union.flatten().cumsum(0) - 1).reshape(union.shape)
    return hidden, number[which][wanted]


def _each(hidden: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    return hidden, torch.arange(len(hidden), device=hidden.device)


def distinct_rows(ids: Int[Tensor, "R S"]) -> tuple[Int[Tensor, " U"], Int[Tensor, " R"]]:
    """The first index of each distinct row, and the number of every row among them.

    Example: rows a, b, a → [0, 1] and [0, 1, 0].
    """
    numbers: dict[bytes, int] = {}
    which = [numbers.setdefault(row.tobytes(), len(numbers)) for row in ids.cpu().numpy()]
    first = [which.index(number) for number in range(len(numbers))]
    return torch.tensor(first, device=ids.device), torch.tensor(which, device=ids.device)


class CachedStates:
    """Computes the columns of the block, over kept keys and values of the others."""

    def __init__(self, policy: Policy, sampler: Sampler, prompt_width: int) -> None:
        self._policy = policy
        self._is_dual = sampler.cache == "dual"
        self._prompt_width = prompt_width
        self._cache: Cache = DynamicCache()
        self._rows = torch.empty(0, dtype=torch.int64)

    def read(
        self,
        rows: Int[Tensor, " R"],
        ids: Int[Tensor, "R S"],
        pad_lengths: Int[Tensor, " R"],
        wanted: Bool[Tensor, "R S"],
        step: Step,
    ) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
        """The states that predict the wanted positions, which are in the block of the step, each its own.

        Args:
            rows: which rows of the batch these are, ascending; between refreshes they may only become fewer.
        """
        shift = self._policy.family.shift
        source = torch.zeros_like(wanted)
        source[:, : wanted.shape[1] - shift] = wanted[:, shift:]
        layout = left_padded(pad_lengths, ids.shape[1])
        width = ids.shape[1]
        start = max(0, self._prompt_width + step.block.start - shift)
        stop = self._prompt_width + step.block.stop if self._is_dual else width
        is_computed = torch.zeros(width, dtype=torch.bool, device=ids.device)
        is_computed[start:stop] = True
        if step.is_refresh:
            cache = DynamicCache()
            hidden = self._policy.hidden_after(ids, layout.position, may_attend(layout, layout), cache)
            self._cache, self._rows = _columns_of(cache, ~is_computed), rows
            return _each(hidden[source])
        if len(rows) < len(self._rows):
            self._cache.batch_select_indices(torch.isin(self._rows, rows).nonzero()[:, 0])
            self._rows = rows
        if self._cache.get_seq_length() == 0:
            self._cache = DynamicCache()  # an empty cache still has the number of rows that it was used with
        allowed = torch.cat((layout.is_real[:, ~is_computed], layout.is_real[:, is_computed]), dim=1)
        hidden = self._policy.hidden_after(
            ids[:, is_computed], layout.position[:, is_computed], allowed[:, None, :], self._cache
        )
        self._cache.crop(start - stop)
        return _each(hidden[source[:, is_computed]])


def _columns_of(cache: DynamicCache, kept: Bool[Tensor, " S"]) -> DynamicCache:
    """A cache that holds only the columns `kept`."""
    found = DynamicCache()
    if bool(kept.any()):
        for number, layer in enumerate(cache.layers):
            found.update(layer.keys[:, :, kept], layer.values[:, :, kept], number)
    return found
