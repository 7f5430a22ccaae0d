"""Log-probabilities of tokens from hidden states, without logits of all rows at once.

    ℓ_m = z[line_m, target_m] / T - log Σ_v exp(z[line_m, v] / T),   z = h Wᵀ, with forbidden tokens at -inf

Logits are made for a few rows at a time, log-softmax is fp32 (fp64 for fp64 logits), and the tensors kept for the
backward pass are of the size of the hidden states. With p the softmax of a row and g_m the slope of the loss in ℓ_m,

    ∂ℓ_m/∂h[line_m] = (W[target_m] - Σ_v p_v W_v) / T       Σ_v p_v W_v is taken in the forward pass if W is frozen
    ∂ℓ/∂W           = Σ_m g_m · (onehot(target_m) - p) h[line_m]ᵀ / T      the logits are computed a second time

Where all logits fit into one chunk nothing is gained, and autograd's own operations are used.

Shapes: N rows of hidden states, M tokens (several may share a row), D hidden size, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from coupled.rl.shapes import Float, Int

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}
"""Logits made at a time: 16 MiB on a CPU, where they should stay near its caches; 256 MiB on a GPU, where several
hundred rows at a time keep the product with the weight from being bound by reading the weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """Projection of hidden states to logits, and the tokens that it may name.

    Example: `OutputHead(module=model.lm_head, mask_id=4, num_tokens=877)` for a head of 896 rows.
    """

    module: nn.Module
    mask_id: int
    """Forbidden: a completion never contains MASK."""
    num_tokens: int
    """Rows of the head from here on are padding, and forbidden."""
    compute_dtype: torch.dtype = torch.float32
    """Data type of the projection; float32 uses the weights in their own."""

    @property
    def plain_weight(self) -> Tensor | None:
        """The weight [V, D], if the module is a bare matrix: no bias, no adapter, no hook, no shards."""
        module = self.module
        if type(module) is not nn.Linear or module.bias is not None:
            return None
        has_hook = bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        return None if has_hook else module.weight


def raw_logits(head: OutputHead, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """Logits of all rows of the head, in the type that the product in `compute_dtype` returns."""
    is_fp32 = head.compute_dtype == torch.float32
    with nullcontext() if is_fp32 else torch.autocast(hidden.device.type, dtype=head.compute_dtype):
        logits: Tensor = head.module(hidden)
    return logits


def project(head: OutputHead, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """Raw logits; the product in `compute_dtype`, the result at least fp32."""
    logits = raw_logits(head, hidden)
    return logits.to(_statistics_dtype(logits.dtype))


def forbid(head: OutputHead, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """-inf for MASK and for rows of the head that no token names."""
    forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    forbidden[head.mask_id] = True
    forbidden[head.num_tokens :] = True
    return logits.masked_fill(forbidden, float("-inf"))


def token_logp(
    head: OutputHead,
    hidden: Float[Tensor, "N D"],
    line: Int[Tensor, " M"],
    targets: Int[Tensor, " M"],
    temperature: float = 1.0,
) -> Float[Tensor, " M"]:
    """log p(target_m) under the distribution of the row `line_m`, in nats. Differentiable once.

    At most `CHUNK_LOGITS` logits of the device are in memory at a time.
    """
    most = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cuda"])
    num_rows = max(1, most // head.num_tokens)
    if len(hidden) <= num_rows:
        return _plain_logp(head, hidden, line, targets, temperature)
    weight = head.plain_weight
    if weight is None:
        return _recomputed_logp(head, hidden, line, targets, temperature, num_rows)
    found: Tensor = _FusedLogp.apply(hidden, weight, line, targets, head, temperature, num_rows)
    return found


def _plain_logp(
    head: OutputHead,
    hidden: Float[Tensor, "N D"],
    line: Int[Tensor, " M"],
    targets: Int[Tensor, " M"],
    temperature: float,
) -> Float[Tensor, " M"]:
    logits = forbid(head, project(head, hidden))
    return torch.log_softmax(logits / temperature, dim=-1)[line, targets]


def _recomputed_logp(
    head: OutputHead,
    hidden: Float[Tensor, "N D"],
    line: Int[Tensor, " M"],
    targets: Int[Tensor, " M"],
    temperature: float,
    num_rows: int,
) -> Float[Tensor, " M"]:
    """The plain operations for any head, for some rows at a time and again in the backward pass."""
    places, parts = [], []
    for rows, mine in _chunks(len(hidden), num_rows, line):
        arguments = (head, hidden[rows], line[mine] - rows.start, targets[mine], temperature)
        parts.append(checkpoint(_plain_logp, *arguments, use_reentrant=False, preserve_rng_state=False))
        places.append(mine)
    return torch.cat(parts)[torch.cat(places).argsort()]


class _FusedLogp(torch.autograd.Function):
    """`token_logp` for a head that is a matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        line: Tensor,
        targets: Tensor,
        head: OutputHead,
        temperature: float,
        num_rows: int,
    ) -> Tensor:
        matrix = weight.to(_product_dtype(head, weight))
        logp = torch.empty(len(line), dtype=_statistics_dtype(matrix.dtype), device=hidden.device)
        is_frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        mean_row = torch.empty(hidden.shape, dtype=matrix.dtype, device=hidden.device) if is_frozen else None
        for rows, mine in _chunks(len(hidden), num_rows, line):
            row_logp = _row_logp(head, hidden[rows], matrix, temperature)
            logp[mine] = row_logp[line[mine] - rows.start, targets[mine]]
            if mean_row is not None:
                mean_row[rows] = row_logp.exp_().to(matrix.dtype) @ matrix
        ctx.save_for_backward(None if is_frozen else hidden, weight, line, targets, mean_row)
        ctx.settings = head, temperature, num_rows, hidden.dtype
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, line, targets, mean_row = ctx.saved_tensors
        head, temperature, num_rows, hidden_dtype = ctx.settings
        slope = slope / temperature
        matrix = weight.to(_product_dtype(head, weight))
        if mean_row is not None:
            is_named = (targets != head.mask_id) & (targets < head.num_tokens)
            each = matrix[targets] * is_named[:, None] - mean_row[line]
            grad = torch.zeros(mean_row.shape, dtype=slope.dtype, device=slope.device)
            grad.index_add_(0, line, each * slope[:, None])
            return grad.to(hidden_dtype), None, None, None, None, None, None
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight)
        per_row = torch.zeros(len(hidden), dtype=slope.dtype, device=slope.device).index_add_(0, line, slope)
        for rows, mine in _chunks(len(hidden), num_rows, line):
            grad = _row_logp(head, hidden[rows], matrix, temperature).exp_()
            grad *= -per_row[rows, None]
            grad.index_put_((line[mine] - rows.start, targets[mine]), slope[mine], accumulate=True)
            fill_forbidden(head, grad, 0.0)
            grad_logits = grad.to(matrix.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ matrix).to(hidden_dtype)
            if grad_logits.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden[rows].to(matrix.dtype))
            else:
                grad_weight += grad_logits.t() @ hidden[rows].to(matrix.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _row_logp(head: OutputHead, hidden: Tensor, matrix: Tensor, temperature: float) -> Tensor:
    logits = (hidden.to(matrix.dtype) @ matrix.t()).to(_statistics_dtype(matrix.dtype))
    fill_forbidden(head, logits, float("-inf"))
    return torch.log_softmax(logits.div_(temperature), dim=-1)


def fill_forbidden(head: OutputHead, values: Tensor, value: float) -> None:
    """As `forbid`, in place and with any value."""
    values[:, head.mask_id] = value
    values[:, head.num_tokens :] = value


def _chunks(num_lines: int, num_rows: int, line: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, each with the places of the tokens that belong to them."""
    for start in range(0, num_lines, num_rows):
        stop = min(start + num_rows, num_lines)
        yield slice(start, stop), ((line >= start) & (line < stop)).nonzero()[:, 0]


def _product_dtype(head: OutputHead, weight: Tensor) -> torch.dtype:
    return weight.dtype if head.compute_dtype == torch.float32 else head.compute_dtype


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
