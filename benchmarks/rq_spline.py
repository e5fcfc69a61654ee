"""rq_spline: a monotonic rational spline of every element and its log-det, beside the library of its style."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.core import (
    COMPILED,
    OURS,
    PEER,
    PLAIN,
    Case,
    Options,
    Problem,
    Variant,
    both_ways,
    compiled,
    peer,
    with_gradients,
)
from flowkernels import ops
from flowkernels.ops.rq_spline.reference import rq_spline as plain
from flowkernels.transforms import LRSpline, RQSpline, Spline


def _inputs(rows: int, features: int, spline: Spline) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=g)
    return x, 0.5 * torch.randn(rows, features, spline.params_per_feature, generator=g)


def _nflows(x: Tensor, theta: Tensor, spline: Spline, inverse: bool) -> tuple[Tensor, Tensor]:
    function: Any = peer("nflows.transforms.splines.rational_quadratic").unconstrained_rational_quadratic_spline
    k = spline.bins
    y, logdet = function(x, *theta.split([k, k, k - 1], -1), inverse=inverse, tail_bound=spline.bound)
    return y, logdet.sum(-1)


def _zuko(x: Tensor, theta: Tensor, spline: Spline, inverse: bool) -> tuple[Tensor, Tensor]:
    k = spline.bins
    transform: Any = peer("zuko.transforms").MonotonicRQSTransform(*theta.split([k, k, k - 1], -1), bound=spline.bound)
    if not inverse:
        y, logdet = transform.call_and_ladj(x)
        return y, logdet.sum(-1)
    y = transform.inv(x)
    return y, -transform.log_abs_det_jacobian(y, x).sum(-1)


def _pyro(x: Tensor, theta: Tensor, spline: Spline, inverse: bool) -> tuple[Tensor, Tensor]:
    function: Any = peer("pyro.distributions.transforms.spline")._monotonic_rational_spline
    k = spline.bins
    widths, heights, slopes, *rest = theta.split([k, k, k - 1, *[k] * isinstance(spline, LRSpline)], -1)
    shares = (widths.softmax(-1), heights.softmax(-1), softplus(slopes), *(u.sigmoid() for u in rest))
    # Values less than eps above a knot would count to the bin below it: there the gradient of the log-det is another.
    y, logdet = function(x, *shares, inverse=inverse, bound=spline.bound, eps=0.0)
    return y, logdet.sum(-1)


# By the style: the library that has it, and how it is called there.
PEERS: dict[str, tuple[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    "nflows": ("nflows", _nflows),
    "zuko": ("zuko", _zuko),
    "pyro": ("pyro", _pyro),
    "linear": ("pyro", _pyro),
}


def _spline(style: str, bins: int) -> Spline:
    return LRSpline(bins) if style == "linear" else RQSpline(style, bins)


def _once(inverse: bool, style: str, bins: int, rows: int, features: int, options: Options) -> Problem:
    spline = _spline(style, bins)
    x, theta = _inputs(rows, features, spline)
    arguments = (None, bins, spline.code, spline.numbers, inverse)
    fused = compiled(plain)
    variants = [
        Variant("flowkernels", OURS, lambda: ops.rq_spline(x, theta, spline=spline, inverse=inverse)),
        Variant("PyTorch", PLAIN, lambda: plain(x, theta, *arguments)),
        Variant("torch.compile", COMPILED, lambda: fused(x, theta, *arguments)),
    ]
    name, theirs = PEERS[style]
    if options.wants(PEER, name) and peer(name) is not None:
        variants.append(Variant(name, PEER, lambda: theirs(x, theta, spline, inverse)))
    return Problem(
        variants,
        lambda: plain(x.double(), theta.double(), *arguments),
        bytes=4.0 * (theta.numel() + 2 * x.numel() + rows),
        least=1.0,
    )


def _both(style: str, bins: int, rows: int, features: int, options: Options) -> Problem:
    spline = _spline(style, bins)
    given = _inputs(rows, features, spline)
    step = with_gradients(given)

    def reference(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return plain(x, theta, None, bins, spline.code, spline.numbers, False)

    variants = [
        Variant("flowkernels", OURS, lambda: step(partial(ops.rq_spline, spline=spline))),
        Variant("PyTorch", PLAIN, lambda: step(reference)),
    ]
    name, theirs = PEERS[style]
    if options.wants(PEER, name) and peer(name) is not None:
        call = partial(theirs, spline=spline, inverse=False)
        variants.append(Variant(name, PEER, lambda: step(call)))
    return Problem(
        variants,
        lambda: with_gradients(given, dtype=torch.float64)(reference),
        bytes=4.0 * (3 * given[1].numel() + 5 * given[0].numel()),
        grad=True,
        least=1.0,
    )


def cases(quick: bool) -> list[Case]:
    found: list[Case] = []
    for rows, features in [(100, 8)] if quick else [(1, 8), (100, 64), (4096, 64)]:
        for style in PEERS:
            size: dict[str, int | str] = {"style": style, "K": 8, "N": rows, "D": features}
            found += both_ways("rq_spline", size, _once, _both)
    return found
