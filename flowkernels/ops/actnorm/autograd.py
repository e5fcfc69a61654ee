"""Gradients of actnorm, from its output: that is what the next layer keeps anyway, the input nobody else does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkernels._autograd import Function
from flowkernels._library import operator, vmap_loop, vmap_rows
from flowkernels.ops.actnorm import reference


def _vmap(info: Any, dims: Any, *args: Any) -> Any:
    if dims[1] is None and dims[2] is None:
        return vmap_rows(forward_op, info, dims, args, (2, None, None, 1, 2, None))
    return vmap_loop(forward_op, info, dims, args)


forward_op: Any = operator(
    "actnorm(Tensor x, Tensor shift, Tensor log_scale, Tensor? logdet, Tensor? mask, bool inverse) -> (Tensor, Tensor)",
    reference.actnorm,
    vmap=_vmap,
)
backward_op: Any = operator(
    "actnorm_backward(Tensor grad_y, Tensor grad_logdet, Tensor y, Tensor shift, Tensor log_scale, Tensor? mask, "
    "bool inverse, bool want_x) -> (Tensor, Tensor, Tensor)",
    reference.actnorm_backward,
)


class ActNorm(Function):
    forward = staticmethod(forward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, shift, log_scale, _, mask, ctx.inverse = inputs
        ctx.save_for_backward(output[0], shift, log_scale, mask)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> Any:
        needs = ctx.needs_input_grad
        # Where a second derivative may follow, the reference's backward is differentiated as it stands: y knows where
        # it comes from.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run: Any = reference.actnorm_backward if twice else backward_op
        grads = run(grad_y, grad_logdet, *ctx.saved_tensors, ctx.inverse, needs[0])
        grads = (g if needed else None for g, needed in zip(grads, needs, strict=False))
        return *grads, grad_logdet if needs[3] else None, None, None
