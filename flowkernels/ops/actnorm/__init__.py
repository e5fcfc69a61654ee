"""A shift and a scale for each channel, with their log-det."""

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
from flowkernels.ops.actnorm import reference
from flowkernels.ops.actnorm.autograd import ActNorm, forward_op

__all__ = ["actnorm"]


def actnorm(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor,
    *,
    mask: Tensor | None = None,
    inverse: bool = False,
    logdet: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""ActNorm: ``y = (x + t_c) exp(u_c)`` with t = `shift` and u = `log_scale` of each feature's channel c.

    ::

        inverse   x = y exp(-u_c) - t_c
        logdet    positions * sum_c u_c, its negative when `inverse`; with a mask, the positions that count

    Features are flat, channel after channel: an image (C, H, W) is ``x.reshape(N, -1)``, with H W positions; a plain
    vector has one position. How shift and scale are found from a first batch is the layer's: `flowkernels.nn.ActNorm`.

    Args:
        x: (..., C P), float64, float32, bfloat16 or float16; halves are calculated in float32.
        shift, log_scale: (C,), x's dtype (under torch.autocast any but float64) and device.
        mask: (..., P) or (...) booleans, True for what counts. Padding stays as it is, in y and in the gradient.
        inverse: transform y back to x.
        logdet: (...), a running log-det that this one is added to.

    Returns:
        y (..., C P) in x's dtype (float32 under autocast) and logdet (...) in at least float32, in nats.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be.

    Source: Kingma & Dhariwal 2018 (Glow), arXiv:1807.03039, section 3.1.
    """
    check_float_tensor("x", x)
    shape, autocast = x.shape, torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    for name, value in (("shift", shift), ("log_scale", log_scale)):
        check_parameter(name, value, x, autocast)
    channels = shift.shape[0] if shift.dim() == 1 else 0
    if not channels:
        raise ValueError(f"shift must have shape (channels,), got {tuple(shift.shape)}")
    check_shape("log_scale", log_scale, (channels,), "one for each of shift's channels")
    if not shape or shape[-1] == 0 or shape[-1] % channels:
        raise ValueError(
            f"x must have a multiple of {channels} features, its last dimension: shift has {channels} channels, "
            f"x has shape {tuple(shape)}"
        )
    rows = math.prod(shape[:-1])
    mask = None if mask is None else _mask(mask, x, shape[-1] // channels, rows)
    check_logdet(logdet, x)

    compute = torch.float32 if autocast else COMPUTE_DTYPE[x.dtype]
    result = compute if autocast else x.dtype
    given: list[Any] = [x, shift, log_scale]
    # What need not be converted is not: a call that does nothing costs as much as a small transform.
    if autocast or x.dtype != compute:
        given = [value.to(compute) for value in given]
    flat = given[0] if x.dim() == 2 else given[0].reshape(rows, shape[-1])
    if logdet is not None:
        logdet = logdet.to(compute).reshape(rows)
    args = (flat, *given[1:], logdet, mask, inverse)
    if runs_reference(x):
        y, total = reference.actnorm(*args)
    elif needs_grad(*args[:4]):
        y, total = ActNorm.apply(*args)
    else:
        y, total = forward_op(*args)
    if y.dtype != result:
        y = y.to(result)
    return (y, total) if x.dim() == 2 else (y.reshape(shape), total.reshape(shape[:-1]))


def _mask(mask: Tensor, x: Tensor, positions: int, rows: int) -> Tensor:
    """(rows, positions)"""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    check_device("mask", mask, x)
    events = tuple(x.shape[:-1])
    if mask.shape != events:
        if mask.shape != (*events, positions):
            raise ValueError(f"mask must have shape {events} or {(*events, positions)}, got {tuple(mask.shape)}")
        return mask.reshape(rows, positions)
    return mask.reshape(rows, 1).expand(rows, positions)
