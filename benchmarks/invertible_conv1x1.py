"""invertible_conv1x1: a linear map of the channels of every position by its LU factors, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.core import (
    COMPILED,
    OURS,
    PEER,
    PLAIN,
    RIVAL,
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


def _factors(lower: Tensor, upper: Tensor, log_diagonal: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(len(sign), dtype=sign.dtype)
    return lower.tril(-1) + eye, upper.triu(1) + torch.diag(sign * log_diagonal.exp())


def forward(x: Tensor, lower: Tensor, upper: Tensor, d: Tensor, sign: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """As Glow has it: the matrix, then a convolution."""
    left, right = _factors(lower, upper, d, sign)
    values = x.unflatten(1, (len(sign), -1))
    y = torch.nn.functional.conv1d(values, (left @ right)[order][:, :, None])
    return y.flatten(1), (values.shape[2] * d.sum()).expand(len(x))


def _matmul(x: Tensor, lower: Tensor, upper: Tensor, d: Tensor, sign: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """A batched product in place of the convolution: faster for images, slower for vectors."""
    left, right = _factors(lower, upper, d, sign)
    values = x.unflatten(1, (len(sign), -1))
    return ((left @ right)[order] @ values).flatten(1), (values.shape[2] * d.sum()).expand(len(x))


def inverse(x: Tensor, lower: Tensor, upper: Tensor, d: Tensor, sign: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    left, right = _factors(lower, upper, d, sign)
    values = x.unflatten(1, (len(sign), -1))
    columns = values.transpose(0, 1).flatten(1)[order.argsort()]
    columns = torch.linalg.solve_triangular(left, columns, upper=False, unitriangular=True)
    columns = torch.linalg.solve_triangular(right, columns, upper=True)
    y = columns.unflatten(1, (len(x), -1)).transpose(0, 1)
    return y.flatten(1), -(values.shape[2] * d.sum()).expand(len(x))


def _inputs(rows: int, channels: int, positions: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    factors = [torch.randn(channels, channels, generator=g) / (2 * channels**0.5) for _ in range(2)]
    x, diagonal = torch.randn(rows, channels * positions, generator=g), 0.2 * torch.randn(channels, generator=g)
    return [x, *factors, diagonal, torch.ones(channels), torch.randperm(channels, generator=g)]


def _double(given: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in given]


def _once(backwards: bool, rows: int, channels: int, positions: int, options: Options) -> Problem:
    given = _inputs(rows, channels, positions)
    plain = inverse if backwards else forward
    fused = compiled(plain)
    variants = [
        Variant("flowkernels", OURS, lambda: ops.invertible_conv1x1(*given, inverse=backwards)),
        Variant("PyTorch", PLAIN, lambda: plain(*given)),
        Variant("torch.compile", COMPILED, lambda: fused(*given)),
    ]
    if not backwards:
        variants.append(Variant("PyTorch, matmul", RIVAL, lambda: _matmul(*given)))
    if options.wants(PEER, "normflows") and peer("normflows") is not None:
        # Its inverse direction is the one of a density.
        layer = peer("normflows.flows").Invertible1x1Conv(channels, use_lu=True)
        with torch.no_grad():
            layer.P.copy_(torch.eye(channels)[given[5]])
            for parameter, value in zip((layer.L, layer.U, layer.log_S), given[1:4], strict=True):
                parameter.copy_(value)
            layer.sign_S.copy_(given[4])
        call = layer if backwards else layer.inverse

        def normflows() -> tuple[Tensor, Tensor]:
            y, logdet = call(given[0].view(rows, channels, 1, positions))
            return y.flatten(1), logdet.expand(rows)

        variants.append(Variant("normflows", PEER, normflows))
    return Problem(
        variants,
        lambda: plain(*_double(given)),
        flops=2.0 * channels * given[0].numel(),
        bytes=4.0 * 2 * given[0].numel(),
        least=1.0,
    )


def _both(rows: int, channels: int, positions: int, options: Options) -> Problem:
    tensors = _inputs(rows, channels, positions)
    given, fixed = tensors[:4], tensors[4:]
    step = with_gradients(given, fixed)
    fused = compiled(forward)
    return Problem(
        [
            Variant("flowkernels", OURS, lambda: step(ops.invertible_conv1x1)),
            Variant("PyTorch", PLAIN, lambda: step(forward)),
            Variant("PyTorch, matmul", RIVAL, lambda: step(_matmul)),
            Variant("torch.compile", COMPILED, lambda: step(fused)),
        ],
        lambda: with_gradients(given, fixed, torch.float64)(forward),
        flops=6.0 * channels * given[0].numel(),
        bytes=4.0 * 5 * given[0].numel(),
        grad=True,
        least=1.0,
    )


def cases(quick: bool) -> list[Case]:
    sizes = [(128, 8, 4)] if quick else [(128, 8, 4), (64, 12, 256), (64, 48, 16), (4096, 64, 1)]
    return [
        case
        for rows, channels, positions in sizes
        for case in both_ways("invertible_conv1x1", {"N": rows, "C": channels, "positions": positions}, _once, _both)
    ]
