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
    return StraightThrough.apply(perturbed, soft)


class StraightThrough(torch.autograd.Function):
    """one_hot(argmax) forward, the identity to `soft` backward; exactly one-hot, which y_hard - y + y is not."""

    @staticmethod
    def forward(ctx: object, perturbed: Tensor, soft: Tensor) -> Tensor:
        one_hot = torch.zeros_like(soft).scatter_(-1, perturbed.argmax(-1, keepdim=True), 1.0)
        return torch.where(soft.isnan().any(-1, keepdim=True), torch.nan, one_hot)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad


def gumbel_softmax_backward(grad: Tensor, y: Tensor, tau: Tensor, for_tau: bool) -> tuple[Tensor, Tensor]:
    """(grad_logits, grad_tau), without the noise: the perturbed logits are tau log y up to a constant."""
    grad_logits = y / tau[:, None] * (grad - (y * grad).sum(-1, keepdim=True))
    if not for_tau:
        return grad_logits, grad.new_empty(0)
    return grad_logits, -(grad_logits * y.clamp_min(torch.finfo(y.dtype).tiny).log()).sum(-1)
