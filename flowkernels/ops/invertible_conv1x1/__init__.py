"""Glow's invertible 1x1 convolution: one linear map of the channels at every position, by its LU factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import (
    COMPUTE_DTYPE,
    check_device,
    check_float_tensor,
    check_logdet,
    check_parameter,
    check_shape,
)
from flowkernels._library import needs_grad
from flowkernels.ops.invertible_conv1x1 import reference
from flowkernels.ops.invertible_conv1x1.autograd import InvertibleConv1x1, forward_op

__all__ = ["invertible_conv1x1"]


def invertible_conv1x1(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    *,
    inverse: bool = False,
    logdet: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``y = W x`` at every position, with ``W = P L (U + diag(s))`` and ``s = sign exp(log_diagonal)``.

    ::

        inverse   x = W^-1 y, by two triangular solves
        logdet    positions * sum log_diagonal, its negative when `inverse`: exact, without a determinant

    L is unit lower triangular from what `lower` has below its diagonal, U from what `upper` has above; the rest of
    both is not looked at and has no gradient. Row i of W is row ``permutation[i]`` of ``L (U + diag(s))``.
    Features are flat, channel after channel, as in `flowkernels.ops.actnorm`.

    Args:
        x: (..., C P), float64, float32, bfloat16 or float16; halves are calculated in float32.
        lower, upper: (C, C). log_diagonal, sign: (C,); all x's dtype (under torch.autocast any but float64) and
            device. sign holds 1 and -1 and has no gradient.
        permutation: (C,) int64, each of 0..C-1 once. That, and the signs, are taken on trust: they are fixed when W is
            factorised, and to look at them in every call would cost more than the product.
        inverse: transform y back to x.
        logdet: (...), a running log-det that this one is added to.

    Returns:
        y (..., C P) in x's dtype (float32 under autocast) and logdet (...) in at least float32, in nats.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be.

    Source: Kingma & Dhariwal 2018 (Glow), arXiv:1807.03039, section 3.2.
    """
    check_float_tensor("x", x)
    shape, autocast = x.shape, torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    weight = {"lower": lower, "upper": upper, "log_diagonal": log_diagonal, "sign": sign}
    for name, value in weight.items():
        check_parameter(name, value, x, autocast)
    channels = lower.shape[0] if lower.dim() == 2 else 0
    if not channels:
        raise ValueError(f"lower must have shape (channels, channels), got {tuple(lower.shape)}")
    for name, value in weight.items():
        square = name in ("lower", "upper")
        check_shape(name, value, (channels, channels) if square else (channels,), f"lower has {channels} rows")
    if not isinstance(permutation, Tensor) or permutation.dtype != torch.int64:
        what = permutation.dtype if isinstance(permutation, Tensor) else type(permutation).__name__
        raise TypeError(f"permutation must be an int64 tensor, got {what}")
    check_shape("permutation", permutation, (channels,), f"lower has {channels} rows")
    check_device("permutation", permutation, x)
    if not shape or shape[-1] == 0 or shape[-1] % channels:
        raise ValueError(
            f"x must have a multiple of {channels} features, its last dimension: lower has {channels} channels, "
            f"x has shape {tuple(shape)}"
        )
    check_logdet(logdet, x)

    rows = math.prod(shape[:-1])
    compute = torch.float32 if autocast else COMPUTE_DTYPE[x.dtype]
    result = compute if autocast else x.dtype
    given: list[Any] = [x, lower, upper, log_diagonal, sign.detach() if sign.requires_grad else sign]
    # What need not be converted is not: a call that does nothing costs as much as a small product.
    if autocast or x.dtype != compute:
        given = [value.to(compute) for value in given]
    flat = given[0] if x.dim() == 2 else given[0].reshape(rows, shape[-1])
    if logdet is not None:
        logdet = logdet.to(compute).reshape(rows)
    args = (flat, *given[1:], permutation, logdet, inverse)
    if runs_reference(x):
        y, total = reference.invertible_conv1x1(*args)
    elif needs_grad(flat, *given[1:4], logdet):
        y, total = InvertibleConv1x1.apply(*args)
    else:
        y, total = forward_op(*args)
    if y.dtype != result:
        y = y.to(result)
    return (y, total) if x.dim() == 2 else (y.reshape(shape), total.reshape(shape[:-1]))
