"""invertible_conv1x1 as a lecture writes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def _in_own_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under torch.autocast, too: a transform and its inverse in bfloat16 would not undo each other."""

    @wraps(function)
    def run(x: Tensor, *args: Any) -> Any:
        if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            return function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return run


def factors(lower: Tensor, upper: Tensor, log_diagonal: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """L, unit lower triangular, and U with its diagonal."""
    eye = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    return lower.tril(-1) + eye, upper.triu(1) + torch.diag(sign * log_diagonal.exp())


@_in_own_dtype
def invertible_conv1x1(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    logdet: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """(y, logdet) of rows x (N, channels * positions); row i of W is row permutation[i] of L U."""
    left, right = factors(lower, upper, log_diagonal, sign)
    values = _channels(x, lower)
    if inverse:
        columns = _columns(values)
        columns = torch.empty_like(columns).index_copy(0, permutation, columns)
        columns = torch.linalg.solve_triangular(left, columns, upper=False, unitriangular=True)
        y = _back(torch.linalg.solve_triangular(right, columns, upper=True), values)
    else:
        y = (left @ right)[permutation] @ values
    total = (values.shape[2] * log_diagonal.sum()).expand(x.shape[0])
    total = -total if inverse else total.clone()
    return y.reshape(x.shape), total if logdet is None else logdet + total


@_in_own_dtype
def invertible_conv1x1_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    flow_x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad of the input, of lower, of upper, of log_diagonal); `flow_x` is the input, when `inverse` the output.

    Forward y = W x: the input's gradient is W' g and W's is g x'. Inverse x = W^-1 y: they are h = W^-T g and -h x'.
    """
    left, right = factors(lower, upper, log_diagonal, sign)
    x, grad = _columns(_channels(flow_x, lower)), _columns(_channels(grad_y, lower))
    if inverse:
        solved = torch.linalg.solve_triangular(right.T, grad, upper=False)
        solved = torch.linalg.solve_triangular(left.T, solved, upper=True, unitriangular=True)
        given = solved[permutation]
        grad_weight = -(given @ x.T)
    else:
        given = (left @ right)[permutation].T @ grad
        grad_weight = grad @ x.T
    # Of L U, whose rows W has in another order.
    product = torch.empty_like(grad_weight).index_copy(0, permutation, grad_weight)
    of_upper = left.T @ product
    logdets = (flow_x.shape[1] // lower.shape[0]) * grad_logdet.sum()
    of_diagonal = of_upper.diagonal() * right.diagonal() + (-logdets if inverse else logdets)
    return (
        _back(given, _channels(grad_y, lower)).reshape(grad_y.shape),
        (product @ right.T).tril(-1),
        of_upper.triu(1),
        of_diagonal,
    )


def _channels(x: Tensor, lower: Tensor) -> Tensor:
    """(N, channels, positions)"""
    channels = lower.shape[0]
    return x.reshape(x.shape[0], channels, x.shape[1] // channels)


def _columns(values: Tensor) -> Tensor:
    """(channels, N positions)"""
    return values.transpose(0, 1).reshape(values.shape[1], values.shape[0] * values.shape[2])


def _back(columns: Tensor, values: Tensor) -> Tensor:
    return columns.reshape(values.shape[1], values.shape[0], values.shape[2]).transpose(0, 1)
