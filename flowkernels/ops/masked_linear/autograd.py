"""Gradients of masked_linear: the input is kept, and the output where the activation's slope can be had from it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowkernels._autograd import Function, backward_of, reference_double_backward
from flowkernels._library import operator, vmap_loop, vmap_rows
from flowkernels.ops.maf.reference import ACTIVATION
from flowkernels.ops.masked_linear import reference
from flowkernels.plan import ACTIVATIONS

_DEGREES = "Tensor in_degrees, Tensor out_degrees, bool strict"


def _vmap(op: Any, info: Any, dims: Any, *args: Any) -> Any:
    if dims[1] is None and dims[2] is None:
        return vmap_rows(op, info, dims, args, (2,) + (None,) * 6)
    return vmap_loop(op, info, dims, args)


forward_op: Any = operator(
    f"masked_linear(Tensor x, Tensor weight, Tensor? bias, {_DEGREES}, int activation) -> Tensor",
    reference.masked_linear,
    vmap=lambda info, dims, *args: _vmap(forward_op, info, dims, *args),
)
backward_op: Any = operator(
    f"masked_linear_backward(Tensor grad, Tensor x, Tensor weight, {_DEGREES}, bool want_x, bool want_weight)"
    " -> (Tensor, Tensor, Tensor)",
    reference.masked_linear_backward,
)


class MaskedLinear(Function):
    """Without activation: that is applied, where it is wanted and differentiated, by `masked_linear` itself."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor, strict: bool
    ) -> Tensor:
        y: Tensor = forward_op(x, weight, bias, in_degrees, out_degrees, strict, 0)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, in_degrees, out_degrees, ctx.strict = inputs
        ctx.save_for_backward(x, weight, in_degrees, out_degrees)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, in_degrees, out_degrees = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        inputs = (grad, x, weight, in_degrees, out_degrees, ctx.strict, want_x, want_weight or want_bias)
        grad_x, grad_weight, grad_bias = backward_of(MaskedLinearBackward, backward_op, *inputs)
        return (
            grad_x if want_x else None,
            grad_weight if want_weight else None,
            grad_bias if want_bias else None,
            None,
            None,
            None,
        )


class MaskedLinearBackward(Function):
    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        in_degrees: Tensor,
        out_degrees: Tensor,
        strict: bool,
        want_x: bool,
        want_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_x, grad_weight, grad_bias = backward_op(
            grad, x, weight, in_degrees, out_degrees, strict, want_x, want_weight
        )
        return grad_x, grad_weight, grad_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.strict, ctx.want_x, ctx.want_weight = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        grad, x, weight, in_degrees, out_degrees = ctx.saved_tensors
        wanted = (ctx.want_x, ctx.want_weight, ctx.want_weight)
        grads = reference_double_backward(
            lambda x, weight, bias: (reference.masked_linear(x, weight, bias, in_degrees, out_degrees, ctx.strict, 0),),
            (x, weight, weight.new_zeros(len(out_degrees))),
            (grad,),
            [g if want else None for g, want in zip(grad_grads, wanted, strict=True)],
        )
        return *grads[:3], None, None, None, None, None


def with_activation(y: Tensor, activation: int) -> Tensor:
    return ACTIVATION[ACTIVATIONS[activation]](y)
