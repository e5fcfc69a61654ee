"""rq_spline: a rational-quadratic spline of every element and its log-det, beside nflows and zuko."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import COMPILED, OURS, PEER, PLAIN, Case, Options, Problem, Variant, compiled, peer
from flowkernels import ops
from flowkernels.ops.rq_spline.reference import rq_spline as plain
from flowkernels.transforms import RQSpline


def _inputs(rows: int, features: int, spline: RQSpline) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=g)
    return x, 0.5 * torch.randn(rows, features, spline.params_per_feature, generator=g)


def _nflows(x: Tensor, theta: Tensor, spline: RQSpline, inverse: bool) -> tuple[Tensor, Tensor]:
    function: Any = peer("nflows.transforms.splines.rational_quadratic").unconstrained_rational_quadratic_spline
    k = spline.bins
    y, logdet = function(x, *theta.split([k, k, k - 1], -1), inverse=inverse, tail_bound=spline.bound)
    return y, logdet.sum(-1)


def _zuko(x: Tensor, theta: Tensor, spline: RQSpline, inverse: bool) -> tuple[Tensor, Tensor]:
    k = spline.bins
    transform: Any = peer("zuko.transforms").MonotonicRQSTransform(*theta.split([k, k, k - 1], -1), bound=spline.bound)
    if not inverse:
        y, logdet = transform.call_and_ladj(x)
        return y, logdet.sum(-1)
    y = transform.inv(x)
    return y, -transform.log_abs_det_jacobian(y, x).sum(-1)


PEERS = {"nflows": _nflows, "zuko": _zuko}


def _once(style: str, inverse: bool, rows: int, features: int, bins: int, options: Options) -> Problem:
    spline = RQSpline(style, bins)
    x, theta = _inputs(rows, features, spline)
    arguments = (None, bins, spline.code, spline.numbers, inverse)
    fused = compiled(plain)
    variants = [
        Variant("flowkernels", OURS, lambda: ops.rq_spline(x, theta, spline=spline, inverse=inverse)),
        Variant("PyTorch", PLAIN, lambda: plain(x, theta, *arguments)),
        Variant("torch.compile", COMPILED, lambda: fused(x, theta, *arguments)),
    ]
    if options.wants(PEER, style) and peer(style) is not None:
        variants.append(Variant(style, PEER, lambda: PEERS[style](x, theta, spline, inverse)))
    return Problem(
        variants,
        lambda: plain(x.double(), theta.double(), *arguments),
        bytes=4.0 * (theta.numel() + 2 * x.numel() + rows),
        least=1.0,
    )


def _both(style: str, rows: int, features: int, bins: int, options: Options) -> Problem:
    spline = RQSpline(style, bins)
    given = _inputs(rows, features, spline)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(rows, features, generator=g), torch.randn(rows, generator=g)]

    def step(call: Any, leaves: list[Tensor]) -> list[Tensor]:
        y, logdet = call(*leaves)
        gradients = torch.autograd.grad([y, logdet], leaves, [c.to(y.dtype) for c in cotangents])
        return [y.detach(), logdet.detach(), *gradients]

    def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [t.to(dtype, copy=True).requires_grad_() for t in given]

    def reference(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return plain(x, theta, None, bins, spline.code, spline.numbers, False)

    shared = leaves()
    variants = [
        Variant("flowkernels", OURS, lambda: step(partial(ops.rq_spline, spline=spline), shared)),
        Variant("PyTorch", PLAIN, lambda: step(reference, shared)),
    ]
    if options.wants(PEER, style) and peer(style) is not None:
        call = partial(PEERS[style], spline=spline, inverse=False)
        variants.append(Variant(style, PEER, lambda: step(call, shared)))
    return Problem(
        variants,
        lambda: step(reference, leaves(torch.float64)),
        bytes=4.0 * (3 * given[1].numel() + 5 * given[0].numel()),
        grad=True,
        least=1.0,
    )


def cases(quick: bool) -> list[Case]:
    found = []
    for rows, features in [(100, 8)] if quick else [(1, 8), (100, 64), (4096, 64)]:
        for style in ("nflows", "zuko"):
            size: dict[str, int | str] = {"style": style, "K": 8, "N": rows, "D": features}
            found += [
                Case("rq_spline", "forward", size, partial(_once, style, False, rows, features, 8)),
                Case("rq_spline", "inverse", size, partial(_once, style, True, rows, features, 8)),
                Case("rq_spline", "forward+backward", size, partial(_both, style, rows, features, 8)),
            ]
    return found
