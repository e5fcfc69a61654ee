"""actnorm: a shift and a scale per channel and their log-det, bound by memory."""

from __future__ import annotations

import torch
from torch import Tensor

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


def plain(x: Tensor, shift: Tensor, log_scale: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    values = x.unflatten(1, (shift.shape[0], -1))
    t, u = shift[:, None], log_scale[:, None]
    y = values * torch.exp(-u) - t if inverse else (values + t) * torch.exp(u)
    logdet = values.shape[2] * log_scale.sum()
    return y.flatten(1), (-logdet if inverse else logdet).expand(x.shape[0])


def _inputs(rows: int, channels: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels * positions, generator=g)
    return x, torch.randn(channels, generator=g), 0.3 * torch.randn(channels, generator=g)


def _once(inverse: bool, rows: int, channels: int, positions: int, options: Options) -> Problem:
    given = _inputs(rows, channels, positions)
    fused = compiled(plain)
    variants = [
        Variant("flowkernels", OURS, lambda: ops.actnorm(*given, inverse=inverse)),
        Variant("PyTorch", PLAIN, lambda: plain(*given, inverse)),
        Variant("torch.compile", COMPILED, lambda: fused(*given, inverse)),
    ]
    if options.wants(PEER, "normflows") and peer("normflows") is not None:
        # normflows has y = x exp(s) + t, so t is shift exp(s); a side of 1 by positions for the image.
        layer = peer("normflows.flows").AffineConstFlow((channels, 1, 1))
        with torch.no_grad():
            layer.s.copy_(given[2][None, :, None, None])
            layer.t.copy_((given[1] * given[2].exp())[None, :, None, None])
        call = layer.inverse if inverse else layer

        def normflows() -> tuple[Tensor, Tensor]:
            y, logdet = call(given[0].view(rows, channels, 1, positions))
            return y.flatten(1), logdet.expand(rows)

        variants.append(Variant("normflows", PEER, normflows))
    return Problem(
        variants,
        lambda: plain(given[0].double(), given[1].double(), given[2].double(), inverse),
        bytes=4.0 * (2 * given[0].numel() + rows),
        least=1.0,
    )


def _both(rows: int, channels: int, positions: int, options: Options) -> Problem:
    given = _inputs(rows, channels, positions)
    step = with_gradients(given)
    fused = compiled(plain)
    return Problem(
        [
            Variant("flowkernels", OURS, lambda: step(ops.actnorm)),
            Variant("PyTorch", PLAIN, lambda: step(plain)),
            Variant("torch.compile", COMPILED, lambda: step(fused)),
        ],
        lambda: with_gradients(given, dtype=torch.float64)(plain),
        # Forward: one in, one out. Backward: grad_y and y in, one gradient out.
        bytes=4.0 * 5 * given[0].numel(),
        grad=True,
        least=1.0,
    )


def cases(quick: bool) -> list[Case]:
    sizes = [(128, 8, 16)] if quick else [(128, 8, 16), (256, 48, 256), (65536, 256, 1)]
    return [
        case
        for rows, channels, positions in sizes
        for case in both_ways("actnorm", {"N": rows, "C": channels, "positions": positions}, _once, _both)
    ]
