"""From grey levels to continuous numbers, with the log-det that likelihoods of images need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_float_tensor, check_shape
from flowkernels._library import needs_grad
from flowkernels.ops.dequantize import reference
from flowkernels.ops.dequantize.autograd import Dequantize, forward_op
from flowkernels.random import Seed, draw_stream

__all__ = ["bits_per_dim", "dequantize"]


def dequantize(
    x: Tensor,
    levels: int = 256,
    *,
    noise: Tensor | None = None,
    logit: bool = True,
    margin: float = 1e-6,
    seed: Seed = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Adds noise to grey levels and takes the logit, in one pass; with the log-det.

    ::

        p      = margin + (1 - 2 margin) (x + noise) / levels
        y      = log p - log(1 - p)                     without `logit`:  y = (x + noise) / levels
        logdet = sum_i log dy_i/dx_i over the features

    With uniform noise ``log density(y) + logdet`` is in the mean a lower bound of ``log P(x)``; with noise from a
    density q, less ``log q(noise | x)``, it is the bound of variational dequantization.

    Args:
        x: (..., D) grey levels 0 to levels - 1, uint8 or any other integers or floats that hold whole numbers.
        levels: how many there are.
        noise: (..., D) in [0, 1], differentiable; drawn uniformly if left out.
        margin: keeps p away from 0 and 1, in [0, 1/2).
        seed: of the noise, see `flowkernels.random.draw_stream`.
        dtype: of y, float32 or float64; noise's, x's if it is one of the two, or float32.

    Returns:
        y (..., D) and logdet (...) in nats.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be; grey levels outside of 0 to
            levels - 1.

    Sources: Theis et al. 2016, arXiv:1511.01844; Ho et al. 2019 (Flow++), arXiv:1902.00275; the logit: Dinh et al.
    2017, arXiv:1605.08803.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"x must hold grey levels as integers or floats, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, the features, got a scalar")
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"levels must be an int, got {type(levels).__name__}")
    if not 2 <= levels <= 65536:
        raise ValueError(f"levels must be 2 to 65536, got {levels}")
    if not 0 <= margin < 0.5:
        raise ValueError(f"margin must be in [0, 1/2), got {margin}")
    if noise is not None:
        check_float_tensor("noise", noise)
        check_shape("noise", noise, tuple(x.shape), "as x")
        if noise.device != x.device:
            raise ValueError(f"noise is on {noise.device}, but x is on {x.device}: use one device")
        dtype = noise.dtype if dtype is None else dtype
    if dtype is None:
        dtype = x.dtype if x.is_floating_point() else torch.float32
    if dtype not in COMPUTE_DTYPE:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    _check_levels(x, levels)
    compute = COMPUTE_DTYPE[dtype]
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    rows = rows if rows.dtype == torch.uint8 else rows.to(compute)
    given = None if noise is None else noise.to(compute).reshape(rows.shape)
    source = draw_stream(0 if noise is not None else seed, x.device)
    args = (rows, given, source.seed, source.number, levels, bool(logit), float(margin), compute == torch.float64)
    if runs_reference(x):
        y, logdet = reference.dequantize(*args)
    elif needs_grad(noise):
        y, logdet = Dequantize.apply(*args)
    else:
        y, logdet = forward_op(*args)
    return y.reshape(x.shape).to(dtype), logdet.reshape(x.shape[:-1])


def _check_levels(x: Tensor, levels: int) -> None:
    """Looks at the values, unless there are none to look at: torch.compile and torch.func."""
    if x.numel() == 0 or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return
    if x.dtype == torch.uint8 and levels >= 256:
        return
    low, high = torch.aminmax(x)
    if not (low >= 0 and high <= levels - 1):
        raise ValueError(f"x must hold grey levels 0 to {levels - 1}, got values from {low.item()} to {high.item()}")


def bits_per_dim(log_prob: Tensor, features: int) -> Tensor:
    """``-log_prob / (features log 2)``: bits per dimension from log-probabilities in nats.

    For images `log_prob` must be that of the grey levels: a density of dequantized values plus `dequantize`'s
    log-det.
    """
    check_float_tensor("log_prob", log_prob)
    if isinstance(features, bool) or not isinstance(features, int) or features < 1:
        raise ValueError(f"features must be an integer >= 1, got {features!r}")
    return -log_prob / (features * math.log(2))
