"""The straight-through gradient: hard values forward, the identity backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowkernels._autograd import Function
from flowkernels._library import operator
from flowkernels.ops.straight_through import reference

forward_op: Any = operator(
    "straight_through(Tensor x, Tensor? seed, int stream, int kind, float threshold) -> Tensor",
    reference.straight_through,
)


class StraightThrough(Function):
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
