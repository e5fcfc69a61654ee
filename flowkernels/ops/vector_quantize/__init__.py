"""Vector quantization: the nearest code of every vector, and how codes follow their vectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_float_tensor, check_shape
from flowkernels._library import needs_grad
from flowkernels.ops._categorical import check_dim, rows_back, rows_of, shape_without
from flowkernels.ops.vector_quantize import reference
from flowkernels.ops.vector_quantize.autograd import VectorQuantize, forward_op, nearest_op, sums_op

__all__ = ["Quantized", "code_sums", "move_codes_", "nearest_code", "vector_quantize", "vector_quantize_ema_"]


class Quantized(NamedTuple):
    """What `vector_quantize` returns."""

    quantized: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks of three tensors
    loss: Tensor


def vector_quantize(
    x: Tensor, codebook: Tensor, *, commitment: float = 0.25, codebook_weight: float = 1.0, dim: int = -1
) -> Quantized:
    r"""Replaces every vector by its nearest code, e = codebook[argmin_k |x - codebook_k|]::

        quantized  e forward, the identity to x backward (straight-through)
        loss       codebook_weight |sg(x) - e|^2 + commitment |x - sg(e)|^2, sg = no gradient

    The N x K distances are never in memory: what is written is the result.

    Args:
        x: (..., D), float64, float32, bfloat16 or float16; halves are calculated in float32.
        codebook: (K, D), same dtype and device.
        commitment: how strongly the loss pulls x to its code; 0.25 in the paper.
        codebook_weight: how strongly it pulls the code to x; 0 where the codes follow by `vector_quantize_ema_`.
        dim: the dimension of the vectors' features, e.g. 1 for images (B, D, H, W).

    Returns:
        quantized (..., D) in x's dtype; index (...) int64, the first of equally near codes; loss (...) per vector,
        in at least float32.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be.

    Source: van den Oord et al. 2017, arXiv:1711.00937.
    """
    dim = _check(x, codebook, dim)
    for name, value in (("commitment", commitment), ("codebook_weight", codebook_weight)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    dtype = COMPUTE_DTYPE[x.dtype]
    rows, codes = rows_of(x, dim, dtype), codebook.to(dtype)
    weights = (float(commitment), float(codebook_weight))
    if runs_reference(x):
        index = reference.nearest_code(rows.detach(), codes.detach())
        quantized, loss = reference.straight_through_loss(rows, codes, index, *weights)
    elif needs_grad(rows, codes):
        quantized, index, loss = VectorQuantize.apply(rows, codes, *weights)
    else:
        quantized, index, distance = forward_op(rows, codes)
        loss = distance * sum(weights)
    shape = shape_without(x, dim)
    return Quantized(rows_back(quantized, x, dim, x.dtype), index.reshape(shape), loss.reshape(shape))


def nearest_code(x: Tensor, codebook: Tensor, *, dim: int = -1) -> Tensor:
    """The index of the nearest code alone, (...) int64, for encoding: `vector_quantize` without quantized and loss."""
    dim = _check(x, codebook, dim)
    dtype = COMPUTE_DTYPE[x.dtype]
    rows, codes = rows_of(x.detach(), dim, dtype), codebook.detach().to(dtype)
    index = (reference.nearest_code if runs_reference(x) else nearest_op)(rows, codes)
    return index.reshape(shape_without(x, dim))


def _check(x: Tensor, codebook: Tensor, dim: int) -> int:
    check_float_tensor("x", x)
    check_float_tensor("codebook", codebook, like=x)
    dim = check_dim(x, dim, "x")
    if codebook.dim() != 2 or codebook.shape[0] < 1:
        raise ValueError(f"codebook must have shape (codes >= 1, features), got {tuple(codebook.shape)}")
    check_shape(
        "codebook",
        codebook,
        (codebook.shape[0], x.shape[dim]),
        f"one row per code, x's size in dimension {dim}",
    )
    return dim


def code_sums(x: Tensor, index: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """The sum (codes, D) and the number (codes,) of the vectors x (N, D) of each code, in their order; no gradient."""
    check_float_tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape (vectors, features), got {tuple(x.shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    check_shape("index", index, (x.shape[0],), "one code per vector")
    if codes < 1:
        raise ValueError(f"codes must be at least 1, got {codes}")
    op = reference.vector_quantize_sums if runs_reference(x) else sums_op
    return op(x.detach().to(COMPUTE_DTYPE[x.dtype]), index, codes)


@torch.no_grad()
def vector_quantize_ema_(
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    x: Tensor,
    index: Tensor,
    *,
    decay: float = 0.99,
    epsilon: float = 1e-5,
) -> None:
    """Moves every code towards the mean of its vectors, in place: an exponential moving average of counts and sums::

        counts <- decay counts + (1 - decay) n_k,   sums <- decay sums + (1 - decay) sum of x with code k
        codebook_k <- sums_k / counts_k,   counts smoothed by epsilon so that a code without vectors stays finite

    Args:
        codebook, sums: (K, D). counts: (K,). All are overwritten.
        x: (N, D), the vectors. index: (N,), their codes.
        decay: in [0, 1).
        epsilon: Laplace smoothing of the counts.

    Source: van den Oord et al. 2017, appendix A.1.
    """
    new_sums, new_counts = code_sums(x, index, codebook.shape[0])
    move_codes_(codebook, counts, sums, new_counts, new_sums, decay=decay, epsilon=epsilon)


@torch.no_grad()
def move_codes_(
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    new_counts: Tensor,
    new_sums: Tensor,
    *,
    decay: float = 0.99,
    epsilon: float = 1e-5,
) -> None:
    """`vector_quantize_ema_` from the batch's `code_sums`, which the ranks of a distributed job add up in between."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")
    codes = codebook.shape[0]
    check_shape("counts", counts, (codes,), "one per code")
    check_shape("sums", sums, tuple(codebook.shape), "the codebook's shape")
    counts.mul_(decay).add_(new_counts, alpha=1 - decay)
    sums.mul_(decay).add_(new_sums, alpha=1 - decay)
    total = counts.sum()
    smoothed = (counts + epsilon) / (total + codes * epsilon) * total
    codebook.copy_(sums / smoothed[:, None].clamp_min(torch.finfo(smoothed.dtype).tiny))
