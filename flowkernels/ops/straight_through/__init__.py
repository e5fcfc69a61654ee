"""Hard values whose gradient is that of the soft ones."""

from __future__ import annotations

import math

from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_choice, check_float_tensor
from flowkernels._library import needs_grad
from flowkernels.ops._categorical import check_dim, rows_back, rows_of
from flowkernels.ops.straight_through import reference
from flowkernels.ops.straight_through.autograd import StraightThrough, forward_op
from flowkernels.ops.straight_through.reference import STRAIGHT_THROUGH_KINDS
from flowkernels.random import Seed, draw_stream

__all__ = ["straight_through"]


def straight_through(
    x: Tensor,
    kind: str = "threshold",
    *,
    threshold: float = 0.5,
    sample: bool = False,
    dim: int = -1,
    seed: Seed = None,
) -> Tensor:
    r"""Hard values forward, the identity backward: dL/dx = dL/dy.

    ::

        kind="threshold"    y = 1 where x > threshold, else 0
                            sample: y ~ Bernoulli(x)
        kind="categorical"  y = one_hot(argmax x) over `dim`
                            sample: y ~ Categorical(x), x the probabilities (or anything proportional to them)

    The value is exact, where ``hard - x.detach() + x`` is off by a rounding.

    Args:
        x: float64, float32, bfloat16 or float16, any shape.
        kind: threshold or categorical.
        threshold: for kind threshold without `sample`.
        sample: draw instead of rounding; x then holds probabilities.
        dim: the dimension of the categories, for kind categorical.
        seed: see `flowkernels.random.draw_stream`, for `sample`.

    Returns:
        y in x's shape and dtype: zeros and ones; NaN where x is NaN, or in a row that has no distribution.

    Source: Bengio et al. 2013, arXiv:1308.3432.
    """
    check_float_tensor("x", x)
    check_choice("kind", kind, STRAIGHT_THROUGH_KINDS)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or math.isnan(threshold):
        raise ValueError(f"threshold must be a number, got {threshold!r}")
    dtype = COMPUTE_DTYPE[x.dtype]
    if kind == "categorical":
        dim = check_dim(x, dim, "x")
        if x.shape[dim] == 0:
            raise ValueError(f"x must have a category in dimension {dim}, got shape {tuple(x.shape)}")
        rows = rows_of(x, dim, dtype)
    else:
        rows = (x.reshape(1, -1) if x.dim() < 2 else x.reshape(x.shape[0], x.shape[1:].numel())).to(dtype)
    source = draw_stream(seed, x.device) if sample else None
    args = (
        rows,
        source.seed if source else None,
        source.number if source else 0,
        STRAIGHT_THROUGH_KINDS.index(kind),
        float(threshold),
    )
    op = reference.straight_through if runs_reference(x) else forward_op
    y = StraightThrough.apply(op, *args) if needs_grad(rows) else op(*args)
    return rows_back(y, x, dim, x.dtype) if kind == "categorical" else y.to(x.dtype).reshape(x.shape)
