"""Packed weights, remembered for as long as no parameter changes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkernels.ops.maf.autograd import pack_op
from flowkernels.plan import Plan


def packed_weights(plan: Plan, parameters: Sequence[Tensor], *, backward: bool = False) -> Tensor:
    """The weights in the order of the plan's forward or backward table; packed again whenever a parameter has changed."""
    if torch.compiler.is_compiling() or any(map(_is_wrapped, parameters)):
        return _pack(plan, parameters, backward)
    key = [(p.data_ptr(), p._version, p.stride()) for p in parameters]
    found = plan.packs.get(backward)
    if found is None or not found.is_of(key, parameters):
        packed = _pack(plan, parameters, backward)
        if torch._C._functorch.is_functorch_wrapped_tensor(packed):
            return packed
        found = plan.packs[backward] = _Pack(key, parameters, packed)
    return found.packed  # type: ignore[no-any-return]


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
    the same address. The storages are held, so that no new memory can come to lie at an old address.
    """

    def __init__(self, key: Any, parameters: Sequence[Tensor], packed: Tensor) -> None:
        self.key = key
        self.owners = [weakref.ref(p) for p in parameters]
        self.storages = [p.untyped_storage() for p in parameters]
        self.packed = packed

    def is_of(self, key: Any, parameters: Sequence[Tensor]) -> bool:
        return self.key == key and all(owner() is p for owner, p in zip(self.owners, parameters, strict=True))


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether functorch, a tensor subclass or inference mode hides changes from us: then nothing may be remembered."""
    return (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.is_inference()  # counts no versions
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
