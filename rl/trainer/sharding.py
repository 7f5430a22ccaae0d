"""Weights split over the ranks, for models that do not fit with their optimizer state on one device.

Layers are FSDP2's: gathered one at a time while training, and released again [Zhao et al. 2023]. The weights outside of
the layers (embedding, last norm, head) are gathered whole for the whole update: scoring reads the head in chunks whose
number depends on the data, and ranks that gather piece by piece must do it equally often.

For rollouts and for scoring without gradients everything is gathered at once, and each rank works at its own pace.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from coupled.rl.model.policy import Policy
from coupled.rl.model.reference import Reference, ReferenceKind
from coupled.rl.model.weights import whole_tensor


class Shards:
    """This rank's share of the weights of one model.

    Args:
        model: a transformers causal-LM class; its layers may be on the meta device, to be filled later.
        compute_dtype: the layers are gathered in it; gradients are added up in fp32 all the same.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
        body: Any = model.get_submodule("model")
        inside = {id(p) for layer in body.layers for p in layer.parameters()}
        self._mesh = mesh
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        split: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is None or id(weight) in inside:
                    continue
                if id(weight) not in split:  # tied weights stay one
                    mine = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
                    split[id(weight)] = nn.Parameter(mine, requires_grad=weight.requires_grad)
                self._places.append((module, name, split[id(weight)]))
        for place, name, part in self._places:
            place.register_parameter(name, part)
        self._outer = list(split.values())
        # Inputs stay as they are: the residual stream is fp32 under autocast, and is so here.
        precision = MixedPrecisionPolicy(
            param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for layer in body.layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(body, mesh=mesh, mp_policy=precision, ignored_params=set(self._outer))
        # FSDP would gather ahead by the order of all passes since the last update. Passes without gradients count, and
        # ranks make unequally many of those. The first layer has none before it, and is itself gathered already.
        for earlier, layer in zip([body.layers[0], *body.layers], body.layers, strict=False):
            layer.set_modules_to_backward_prefetch([earlier])
        self._wrapped = [module for module in body.modules() if isinstance(module, FSDPModule)]
        for wrapped in self._wrapped:
            # The ranks' losses have the denominator of the whole batch: their gradients are added, not averaged.
            wrapped.set_gradient_divide_factor(1.0)
            wrapped.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights gathered, for any number of passes without gradients."""
        for module in self._wrapped:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            with self._outer_whole():
                yield
        finally:
            for module in self._wrapped:
                module.reshard()
                module.set_reshard_after_forward(True, recurse=False)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Layers gathered as passes reach them: every rank must make equally many passes. At the end the gradients of
        this rank's rows are replaced by this rank's share of the sum over the ranks."""
        with self._outer_whole() as gathered:
            yield
        for part, weight in zip(self._outer, gathered, strict=True):
            if weight.grad is None:  # no rank made a pass
                continue
            mine = DTensor.from_local(weight.grad.float(), self._mesh, [Partial()], run_check=False)
            part.grad = mine.redistribute(placements=[Shard(0)]).to(part.dtype)

    @contextmanager
    def _outer_whole(self) -> Iterator[list[nn.Parameter]]:
        gathered = [nn.Parameter(whole_tensor(p.detach()), requires_grad=p.requires_grad) for p in self._outer]
        of_part = {id(part): weight for part, weight in zip(self._outer, gathered, strict=True)}
        for module, name, part in self._places:
            module.register_parameter(name, of_part[id(part)])
        try:
            yield gathered
        finally:
            for module, name, part in self._places:
                module.register_parameter(name, part)


def shard(policy: Policy, num_ranks: int, kind: ReferenceKind) -> tuple[Shards, Reference, Shards | None]:
    """Split the policy's weights over the ranks, and a reference that begins as its copy; `None` without a copy.

    No rank makes a second whole copy of the model: the reference's layers are filled from the policy's shares.
    """
    mesh = init_device_mesh(policy.device.type, (num_ranks,))
    model: Any = policy.model
    if kind in ("none", "adapter_off"):
        return Shards(model, mesh, policy.compute_dtype), Reference(live=policy, kind=kind), None
    inside = (p for layer in model.model.layers for p in layer.parameters())
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in inside}
    frame: Any = copy.deepcopy(model, empty).requires_grad_(False).eval()
    shards = Shards(model, mesh, policy.compute_dtype)
    of_reference = Shards(frame, mesh, policy.compute_dtype)
    for layer, live in zip(frame.model.layers, model.model.layers, strict=True):
        layer.load_state_dict({name: part.clone() for name, part in live.state_dict().items()}, assign=True)
    return shards, Reference(live=policy, kind=kind, model=frame), of_reference
