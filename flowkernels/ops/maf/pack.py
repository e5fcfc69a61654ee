"""Packed weights, remembered for as long as no parameter changes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from flowkernels.ops.maf.autograd import pack_op
from flowkernels.plan import Plan


def packed_weights(plan: Plan, parameters: Sequence[Tensor], *, backward: bool = False) -> Tensor:
    """The weights in the order of the plan's forward or backward table; packed again whenever a parameter has changed."""
    if torch.compiler.is_compiling():
        return _pack(plan, parameters, backward)
    found: _Pack | None = plan.packs.get(backward)
    if found is not None and found.is_of(parameters):
        return found.packed
    packed = _pack(plan, parameters, backward)
    if not _is_wrapped(packed) and not any(map(_is_wrapped, parameters)):
        plan.packs[backward] = _Pack(parameters, packed)
    return packed


def _pack(plan: Plan, parameters: Sequence[Tensor], backward: bool) -> Tensor:
    device = parameters[0].device
    with torch.no_grad():
        packed: Tensor = pack_op(
            list(parameters), plan.masks_on(device), plan.tables(device)[backward], plan.packed_sizes[backward]
        )
    return packed


class _Pack:
    """Packed weights and what they were packed from.

    A parameter is the same as before if it is the same object with the same version (every in-place change counts it up) at
    the same address with the same strides. The storages are held, so that no new memory can come to lie at an old address.
    """

    def __init__(self, parameters: Sequence[Tensor], packed: Tensor) -> None:
        _watch_fused_optimizers()
        self.states = [(weakref.ref(p), p._version, p.data_ptr(), p.stride()) for p in parameters]
        self.storages = [p.untyped_storage() for p in parameters]
        self.packed = packed

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        for p, (owner, version, address, stride) in zip(parameters, self.states, strict=True):
            if owner() is not p or p._version != version or p.data_ptr() != address or p.stride() != stride:
                return False
        return True


@cache
def _watch_fused_optimizers() -> None:
    """Fused optimizers change parameters in place without counting up their versions: count for them."""
    register_optimizer_step_post_hook(_count_up)


def _count_up(optimizer: torch.optim.Optimizer, args: Any, keywords: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether functorch, a tensor subclass or inference mode hides changes from us: then nothing may be remembered."""
    return (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.is_inference()  # counts no versions
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
