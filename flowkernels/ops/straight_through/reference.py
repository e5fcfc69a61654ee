"""straight_through as a lecture writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkernels.random import KINDS, reference_noise

STRAIGHT_THROUGH_KINDS = ("threshold", "categorical")


def straight_through(x: Tensor, seed: Tensor | None, stream: int, kind: int, threshold: float) -> Tensor:
    def noise(name: str) -> Tensor:
        assert seed is not None
        in_double = x.dtype == torch.float64
        return reference_noise(seed, stream, 0, x.numel(), KINDS.index(name), in_double).reshape(x.shape)

    if STRAIGHT_THROUGH_KINDS[kind] == "threshold":
        level = threshold if seed is None else noise("uniform")
        return torch.where(x.isnan(), x, (x > level).to(x.dtype))
    score = x if seed is None else x.log() + noise("gumbel")
    if x.numel() == 0:
        return torch.zeros_like(x)
    best, index = score.max(-1, keepdim=True)
    one_hot = torch.zeros_like(x).scatter_(-1, index, 1.0)
    improper = best.isnan() if seed is None else ~best.isfinite()
    return torch.where(improper, torch.nan, one_hot)
