"""Gradients of rq_spline: everything is recomputed from the inputs, nothing but them is kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowkernels._autograd import Function, backward_of, fake_backward, reference_double_backward
from flowkernels._library import operator
from flowkernels.ops.rq_spline import reference

_OPTIONS = "int bins, int style, float[] numbers, bool inverse"


forward_op: Any = operator(
    f"rq_spline(Tensor x, Tensor parameters, Tensor? logdet, {_OPTIONS}) -> (Tensor, Tensor)",
    reference.rq_spline,
    rows=(2, 3, 1, None, None, None, None),
)
backward_op: Any = operator(
    f"rq_spline_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor parameters, {_OPTIONS})"
    " -> (Tensor, Tensor)",
    reference.rq_spline_backward,
    rows=(2, 1, 2, 3, None, None, None, None),
    fake=fake_backward,
)


class RqSpline(Function):
    forward = staticmethod(forward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, parameters, _, *ctx.options = inputs
        ctx.save_for_backward(x, parameters)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> Any:
        inputs = (grad_y, grad_logdet, *ctx.saved_tensors, *ctx.options)
        grads = backward_of(RqSplineBackward, backward_op, *inputs)
        return *grads, grad_logdet if ctx.needs_input_grad[2] else None, None, None, None, None


class RqSplineBackward(Function):
    forward = staticmethod(backward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        grad_y, grad_logdet, *inputs = ctx.saved_tensors
        grads = reference_double_backward(
            lambda x, parameters: reference.rq_spline(x, parameters, None, *ctx.options),
            inputs,
            (grad_y, grad_logdet),
            grad_grads,
        )
        return *grads, None, None, None, None
