"""dequantize: noise, logit and log-det of grey levels in one pass, with noise that is given and noise that is drawn."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from benchmarks.core import COMPILED, OURS, PLAIN, Case, Options, Problem, Variant, compiled
from flowkernels import ops

LEVELS, MARGIN = 256, 0.01


def plain(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    p = MARGIN + (1 - 2 * MARGIN) * (x + noise) / LEVELS
    below, above = p.log(), torch.log1p(-p)
    logdet = (math.log((1 - 2 * MARGIN) / LEVELS) - below - above).sum(-1)
    return below - above, logdet


def _given(rows: int, features: int, options: Options) -> Problem:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, LEVELS, (rows, features), generator=g).float()
    noise = torch.rand(rows, features, generator=g)
    fused = compiled(plain)
    return Problem(
        [
            Variant("flowkernels", OURS, lambda: ops.dequantize(x, LEVELS, noise=noise, margin=MARGIN)),
            Variant("PyTorch", PLAIN, lambda: plain(x, noise)),
            Variant("torch.compile", COMPILED, lambda: fused(x, noise)),
        ],
        lambda: plain(x.double(), noise.double()),
        bytes=4.0 * (3 * x.numel() + rows),
    )


def _drawn(rows: int, features: int, options: Options) -> Problem:
    """Noise drawn inside. It differs from call to call, so what is checked is the levels that come back."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, LEVELS, (rows, features), generator=g).to(torch.uint8)

    def levels(result: tuple[Tensor, Tensor]) -> list[Tensor]:
        p = (torch.sigmoid(result[0].double()) - MARGIN) / (1 - 2 * MARGIN)
        # Noise next to 0 or 1 may be rounded across the edge of a level: half a level is what tells right from wrong.
        return [(p * LEVELS - 0.5).sub(x).abs().le(0.51).double()]

    def eager() -> tuple[Tensor, Tensor]:
        values = x.float()
        return plain(values, torch.rand_like(values))

    return Problem(
        [
            Variant("flowkernels", OURS, lambda: ops.dequantize(x, LEVELS, margin=MARGIN), result=levels),
            Variant("PyTorch", PLAIN, eager, result=levels),
        ],
        lambda: [torch.ones(rows, features, dtype=torch.float64)],
        bytes=1.0 * x.numel() + 4.0 * (x.numel() + rows),
    )


def cases(quick: bool) -> list[Case]:
    found = []
    for rows, features in [(100, 64)] if quick else [(100, 784), (4096, 784), (65536, 256)]:
        size: dict[str, int | str] = {"N": rows, "D": features}
        found += [
            Case("dequantize", "noise given", size, partial(_given, rows, features)),
            Case("dequantize", "noise drawn", size, partial(_drawn, rows, features)),
        ]
    return found
