"""The monotonic rational splines of coupling and autoregressive flows, with their log-det."""

from __future__ import annotations

from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_float_tensor, check_logdet
from flowkernels._library import needs_grad
from flowkernels.ops.rq_spline import reference
from flowkernels.ops.rq_spline.autograd import RqSpline, forward_op
from flowkernels.transforms import Spline

__all__ = ["rq_spline"]


def rq_spline(
    x: Tensor,
    parameters: Tensor,
    *,
    spline: Spline,
    inverse: bool = False,
    logdet: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Monotonic rational spline of every element, linear outside its bounds, and the log-det, in one pass.

    Rational-quadratic, in the bin [x_k, x_k+1] of width w, height h, s = h / w and slopes d_k, d_k+1 at its knots, with
    theta = (x - x_k) / w and t = theta (1 - theta)::

        y      = y_k + h (s theta^2 + d_k t) / (s + (d_k + d_k+1 - 2 s) t)
        logdet = sum_i log dy_i/dx_i over the last dimension (its negative when `inverse`), in nats

    The inverse solves the quadratic with a discriminant that is a sum of squares and a root that subtracts
    nothing. The formula of an `LRSpline` stands in its docstring. Outside [-bound, bound] the transform is the
    identity, and the gradients of the parameters are zero.

    Args:
        x: (..., D), float64, float32, bfloat16 or float16; halves are calculated in float32.
        parameters: (..., D, 3 K - 1), broadcastable to x's shape and one more dimension: K widths, K heights,
            K - 1 slopes, and for an `LRSpline` K lambdas (4 K - 1 in all), unconstrained; same dtype and device.
            Strided views are read in place.
        spline: an `RQSpline` (bins, bounds and how the parameters are read: nflows', zuko's or Pyro's way) or an
            `LRSpline` (linear-rational, Pyro's default).
        inverse: transform y back to x.
        logdet: (...), a running log-det that this one is added to.

    Returns:
        y (..., D) in x's dtype and logdet (...) in at least float32.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be.

    Source: Durkan et al. 2019 (Neural Spline Flows), arXiv:1906.04032; Gregory & Delbourgo 1982; Dolatabadi et al.
    2020 (linear-rational), arXiv:2001.05168.
    """
    check_float_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, the features, got a scalar")
    if not isinstance(spline, Spline):
        raise TypeError(f"spline must be an RQSpline or an LRSpline, got {type(spline).__name__}")
    check_float_tensor("parameters", parameters, like=x)
    count = spline.params_per_feature
    if parameters.dim() < 1 or parameters.shape[-1] != count:
        kinds = (count + 1) // spline.bins
        raise ValueError(
            f"parameters must have {count} numbers per feature ({kinds} bins - 1 with bins={spline.bins}) in the last "
            f"dimension, got shape {tuple(parameters.shape)}"
        )
    full = (*x.shape, count)
    if parameters.shape != full:
        given = tuple(parameters.shape)
        fits = len(given) <= len(full) and all(a in (1, b) for a, b in zip(given[::-1], full[::-1], strict=False))
        if not fits:
            raise ValueError(f"parameters must broadcast to {full}, x's shape and the spline's parameters, got {given}")
        parameters = parameters.expand(full)
    dtype = COMPUTE_DTYPE[x.dtype]
    check_logdet(logdet, x)

    features = x.shape[-1]
    count_rows = x.shape[:-1].numel()
    rows = x.to(dtype).reshape(count_rows, features)
    theta = parameters.to(dtype).reshape(count_rows, features, count)
    running = None if logdet is None else logdet.to(dtype).reshape(count_rows)
    args = (rows, theta, running, spline.bins, spline.code, spline.numbers, inverse)
    if runs_reference(x):
        y, total = reference.rq_spline(*args)
    elif needs_grad(x, parameters, logdet):
        y, total = RqSpline.apply(*args)
    else:
        y, total = forward_op(*args)
    return y.reshape(x.shape).to(x.dtype), total.reshape(x.shape[:-1])
