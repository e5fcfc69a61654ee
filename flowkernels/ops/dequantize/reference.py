"""dequantize as a lecture writes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkernels.random import reference_noise


def dequantize(
    x: Tensor,
    noise: Tensor | None,
    seed: Tensor,
    stream: int,
    levels: int,
    logit: bool,
    margin: float,
    in_double: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if in_double else torch.float32
    x = x.to(dtype)
    if noise is None:
        noise = reference_noise(seed, stream, 0, x.numel(), 1, in_double).reshape(x.shape)
    if not logit:
        y = (x + noise) / levels
        return y, y.new_full(x.shape[:1], -x.shape[1] * math.log(levels))
    p = margin + (1 - 2 * margin) * ((x + noise) / levels)
    q = margin + (1 - 2 * margin) * ((levels - 1 - x + (1 - noise)) / levels)
    logdet = math.log((1 - 2 * margin) / levels) - p.log() - q.log()
    return p.log() - q.log(), logdet.sum(-1)
