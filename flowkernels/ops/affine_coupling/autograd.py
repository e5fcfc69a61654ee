"""Gradients of affine_coupling: everything is recomputed from the inputs, nothing but them is kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowkernels._autograd import Function, backward_of, reference_double_backward
from flowkernels._library import operator
from flowkernels.ops.affine_coupling import reference
from flowkernels.scales import FORMS

_OPTIONS = "Tensor? positions, int law, float[] law_parameters, int form, bool inverse"
_NO_ROWS = (None,) * 5

forward_op: Any = operator(
    f"affine_coupling(Tensor x, Tensor shift, Tensor scale, Tensor? logdet, {_OPTIONS}) -> (Tensor, Tensor)",
    reference.affine_coupling,
    rows=(2, 2, 2, 1, *_NO_ROWS),
)
backward_op: Any = operator(
    "affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor shift, Tensor scale, "
    f"{_OPTIONS}, int needs) -> (Tensor, Tensor, Tensor)",
    reference.affine_coupling_backward,
    rows=(2, 1, 2, 2, 2, *_NO_ROWS, None),
)


class AffineCoupling(Function):
    forward = staticmethod(forward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, shift, scale, _, positions, *ctx.options = inputs
        ctx.save_for_backward(x, shift, scale, positions)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> Any:
        of_x, of_shift, of_scale = ctx.needs_input_grad[:3]
        x, shift, _, positions = ctx.saved_tensors
        _, _, form, inverse = ctx.options
        # Where the shift's gradient is y's or x's, nobody writes it once more: that is a fourth of the memory.
        whole = of_shift and positions is None and not inverse and x.dtype == shift.dtype
        as_y, as_x = whole and FORMS[form] == "scale_shift", whole and FORMS[form] == "shift_scale" and of_x
        own = of_shift and not (as_y or as_x)
        needs = reference.NEEDS_X * of_x | reference.NEEDS_SHIFT * own | reference.NEEDS_SCALE * of_scale
        grad_x = grad_shift = grad_scale = None
        if needs:
            inputs = (grad_y, grad_logdet, *ctx.saved_tensors, *ctx.options, needs)
            grad_x, grad_shift, grad_scale = backward_of(AffineCouplingBackward, backward_op, *inputs)
        grad_shift = grad_y if as_y else grad_x if as_x else grad_shift
        grads = zip((grad_x, grad_shift, grad_scale, grad_logdet), ctx.needs_input_grad, strict=False)
        return *(g if needed else None for g, needed in grads), None, None, None, None, None


class AffineCouplingBackward(Function):
    forward = staticmethod(backward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6])
        *ctx.options, ctx.needs = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        grad_y, grad_logdet, *inputs, positions = ctx.saved_tensors
        grads = reference_double_backward(
            lambda x, shift, scale: reference.affine_coupling(x, shift, scale, None, positions, *ctx.options),
            inputs,
            (grad_y, grad_logdet),
            [gg if ctx.needs & bit else None for gg, bit in zip(grad_grads, (1, 2, 4), strict=True)],
        )
        return *grads, None, None, None, None, None, None
