"""Gradients of gumbel_softmax: from y alone, so no noise is kept. The hard form keeps not even y and draws again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkernels._autograd import Function, backward_of
from flowkernels._library import operator
from flowkernels.ops.gumbel_softmax import reference

# One seed means one noise, whatever is mapped: under vmap every element has the noise that it would have alone.
forward_op: Any = operator(
    "gumbel_softmax(Tensor logits, Tensor tau, Tensor seed, int stream, bool hard) -> Tensor",
    reference.gumbel_softmax,
)
backward_op: Any = operator(
    "gumbel_softmax_backward(Tensor grad, Tensor y, Tensor tau, bool for_tau) -> (Tensor, Tensor)",
    reference.gumbel_softmax_backward,
)


class GumbelSoftmax(Function):
    forward = staticmethod(forward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, tau, seed, ctx.stream, ctx.hard = inputs
        ctx.save_for_backward(*((logits, tau, seed) if ctx.hard else (output, tau)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.hard:
            logits, tau, seed = ctx.saved_tensors
            y = backward_of(GumbelSoftmax, forward_op, logits, tau, seed, ctx.stream, False)
        else:
            y, tau = ctx.saved_tensors
        for_tau = ctx.needs_input_grad[1]
        grad_logits, grad_tau = backward_of(GumbelSoftmaxBackward, backward_op, grad, y, tau, for_tau)
        return grad_logits, grad_tau if for_tau else None, None, None, None


class GumbelSoftmaxBackward(Function):
    forward = staticmethod(backward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.for_tau = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> Any:
        with torch.enable_grad():
            grad, y, tau = leaves = tuple(t.detach().requires_grad_() for t in ctx.saved_tensors)
            grads = reference.gumbel_softmax_backward(grad, y, tau, ctx.for_tau)
        used = 2 if ctx.for_tau else 1
        return *torch.autograd.grad(grads[:used], leaves, grad_grads[:used]), None
