"""Packed weights, remembered for as long as the weights are what they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkernels.ops.maf.autograd import fingerprint_op, pack_op
from flowkernels.plan import Plan

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def packed_weights(
    plans: Sequence[Plan], parameters: Sequence[Sequence[Tensor]], *, backward: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Each plan's weights in the order of its forward table and, if wanted, of its backward table (else an empty list).

    On the CPU they are remembered together with a fingerprint of the contents that they were packed from, which is
    taken again at every call: autograd's version counters would miss what ``p.data``, NumPy and fused optimizers write.
    Elsewhere, under torch.compile and inside functorch transforms they are packed at every call.
    """
    directions = (False, True) if backward else (False,)
    if not _may_remember(parameters):
        fresh = [[_pack(plan, ps, b) for plan, ps in zip(plans, parameters, strict=True)] for b in directions]
        return fresh[0], fresh[1] if backward else []
    prints = fingerprint_op([p for ps in parameters for p in ps], [len(ps) for ps in parameters]).tolist()
    packed: tuple[list[Tensor], list[Tensor]] = ([], [])
    for plan, ps, now in zip(plans, parameters, prints, strict=True):
        for b in directions:
            key = (b, ps[0].dtype)
            known = plan.packs.get(key)
            if known is None or known[0] != now:
                known = plan.packs[key] = (now, _pack(plan, ps, b))
            packed[b].append(known[1])
    return packed


def _pack(plan: Plan, parameters: Sequence[Tensor], backward: bool) -> Tensor:
    device = parameters[0].device
    with torch.no_grad():
        packed: Tensor = pack_op(
            list(parameters), plan.masks_on(device), plan.tables(device)[backward], plan.packed_sizes[backward]
        )
    return packed


def _may_remember(parameters: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the tensors are plain memory of this process, and not functorch's, a tracer's or a subclass's."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for ps in parameters:
        for p in ps:
            if type(p) not in _PLAIN or not p.is_cpu:
                return False
    return True
