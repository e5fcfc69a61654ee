"""The straight-through gradient: hard values forward, the identity backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkernels._library import operator, vmap_loop
from flowkernels.ops.straight_through import reference

forward_op: Any = operator(
    "straight_through(Tensor x, Tensor? seed, int stream, int kind, float threshold) -> Tensor",
    reference.straight_through,
    vmap=lambda info, dims, *args: vmap_loop(forward_op, info, dims, args),
)


class StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(hard: Any, *args: Any) -> Tensor:
        """`hard` computes the values: the operator, or its reference."""
        result: Tensor = hard(*args)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad, None, None, None, None
