"""vector_quantize and nearest_code beside cdist(x, codebook).argmin(-1): bound by arithmetic, 2 N K D operations.

Checked is the distance to the code that was chosen, against the smallest there is.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.core import OURS, PLAIN, RIVAL, Case, Options, Problem, Variant
from flowkernels import ops


def _problem(what: str, vectors: int, codes: int, features: int, options: Options) -> Problem:
    g = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(vectors, features, generator=g), torch.randn(codes, features, generator=g)

    def truth() -> list[Tensor]:
        pieces = x.double().split(4096)
        return [torch.cat([torch.cdist(p, codebook.double()).amin(-1) for p in pieces])]

    def distance(index: Tensor) -> list[Tensor]:
        return [(x - codebook[index]).norm(dim=-1)]

    def search(x: Tensor) -> Tensor:
        """The distances that argmin needs, without the sample's own norm and the root."""
        return torch.addmm(codebook.square().sum(-1), x, codebook.T, alpha=-2).argmin(-1)

    def ours() -> Tensor:
        return ops.nearest_code(x, codebook) if what == "search" else ops.vector_quantize(x, codebook).index

    return Problem(
        [
            Variant("flowkernels", OURS, ours, result=distance),
            Variant("PyTorch", PLAIN, lambda: torch.cdist(x, codebook).argmin(-1), result=distance),
            Variant("PyTorch, addmm", RIVAL, lambda: search(x), result=distance),
        ],
        truth,
        flops=2.0 * vectors * codes * features,
    )


def cases(quick: bool) -> list[Case]:
    sizes = [(64, 16, 4), (1000, 64, 16)] if quick else [(1, 512, 64), (4096, 512, 64), (65536, 1024, 64)]
    return [
        Case("vector_quantize", what, {"N": n, "K": k, "D": d}, partial(_problem, what, n, k, d))
        for n, k, d in sizes
        for what in ("search", "codes and loss")
    ]
