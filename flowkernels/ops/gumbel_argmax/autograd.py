"""Gradient of gumbel_argmax's log-probability; the samples themselves have none."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowkernels._autograd import Function, backward_of, reference_double_backward
from flowkernels._library import operator
from flowkernels.ops.gumbel_argmax import reference

forward_op: Any = operator(
    "gumbel_argmax(Tensor logits, Tensor seed, int stream, int samples) -> (Tensor, Tensor, Tensor)",
    reference.gumbel_argmax,
)
backward_op: Any = operator(
    "gumbel_argmax_backward(Tensor grad, Tensor logits, Tensor normaliser, Tensor index) -> Tensor",
    reference.gumbel_argmax_backward,
)


class GumbelArgmax(Function):
    forward = staticmethod(forward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        index, _, normaliser = output
        ctx.mark_non_differentiable(index, normaliser)
        ctx.save_for_backward(inputs[0], normaliser, index)

    @staticmethod
    def backward(ctx: Any, _: Any, grad: Tensor, __: Any) -> Any:
        return backward_of(GumbelArgmaxBackward, backward_op, grad, *ctx.saved_tensors), None, None, None


class GumbelArgmaxBackward(Function):
    forward = staticmethod(backward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, logits, _, index = inputs
        ctx.save_for_backward(grad, logits, index)

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> Any:
        grad, logits, index = ctx.saved_tensors
        grads = reference_double_backward(lambda x: (reference.log_prob(x, index),), (logits,), (grad,), (grad_grad,))
        return *grads, None, None
