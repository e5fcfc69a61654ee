"""gumbel_argmax as a lecture writes it: one sample by the Gumbel-max trick, several by inverting the distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkernels.random import KINDS, reference_noise, uniform_of_pairs, words


def gumbel_argmax(logits: Tensor, seed: Tensor, stream: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    if samples == 1:
        in_double = logits.dtype == torch.float64
        noise = reference_noise(seed, stream, 0, rows * classes, KINDS.index("gumbel"), in_double)
        drawn = (logits + noise.reshape(rows, classes)).argmax(-1, keepdim=True)
    else:
        sums = logits.double().softmax(-1).cumsum(-1)
        uniform = uniform_of_pairs(words(seed, stream, 2 * rows * samples).reshape(rows, samples, 2))
        drawn = torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp_max(classes - 1)
    top = logits.amax(-1)
    log_sum = (logits - top[:, None]).exp().sum(-1).log()
    return drawn, log_prob(logits, drawn), torch.stack((top, log_sum), -1)


def log_prob(logits: Tensor, index: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, index)


def gumbel_argmax_backward(grad: Tensor, logits: Tensor, normaliser: Tensor, index: Tensor) -> Tensor:
    """sum over samples of grad (one-hot - softmax)."""
    softmax = (logits - normaliser[:, :1] - normaliser[:, 1:]).exp()
    return (-grad.sum(-1, keepdim=True) * softmax).scatter_add(-1, index, grad)
