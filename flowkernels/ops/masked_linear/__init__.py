"""A linear layer whose weight is masked by degrees, without a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_choice, check_float_tensor, check_shape
from flowkernels._library import needs_grad
from flowkernels.ops.masked_linear import reference
from flowkernels.ops.masked_linear.autograd import MaskedLinear, forward_op, with_activation
from flowkernels.plan import ACTIVATIONS

__all__ = ["masked_linear"]


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_degrees: Tensor,
    out_degrees: Tensor,
    strict: bool = False,
    activation: str | None = None,
) -> Tensor:
    r"""``y = activation(x (W M)^T + b)`` with ``M[o, i] = in_degrees[i] <= out_degrees[o]`` (``<`` when `strict`).

    Weights and units are sorted by degree, so that only the existing triangle is read and multiplied; what M hides is
    never read, and its gradient is zero.

    Args:
        x: (..., in), float64, float32, bfloat16 or float16; halves are calculated in float32.
        weight: (out, in), bias: (out,) or None, of x's dtype and device.
        in_degrees: (in,), out_degrees: (out,), integers of any size and order.
        activation: one of ``flowkernels.plan.ACTIVATIONS`` or None.

    Returns:
        y (..., out) in x's dtype, twice differentiable with respect to x, weight and bias. Under autocast x, weight and
        bias are cast as for `torch.nn.functional.linear`.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be.

    Source: Germain et al. 2015, arXiv:1502.03509.
    """
    if torch.is_autocast_enabled(x.device.type if isinstance(x, Tensor) else "cpu"):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, bias, in_degrees, out_degrees)
    check_choice("activation", activation or "identity", ACTIVATIONS)
    code = ACTIVATIONS.index(activation or "identity")
    plain = runs_reference(x, "masked_linear")
    # What need not be converted is not: a call that does nothing costs as much as a small product.
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    # Tensor cores take halves and add in float32; the other kernels get what they calculate in.
    dtype = x.dtype if x.is_cuda and not plain else COMPUTE_DTYPE[x.dtype]
    if x.dtype != dtype:
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if in_degrees.dtype != torch.int64:
        in_degrees = in_degrees.long()
    if out_degrees.dtype != torch.int64:
        out_degrees = out_degrees.long()
    if plain:
        y = reference.masked_linear(rows, weight, bias, in_degrees, out_degrees, strict, code)
    elif needs_grad(rows, weight, bias):
        y = with_activation(MaskedLinear.apply(rows, weight, bias, in_degrees, out_degrees, strict), code)
    else:
        y = forward_op(rows, weight, bias, in_degrees, out_degrees, strict, code)
    if x.dim() != 2:
        y = y.reshape(*x.shape[:-1], y.shape[1])
    return y if x.dtype == dtype else y.to(x.dtype)


def _check(x: Any, weight: Any, bias: Any, in_degrees: Any, out_degrees: Any) -> None:
    check_float_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, the features, got a scalar")
    for name, degrees in (("in_degrees", in_degrees), ("out_degrees", out_degrees)):
        if not isinstance(degrees, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(degrees).__name__}")
        if degrees.dim() != 1 or degrees.is_floating_point() or degrees.dtype == torch.bool:
            raise ValueError(
                f"{name} must be a vector of integers, got {degrees.dtype} of shape {tuple(degrees.shape)}"
            )
        if degrees.device != x.device:
            raise ValueError(f"{name} is on {degrees.device}, but x is on {x.device}: use one device")
    outputs, inputs = out_degrees.shape[0], in_degrees.shape[0]
    check_float_tensor("weight", weight, like=x)
    check_shape("weight", weight, (outputs, inputs), "out_degrees by in_degrees")
    if x.shape[-1] != inputs:
        check_shape("x", x, (*x.shape[:-1], inputs), "in_degrees last")
    if bias is not None:
        check_float_tensor("bias", bias, like=x)
        check_shape("bias", bias, (outputs,), "one per out_degree")
