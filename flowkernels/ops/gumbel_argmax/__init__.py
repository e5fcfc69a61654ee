"""Exact samples of a categorical distribution, straight from its logits."""

from __future__ import annotations

from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_float_tensor
from flowkernels._library import needs_grad
from flowkernels.ops._categorical import check_dim, check_rows, rows_back, rows_of
from flowkernels.ops.gumbel_argmax import reference
from flowkernels.ops.gumbel_argmax.autograd import GumbelArgmax, forward_op
from flowkernels.random import Seed, draw_stream

__all__ = ["gumbel_argmax"]


def gumbel_argmax(logits: Tensor, k: int = 1, dim: int = -1, *, seed: Seed = None) -> tuple[Tensor, Tensor]:
    r"""k independent samples of softmax(logits), and their log-probabilities log softmax(logits)[index]::

        k = 1    index = argmax(logits + g),  g standard Gumbel noise              the Gumbel-max trick
        k > 1    index_s = the first i with p_1 + ... + p_i > u_s,  u uniform      D + k log D instead of k D steps

    Noise and sums are never stored: the memory is that of the result. Float32 noise reaches +22.9 and u has 53 bits,
    so categories rarer than 2^-24 are drawn as often as they should be.

    Args:
        logits: float64, float32, bfloat16 or float16, any shape; halves are calculated in float32.
        k: how many samples of each row, with replacement, at least 1. A single one is the category that
            ``gumbel_softmax(..., hard=True)`` draws with the same seed.
        dim: the dimension of the categories; in the results it has size k.
        seed: see `flowkernels.random.draw_stream`.

    Returns:
        index, int64, and log_prob in nats, differentiable with respect to logits, in at least float32.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be; a row of -inf alone as in
            `gumbel_softmax`.

    Source: Maddison et al. 2014, arXiv:1411.0030.
    """
    check_float_tensor("logits", logits)
    dim = check_dim(logits, dim)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k < 2**32:
        raise ValueError(f"k must be at least 1, got {k}")
    if logits.shape[dim] == 0:
        raise ValueError(f"logits must have a category in dimension {dim}, got shape {tuple(logits.shape)}")
    rows = rows_of(logits, dim, COMPUTE_DTYPE[logits.dtype])
    source = draw_stream(seed, logits.device)
    args = (rows, source.seed, source.number, k)
    if runs_reference(logits, "gumbel_argmax"):
        index, log_prob, _ = reference.gumbel_argmax(*args)
    elif needs_grad(rows):
        index, log_prob, _ = GumbelArgmax.apply(*args)
    else:
        index, log_prob, _ = forward_op(*args)
    check_rows(rows, log_prob)
    return rows_back(index, logits, dim, index.dtype), rows_back(log_prob, logits, dim, log_prob.dtype)
