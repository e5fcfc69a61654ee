"""logistic_mixture: Flow++'s transform and its inverse, beside plain PyTorch with 200 bisections."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.core import COMPILED, OURS, PLAIN, Case, Options, Problem, Variant, compiled
from flowkernels import ops
from flowkernels.ops.logistic_mixture.reference import logistic_mixture as plain
from flowkernels.scales import ScaleLaw


def _once(inverse: bool, rows: int, features: int, components: int, options: Options) -> Problem:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=g)
    theta = 0.5 * torch.randn(rows, features, 3 * components + 2, generator=g)
    law = ScaleLaw("tanh")
    arguments = (None, -7.0, law.code, law.numbers, inverse)
    variants = [
        Variant("flowkernels", OURS, lambda: ops.logistic_mixture(x, theta, inverse=inverse)),
        Variant("PyTorch", PLAIN, lambda: plain(x, theta, *arguments)),
    ]
    if not inverse:
        fused = compiled(plain)
        variants.append(Variant("torch.compile", COMPILED, lambda: fused(x, theta, *arguments)))
    return Problem(
        variants,
        lambda: plain(x.double(), theta.double(), *arguments),
        bytes=4.0 * (theta.numel() + 2 * x.numel() + rows),
        least=1.0,
    )


def cases(quick: bool) -> list[Case]:
    found = []
    for rows, features in [(100, 8)] if quick else [(100, 64), (4096, 64)]:
        size: dict[str, int | str] = {"K": 8, "N": rows, "D": features}
        found += [
            Case("logistic_mixture", "forward", size, partial(_once, False, rows, features, 8)),
            Case("logistic_mixture", "inverse", size, partial(_once, True, rows, features, 8)),
        ]
    return found
