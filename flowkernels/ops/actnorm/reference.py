"""actnorm as a lecture writes it."""

from __future__ import annotations

import torch
from torch import Tensor


def actnorm(
    x: Tensor, shift: Tensor, log_scale: Tensor, logdet: Tensor | None, mask: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(y, logdet) of rows x (N, channels * positions); mask (N, positions) is True where a position counts."""
    given = _channels(x, shift)
    t, u = shift[:, None], log_scale[:, None]
    # What does not count is taken out before anything is calculated: no infinity of padding gets anywhere.
    values = given if mask is None else torch.where(mask[:, None], given, 0.0)
    y = values * torch.exp(-u) - t if inverse else (values + t) * torch.exp(u)
    if mask is not None:
        y = torch.where(mask[:, None], y, given)
    total = _counts(x, shift, mask) * (-log_scale if inverse else log_scale).sum()
    return y.reshape(x.shape), total if logdet is None else logdet + total


def actnorm_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    y: Tensor,
    shift: Tensor,
    log_scale: Tensor,
    mask: Tensor | None,
    inverse: bool,
    want_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_shift, grad_log_scale) from the output y; grad_x has no columns where it is not wanted.

    Forward dy/du = (x + t) exp(u) = y; inverse dy/du = -x exp(-u) = -(y + t).
    """
    t, u = shift[:, None], log_scale[:, None]
    given, values = _channels(grad_y, shift), _channels(y, shift)
    grad = given if mask is None else torch.where(mask[:, None], given, 0.0)
    values = values if mask is None else torch.where(mask[:, None], values, 0.0)
    logdets = (_counts(y, shift, mask) * grad_logdet).sum()
    grad_x = grad * torch.exp(-u if inverse else u)
    if inverse:
        grad_shift, grad_log_scale = -grad.sum((0, 2)), -(grad * (values + t)).sum((0, 2)) - logdets
    else:
        grad_shift, grad_log_scale = grad_x.sum((0, 2)), (grad * values).sum((0, 2)) + logdets
    if mask is not None:
        grad_x = torch.where(mask[:, None], grad_x, given)
    return (grad_x.reshape(y.shape) if want_x else y.new_empty((y.shape[0], 0))), grad_shift, grad_log_scale


def _channels(x: Tensor, shift: Tensor) -> Tensor:
    """(N, channels, positions)"""
    channels = shift.shape[0]
    return x.reshape(x.shape[0], channels, x.shape[1] // channels)


def _counts(x: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
    """(N,) how many positions of a row count."""
    if mask is not None:
        return mask.sum(1).to(x.dtype)
    return x.new_full((x.shape[0],), x.shape[1] // shift.shape[0])
