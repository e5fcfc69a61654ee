"""straight_through beside the lines that it replaces, hard - x.detach() + x: bound by memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.core import COMPILED, OURS, PLAIN, Case, Options, Problem, Variant, compiled
from flowkernels import ops


def threshold(x: Tensor) -> Tensor:
    return (x > 0.5).to(x.dtype) - x.detach() + x


def categorical(x: Tensor) -> Tensor:
    hard = torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)
    return hard - x.detach() + x


PLAIN_OF = {"threshold": threshold, "categorical": categorical}


def _problem(kind: str, rows: int, classes: int, options: Options) -> Problem:
    x = torch.rand(rows, classes, generator=torch.Generator().manual_seed(0))
    plain, fused = PLAIN_OF[kind], compiled(PLAIN_OF[kind])
    return Problem(
        [
            Variant("flowkernels", OURS, lambda: ops.straight_through(x, kind)),
            Variant("PyTorch", PLAIN, lambda: plain(x)),
            Variant("torch.compile", COMPILED, lambda: fused(x)),
        ],
        lambda: [plain(x.double()).round()],
        bytes=4.0 * 2 * x.numel(),
    )


def cases(quick: bool) -> list[Case]:
    sizes = [(1, 8), (512, 64)] if quick else [(1, 10), (512, 64), (65536, 256)]
    return [
        Case("straight_through", kind, {"N": n, "D": d}, partial(_problem, kind, n, d))
        for n, d in sizes
        for kind in PLAIN_OF
    ]
