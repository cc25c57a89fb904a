"""Where the fp32 weights and Adam moments of each rank live: one flat view per parameter, any strategy.

A checkpoint is a set of *slices* ``(name, offset, numel)`` of the logical, flattened parameter. Because a
slice names its place in the whole tensor, a checkpoint written by ZeRO-3 on eight ranks loads into FSDP2 on
two. The functions below only find the views; reading and writing files is in :mod:`.checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spatialvlm.training.optim import Group

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""What is stored of every trainable parameter, all fp32 and 1-D."""


class Slice(NamedTuple):
    """A contiguous piece ``[offset, offset + numel)`` of one flattened parameter on this rank."""

    fqn: str
    offset: int
    numel: int
    views: dict[str, Tensor]
    """Kind -> 1-D tensor that shares memory with the engine's state."""


def ensure_adam_state(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    """Create the moments that AdamW would create in its first step."""
    fused = bool(optimizer.defaults.get("fused"))
    for tensor in tensors:
        state = optimizer.state[tensor]
        if "exp_avg" not in state:
            device = tensor.device if fused else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)


def set_adam_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set Adam's bias-correction count of every tensor."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(step))


def _flat(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    local = local.detach()
    assert local.is_contiguous(), "slices need contiguous parameters"
    return local.view(-1)


def replicated_slices(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    rank: int,
    size: int,
    *,
    loading: bool,
) -> list[Slice]:
    """DDP: every rank holds everything; rank ``r`` writes the ``r``-th part of each tensor, all read all."""
    named = dict(model.named_parameters())
    slices: list[Slice] = []
    for group in groups:
        for fqn in group.fqns:
            parameter = named[fqn]
            ensure_adam_state(optimizer, [parameter])
            state = optimizer.state[parameter]
            total = parameter.numel()
            start, stop = (
                (0, total) if loading else (total * rank // size, total * (rank + 1) // size)
            )
            if start == stop:
                continue
            whole = {
                "param": parameter,
                "exp_avg": state["exp_avg"],
                "exp_avg_sq": state["exp_avg_sq"],
            }
            views = {kind: _flat(t)[start:stop] for kind, t in whole.items()}
            slices.append(Slice(fqn, start, stop - start, views))
    return slices


def fsdp2_slices(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Group],
    rank: int,
    size: int,
) -> list[Slice]:
    """FSDP2: dimension 0 is chunked over ranks, so a rank holds consecutive rows."""
    named = dict(model.named_parameters())
    slices: list[Slice] = []
    for group in groups:
        for fqn in group.fqns:
            parameter = named[fqn]
            ensure_adam_state(optimizer, [parameter])
            state = optimizer.state[parameter]
            rows = parameter.shape[0] if parameter.dim() else 1
            row = parameter.numel() // max(rows, 1)
            start = min(rank * math.ceil(rows / size), rows) * row
            views = {
                "param": _flat(parameter),
                "exp_avg": _flat(state["exp_avg"]),
                "exp_avg_sq": _flat(state["exp_avg_sq"]),
            }
            if views["param"].numel():
                slices.append(Slice(fqn, start, views["param"].numel(), views))
    return slices


def zero12_slices(zero: Any, fqn_of: dict[int, str]) -> list[Slice]:
    """ZeRO-1/2: each group is one flat fp32 buffer cut over ranks; DeepSpeed links parameters to fragments."""
    slices: list[Slice] = []
    for index, members in enumerate(zero.bit16_groups):
        master = zero.single_partition_of_fp32_groups[index]
        ensure_adam_state(zero.optimizer, [master])
        state = zero.optimizer.state[master]
        for parameter in members:
            link = parameter._hp_mapping
            if link is None:
                continue
            at, inside = link.hp_fragment_address, link.lp_fragment_address
            views = {
                "param": master.detach().narrow(0, at.start, at.numel),
                "exp_avg": state["exp_avg"].narrow(0, at.start, at.numel),
                "exp_avg_sq": state["exp_avg_sq"].narrow(0, at.start, at.numel),
            }
            slices.append(Slice(fqn_of[id(parameter)], inside.start, at.numel, views))
    return slices


def zero3_slices(zero: Any, fqn_of: dict[int, str], rank: int) -> list[Slice]:
    """ZeRO-3: every parameter is cut into equal partitions, the last one padded."""
    slices: list[Slice] = []
    for index, members in enumerate(zero.fp16_groups):
        master = zero.fp32_partitioned_groups_flat[index]
        ensure_adam_state(zero.optimizer, [master])
        state = zero.optimizer.state[master]
        for parameter in members:
            partition = parameter.partition_numel()
            start = rank * partition
            numel = min(partition, parameter.ds_numel - start)
            if numel <= 0:
                continue
            at = zero.grad_position[zero.get_param_id(parameter)][1]
            views = {
                "param": master.detach().narrow(0, at, numel),
                "exp_avg": state["exp_avg"].narrow(0, at, numel),
                "exp_avg_sq": state["exp_avg_sq"].narrow(0, at, numel),
            }
            slices.append(Slice(fqn_of[id(parameter)], start, numel, views))
    return slices
