"""Relaxed and straight-through samples of a categorical distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_float_tensor
from flowkernels._library import needs_grad
from flowkernels.ops._categorical import can_look_at, check_dim, check_rows, rows_back, rows_of, shape_without
from flowkernels.ops.gumbel_softmax import reference
from flowkernels.ops.gumbel_softmax.autograd import GumbelSoftmax, forward_op
from flowkernels.random import Seed, draw_stream

__all__ = ["gumbel_softmax"]


def gumbel_softmax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    *,
    seed: Seed = None,
    eps: float | None = None,
) -> Tensor:
    r"""Samples of the Gumbel-softmax (concrete) distribution; a drop-in for `torch.nn.functional.gumbel_softmax`.

    With g independent standard Gumbel noise (`flowkernels.random`)::

        y = softmax((logits + g) / tau)                            hard=False
        y = one_hot(argmax(logits + g)) forward, soft backward     hard=True

    and dL/dlogits = (y / tau) (dy - sum y dy) in both cases. The argmax of y is an exact sample of softmax(logits).
    Noise is drawn where it is used and never stored; neither is it needed by the gradient.

    Args:
        logits: float64, float32, bfloat16 or float16, any shape; halves are calculated in float32. -inf is a category
            that is never drawn.
        tau: the temperature, > 0: a number, or a tensor with one temperature per row, which may have a gradient:
            broadcastable to logits with `dim` of size 1 (as many dimensions as logits) or left out (fewer).
        hard: exactly one-hot values with the gradient of the soft ones (straight-through).
        dim: the dimension of the categories.
        seed: see `flowkernels.random.draw_stream`; None draws from torch's generator. Element e of the noise belongs
            to element e of logits with `dim` moved to the end.
        eps: torch has this argument and ignores it; so it is here.

    Returns:
        y, in logits' shape and dtype.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be. Values (tau <= 0 or NaN in a tensor, a
            row of -inf alone) are looked at only where that waits for no device and breaks no trace: on the CPU,
            outside of torch.compile and torch.func. Elsewhere a row of -inf becomes NaN.

    Sources: Jang et al. 2017, arXiv:1611.01144; Maddison et al. 2017, arXiv:1611.00712.
    """
    check_float_tensor("logits", logits)
    dim = check_dim(logits, dim)
    rows = rows_of(logits, dim, COMPUTE_DTYPE[logits.dtype])
    temperatures = _tau_rows(tau, logits, dim, rows)
    source = draw_stream(seed, logits.device)
    args = (rows, temperatures, source.seed, source.number, bool(hard))
    if runs_reference(logits, "gumbel_softmax"):
        y = reference.gumbel_softmax(*args)
    elif needs_grad(rows, temperatures):
        y = GumbelSoftmax.apply(*args)
    else:
        y = forward_op(*args)
    check_rows(rows, y)
    return rows_back(y, logits, dim, logits.dtype)


def _tau_rows(tau: float | Tensor, logits: Tensor, dim: int, rows: Tensor) -> Tensor:
    """tau as one temperature per row, (rows,), in the dtype of `rows`."""
    if not isinstance(tau, Tensor):
        if isinstance(tau, bool) or not isinstance(tau, (int, float)):
            raise TypeError(f"tau must be a number or a tensor, got {type(tau).__name__}")
        if not 0 < tau < math.inf:
            raise ValueError(f"tau must be positive and finite, got {tau}")
        return torch.full((1,), float(tau), dtype=rows.dtype, device=rows.device).expand(rows.shape[0])
    check_float_tensor("tau", tau)
    if tau.device != logits.device and tau.dim() > 0:
        raise ValueError(f"tau is on {tau.device}, but logits is on {logits.device}: use one device")
    per_row = tau.to(logits.device)
    if tau.dim() == logits.dim():
        if tau.shape[dim] != 1:
            raise ValueError(f"tau must have size 1 in dimension {dim}, the categories, got shape {tuple(tau.shape)}")
        per_row = per_row.squeeze(dim)
    shape = shape_without(logits, dim)
    try:
        per_row = per_row.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"tau must broadcast to one temperature per row, {tuple(shape)}, got shape {tuple(tau.shape)}"
        ) from None
    if tau.numel() > 0 and can_look_at(tau):
        low, high = (bound.item() for bound in torch.aminmax(tau.detach()))
        if not (low > 0 and high < math.inf):  # as for a NaN, which is both
            bad = tau[~((tau > 0) & tau.isfinite())]
            raise ValueError(f"tau must be positive and finite, got {bad[0].item()}")
    return per_row.reshape(-1).to(rows.dtype)
