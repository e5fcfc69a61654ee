"""Gradients of vector_quantize: straight through the codes, and the two halves of the loss to their own sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkernels._autograd import Function, backward_of, reference_double_backward
from flowkernels._library import operator
from flowkernels.ops.vector_quantize import reference

forward_op: Any = operator(
    "vector_quantize(Tensor x, Tensor codebook) -> (Tensor, Tensor, Tensor)",
    reference.vector_quantize,
    fake=lambda x, codebook: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], dtype=torch.int64),
        x.new_empty(x.shape[0]),
    ),
)
nearest_op: Any = operator(
    "nearest_code(Tensor x, Tensor codebook) -> Tensor",
    reference.nearest_code,
    fake=lambda x, codebook: x.new_empty(x.shape[0], dtype=torch.int64),
)
backward_op: Any = operator(
    "vector_quantize_backward(Tensor grad_quantized, Tensor grad_loss, Tensor x, Tensor codebook, Tensor index, "
    "float commitment, float codebook_weight, bool for_codebook) -> (Tensor, Tensor)",
    reference.vector_quantize_backward,
)
sums_op: Any = operator(
    "vector_quantize_sums(Tensor x, Tensor index, SymInt codes) -> (Tensor, Tensor)",
    reference.vector_quantize_sums,
)


class VectorQuantize(Function):
    @staticmethod
    def forward(
        x: Tensor, codebook: Tensor, commitment: float, codebook_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        quantized, index, distance = forward_op(x, codebook)
        return quantized, index, (commitment + codebook_weight) * distance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, codebook, *ctx.weights = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, codebook, output[1])

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor, _: Any, grad_loss: Tensor) -> Any:
        inputs = (grad_quantized, grad_loss, *ctx.saved_tensors, *ctx.weights, ctx.needs_input_grad[1])
        grad_x, grad_codebook = backward_of(VectorQuantizeBackward, backward_op, *inputs)
        return grad_x, grad_codebook if ctx.needs_input_grad[1] else None, None, None


class VectorQuantizeBackward(Function):
    forward = staticmethod(backward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        *ctx.weights, ctx.for_codebook = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        grad_quantized, grad_loss, x, codebook, index = ctx.saved_tensors
        grads = reference_double_backward(
            lambda x, codebook: reference.straight_through_loss(x, codebook, index, *ctx.weights),
            (x, codebook),
            (grad_quantized, grad_loss),
            (grad_grads[0], grad_grads[1] if ctx.for_codebook else None),
        )
        return *grads, None, None, None, None
