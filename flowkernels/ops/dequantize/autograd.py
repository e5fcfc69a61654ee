"""The gradient of dequantize by its noise, when that was given: y says all about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkernels._autograd import Function, reference_double_backward
from flowkernels._library import operator
from flowkernels.ops.dequantize import reference

forward_op: Any = operator(
    "dequantize(Tensor x, Tensor? noise, Tensor seed, int stream, int levels, bool logit, float margin, bool in_double)"
    " -> (Tensor, Tensor)",
    reference.dequantize,
)


class Dequantize(Function):
    forward = staticmethod(forward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, noise, seed, *ctx.options = inputs
        ctx.save_for_backward(x, noise, seed, output[0])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> Any:
        x, noise, seed, y = ctx.saved_tensors
        _, levels, logit, margin, _ = ctx.options
        if torch.is_grad_enabled() and (grad_y.requires_grad or noise.requires_grad):
            # A second derivative may follow: through the reference.
            grads = DequantizeBackward.apply(grad_y, grad_logdet, x, noise, seed, y, *ctx.options)
        else:
            grads = _gradient(grad_y, grad_logdet, y, levels, logit, margin)
        return None, grads, None, None, None, None, None, None


def _gradient(grad_y: Tensor, grad_logdet: Tensor, y: Tensor, levels: int, logit: bool, margin: float) -> Tensor:
    if not logit:
        return grad_y / levels
    p, q = torch.sigmoid(y), torch.sigmoid(-y)
    return (grad_y + grad_logdet[:, None] * (p - q)) * ((1 - 2 * margin) / levels) / (p * q)


class DequantizeBackward(Function):
    @staticmethod
    def forward(
        grad_y: Tensor, grad_logdet: Tensor, x: Tensor, noise: Tensor, seed: Tensor, y: Tensor, *options: Any
    ) -> Tensor:
        _, levels, logit, margin, _ = options
        return _gradient(grad_y, grad_logdet, y, levels, logit, margin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_y, grad_logdet, x, noise, seed = ctx.saved_tensors
        of_y, of_logdet, of_noise = reference_double_backward(
            lambda n: reference.dequantize(x, n, seed, *ctx.options), (noise,), (grad_y, grad_logdet), (grad,)
        )
        return of_y, of_logdet, None, of_noise, None, None, None, None, None, None, None
