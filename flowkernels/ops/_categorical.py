"""What the faces of the categorical operators share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_dim(x: Tensor, dim: int, name: str = "logits") -> int:
    """`dim` counted from the front; raises unless `x` has it."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if x.dim() < 1:
        raise ValueError(f"{name} must have at least one dimension, the categories, got a scalar")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must lie in [{-x.dim()}, {x.dim() - 1}] for {name} of shape {tuple(x.shape)}, got {dim}")
    return dim % x.dim()


# Calls that change nothing are left out: each costs as much as the kernel of a small tensor.


def rows_of(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """x as (rows, categories) in `dtype`, a view where strides allow it."""
    if dim != x.dim() - 1:
        x = x.movedim(dim, -1)
    if x.dim() != 2:
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.dtype == dtype else x.to(dtype)


def rows_back(rows: Tensor, like: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(rows, n) in the shape of `like`, with size n in `dim`, and in `dtype`."""
    if rows.dtype != dtype:
        rows = rows.to(dtype)
    if like.dim() != 2:
        rows = rows.reshape(*shape_without(like, dim), rows.shape[-1])
    return rows if dim == like.dim() - 1 else rows.movedim(-1, dim)


def shape_without(x: Tensor, dim: int) -> torch.Size:
    """x's shape less dimension `dim`."""
    return x.shape[:dim] + x.shape[dim + 1 :]


def can_look_at(x: Tensor) -> bool:
    """Whether x's values may be looked at: neither traced nor mapped, nor on a device that has to be waited for."""
    if torch.compiler.is_compiling() or not x.is_cpu:
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_rows(logits: Tensor, result: Tensor) -> None:
    """Raises if a row of logits (rows, categories) is -inf throughout: `result` then has a NaN, as for NaN and inf.

    Looking for the NaN in one column of the result is cheaper than looking at all logits beforehand; and the sum of a
    column has it, for its numbers have one sign.
    """
    if result.numel() == 0 or not can_look_at(result):
        return
    column = result.detach().select(1, 0)
    if math.isnan(column.sum()) and can_look_at(logits):
        empty = column.isnan().nonzero()[:, 0]
        empty = empty[(logits.detach()[empty] == -torch.inf).all(-1)]
        if len(empty):
            raise ValueError(
                f"logits must have a category above -inf in every row, got {len(empty)} rows of -inf alone, "
                f"the first is row {int(empty[0])}"
            )
