"""gumbel_softmax as a lecture writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkernels.random import KINDS, reference_noise


def gumbel_softmax(logits: Tensor, tau: Tensor, seed: Tensor, stream: int, hard: bool) -> Tensor:
    rows, classes = logits.shape
    in_double = logits.dtype == torch.float64
    noise = reference_noise(seed, stream, 0, rows * classes, KINDS.index("gumbel"), in_double)
    perturbed = logits + noise.reshape(rows, classes)
    soft = ((perturbed - perturbed.amax(-1, keepdim=True)) / tau[:, None]).softmax(-1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(-1, perturbed.argmax(-1, keepdim=True), 1.0)
    return one_hot + (soft - soft.detach())  # exactly one-hot, which (one_hot - soft) + soft is not


def gumbel_softmax_backward(grad: Tensor, y: Tensor, tau: Tensor, for_tau: bool) -> tuple[Tensor, Tensor]:
    """(grad_logits, grad_tau), without the noise: the perturbed logits are tau log y up to a constant."""
    grad_logits = y / tau[:, None] * (grad - (y * grad).sum(-1, keepdim=True))
    if not for_tau:
        return grad_logits, grad.new_empty(0)
    return grad_logits, -(grad_logits * y.clamp_min(torch.finfo(y.dtype).tiny).log()).sum(-1)
