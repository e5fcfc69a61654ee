"""What the faces of the categorical operators share."""

from __future__ import annotations

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


def rows_of(x: Tensor, dim: int) -> Tensor:
    """x as (rows, categories), a view where strides allow it."""
    moved = x.movedim(dim, -1)
    return moved.reshape(moved.shape[:-1].numel(), moved.shape[-1])


def can_look_at(x: Tensor) -> bool:
    """Whether x's values may be looked at: neither traced nor mapped, nor on a device that has to be waited for."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x) and type(x) in (Tensor, torch.nn.Parameter)


def check_rows(logits: Tensor, result: Tensor) -> None:
    """Raises if a row of logits (rows, categories) is -inf throughout: `result` then has a NaN, as for NaN and inf.

    Looking for the NaN in one column of the result is cheaper than looking at all logits beforehand.
    """
    if result.numel() == 0 or not can_look_at(result) or not can_look_at(logits):
        return
    suspect = result.detach()[:, 0].isnan()
    if suspect.any():
        empty = suspect.nonzero()[:, 0]
        empty = empty[(logits.detach()[empty] == -torch.inf).all(-1)]
        if len(empty):
            raise ValueError(
                f"logits must have a category above -inf in every row, got {len(empty)} rows of -inf alone, "
                f"the first is row {int(empty[0])}"
            )
