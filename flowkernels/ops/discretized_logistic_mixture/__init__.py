"""The likelihood of grey levels under a mixture of logistic distributions, with its edge bins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkernels._checks import check_float_tensor

__all__ = ["discretized_logistic_mixture"]


def discretized_logistic_mixture(
    x: Tensor, parameters: Tensor, *, levels: int = 256, min_log_scale: float = -7.0
) -> Tensor:
    r"""log P of every grey level: the mass that a mixture of logistics has in the level's bin.

    Level x stands for ``v = 2 x / (levels - 1) - 1`` in [-1, 1] and owns the bin ``v - 1 / (levels - 1)`` to
    ``v + 1 / (levels - 1)``; the bins of the first and the last level reach to infinity, so the masses of all
    levels sum to 1. With a and b the bin's ends in units of a component's scale, its mass is exactly
    ``sigmoid(a) sigmoid(-b) (1 - exp(b - a))``: nothing cancels, and no mass is ever cut off.

    Args:
        x: (...) grey levels 0 to levels - 1, integers or floats that hold whole numbers.
        parameters: (..., 3 K): K logits of the weights, K means and K logarithms of scales, in units of v.
        levels: how many. min_log_scale: smaller logarithms of scales are raised to it.

    Returns:
        (...) log-probabilities in nats.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be; grey levels outside of 0 to
            levels - 1.

    Source: Salimans et al. 2017 (PixelCNN++), arXiv:1701.05517.
    """
    check_float_tensor("parameters", parameters)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an integer >= 2, got {levels!r}")
    if parameters.dim() < 1 or parameters.shape[-1] % 3 or parameters.shape[-1] == 0:
        raise ValueError(f"parameters must have 3 K numbers in the last dimension, got shape {tuple(parameters.shape)}")
    if parameters.shape[:-1] != x.shape:
        raise ValueError(
            f"parameters must have shape (*{tuple(x.shape)}, 3 K), x's shape and K components, "
            f"got {tuple(parameters.shape)}"
        )
    if x.numel() and not torch.compiler.is_compiling():
        low, high = torch.aminmax(x)
        if not (low >= 0 and high <= levels - 1):
            span = f"{low.item()} to {high.item()}"
            raise ValueError(f"x must hold grey levels 0 to {levels - 1}, got values from {span}")
    logits, means, log_scales = parameters.chunk(3, dim=-1)
    half = 1.0 / (levels - 1)
    level = x.to(parameters.dtype)[..., None]
    v = 2 * half * level - 1
    rate = (-log_scales.clamp(min=min_log_scale)).exp()
    upper, lower = (v + half - means) * rate, (v - half - means) * rate
    width = 2 * half * rate
    # log(1 - exp(-width)): expm1 where the width is small, log1p where it is large; each sees safe numbers only.
    small = width < 0.7
    log_width = torch.where(
        small,
        (-torch.expm1(-torch.where(small, width, 0.5))).log(),
        torch.log1p(-torch.exp(-torch.where(small, 1.0, width))),
    )
    below = torch.where(
        level < levels - 1, F.logsigmoid(upper), 0.0
    )  # of the last level: everything lies below infinity
    above = torch.where(level > 0, F.logsigmoid(-lower), 0.0)
    inner = (level > 0) & (level < levels - 1)
    mass = below + above + torch.where(inner, log_width, 0.0)
    return torch.logsumexp(torch.log_softmax(logits, dim=-1) + mass, dim=-1)
