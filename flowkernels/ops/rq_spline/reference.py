"""rq_spline as a lecture writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkernels.transforms import LRSpline, Spline, spline_of_numbers


def elementwise(x: Tensor, parameters: Tensor, spline: Spline, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, log dy/dx) per element; parameters have one more dimension than x."""
    xs, ys, slopes = spline.knots(parameters)
    inside = (x >= -spline.bound) & (x <= spline.bound)
    # Outside, the formula sees a harmless number, so that no NaN of it comes back through `where`.
    v = torch.where(inside, x, 0.0)[..., None]
    edges = ys if inverse else xs
    k = (v >= edges[..., 1:-1]).sum(-1, keepdim=True)

    x0, y0, d0 = (t.gather(-1, k) for t in (xs, ys, slopes))
    x1, y1, d1 = (t.gather(-1, k + 1) for t in (xs, ys, slopes))
    w, h = x1 - x0, y1 - y0
    s = h / w
    along = (v - y0) / h if inverse else (v - x0) / w
    if isinstance(spline, LRSpline):
        theta, eta, slope = _linear(along, s, d0, d1, spline.lambdas(parameters).gather(-1, k), inverse)
    else:
        theta, eta, slope = _quadratic(along, s, d0, d1, inverse)
    y = x0 + w * theta if inverse else y0 + h * eta
    logdet = -slope.log() if inverse else slope.log()
    return torch.where(inside, y[..., 0], x), torch.where(inside, logdet[..., 0], 0.0)


def _quadratic(along: Tensor, s: Tensor, d0: Tensor, d1: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(theta, eta, dy/dx): where in its bin a value lies, horizontally and vertically; one of them is `along`."""
    if inverse:
        # eta = (s theta^2 + d0 theta (1 - theta)) / (s + (d0 + d1 - 2 s) theta (1 - theta)) solved for theta. The
        # discriminant is a sum of squares, and neither form of the root subtracts.
        eta = along.clamp(0, 1)
        m = d0 * (1 - eta) - d1 * eta
        b = m + 2 * s * eta
        root = (m * m + 4 * s * s * eta * (1 - eta)).sqrt()
        theta = torch.where(b >= 0, 2 * s * eta / (b.abs() + root), (b.abs() + root) / (2 * (s + b.abs())))
    else:
        theta = along
    theta = theta.clamp(0, 1)
    t = theta * (1 - theta)
    denominator = s + (d0 + d1 - 2 * s) * t
    eta = (s * theta**2 + d0 * t) / denominator
    slope = s * ((d1 * theta**2 + 2 * s * t + d0 * (1 - theta) ** 2) / denominator) * (s / denominator)
    return theta, eta, slope


def _linear(
    along: Tensor, s: Tensor, d0: Tensor, d1: Tensor, at: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the two linear-rational pieces of a bin that meet at `at`, lambda."""
    along = along.clamp(0, 1)
    g0, g1 = d0.sqrt(), d1.sqrt()
    q = at * g0 + (1 - at) * g1
    left = along * q <= at * g0 if inverse else along <= at
    # The right piece is the left one seen from the other end.
    lam, g = torch.where(left, at, 1 - at), torch.where(left, g0, g1)
    here = torch.where(left, along, 1 - along)
    t = here * s * lam / (here * s + g * (lam * g - here * q)) if inverse else here
    denominator = s * (lam - t) + g * q * t
    e = lam * g**2 * t / denominator
    slope = (s * lam * g / denominator) ** 2
    return torch.where(left, t, 1 - t), torch.where(left, e, 1 - e), slope


def rq_spline(
    x: Tensor,
    parameters: Tensor,
    logdet: Tensor | None,
    bins: int,
    style: int,
    numbers: list[float],
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    y, ld = elementwise(x, parameters, spline_of_numbers(bins, style, numbers), inverse)
    total = ld.sum(-1)
    return y, total if logdet is None else logdet + total


def rq_spline_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    parameters: Tensor,
    bins: int,
    style: int,
    numbers: list[float],
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_parameters), by autograd through the formula above; the kernels have it written out."""
    with torch.enable_grad():
        x, parameters = x.detach().requires_grad_(), parameters.detach().requires_grad_()
        y, ld = elementwise(x, parameters, spline_of_numbers(bins, style, numbers), inverse)
        outputs = (y, ld), (grad_y, grad_logdet[:, None].expand_as(ld))
        grad_x, grad_parameters = torch.autograd.grad(*outputs[:1], (x, parameters), *outputs[1:])
    return grad_x, grad_parameters
