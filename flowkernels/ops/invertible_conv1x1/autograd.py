"""Gradients of invertible_conv1x1: the flow's x is kept, one direction's input, the other's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkernels._autograd import Function
from flowkernels._library import operator, vmap_loop, vmap_rows
from flowkernels.ops.invertible_conv1x1 import reference

_WEIGHT = "Tensor lower, Tensor upper, Tensor log_diagonal, Tensor sign, Tensor permutation"


def _vmap(info: Any, dims: Any, *args: Any) -> Any:
    if all(dim is None for dim in dims[1:6]):
        return vmap_rows(forward_op, info, dims, args, (2, None, None, None, None, None, 1, None))
    return vmap_loop(forward_op, info, dims, args)


forward_op: Any = operator(
    f"invertible_conv1x1(Tensor x, {_WEIGHT}, Tensor? logdet, bool inverse) -> (Tensor, Tensor)",
    reference.invertible_conv1x1,
    vmap=_vmap,
)
backward_op: Any = operator(
    f"invertible_conv1x1_backward(Tensor grad_y, Tensor grad_logdet, Tensor flow_x, {_WEIGHT}, bool inverse)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.invertible_conv1x1_backward,
)


class InvertibleConv1x1(Function):
    forward = staticmethod(forward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *weight, _, ctx.inverse = inputs
        ctx.save_for_backward(output[0] if ctx.inverse else x, *weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> Any:
        needs = ctx.needs_input_grad
        # Where a second derivative may follow, the reference's backward is differentiated as it stands: an output
        # that was kept knows where it comes from.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run: Any = reference.invertible_conv1x1_backward if twice else backward_op
        grads = run(grad_y, grad_logdet, *ctx.saved_tensors, ctx.inverse)
        grads = (g if needed else None for g, needed in zip(grads, needs, strict=False))
        return *grads, None, None, grad_logdet if needs[6] else None, None
