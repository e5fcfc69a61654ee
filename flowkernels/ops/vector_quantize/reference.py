"""vector_quantize as a lecture writes it."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Through the whole matrix of distances."""
    return torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)


def vector_quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(quantized, index, squared distance)."""
    index = nearest_code(x, codebook)
    quantized = codebook.index_select(0, index)
    return quantized, index, (x - quantized).square().sum(-1)


def straight_through_loss(
    x: Tensor, codebook: Tensor, index: Tensor, commitment: float, codebook_weight: float
) -> tuple[Tensor, Tensor]:
    """(quantized, loss) with the gradients of the VQ-VAE, for codes that are already chosen."""
    code = codebook.index_select(0, index)
    pulls_x = (x - code.detach()).square().sum(-1)
    pulls_code = (x.detach() - code).square().sum(-1)
    return code.detach() + (x - x.detach()), commitment * pulls_x + codebook_weight * pulls_code


def vector_quantize_backward(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    index: Tensor,
    commitment: float,
    codebook_weight: float,
    for_codebook: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_codebook): the straight-through gradient, and each half of the loss to its own side."""
    pull = 2 * grad_loss[:, None] * (x - codebook.index_select(0, index))
    grad_x = grad_quantized + commitment * pull
    if not for_codebook:
        return grad_x, codebook.new_empty(0, codebook.shape[1])
    return grad_x, torch.zeros_like(codebook).index_add(0, index, -codebook_weight * pull)


def vector_quantize_sums(x: Tensor, index: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """(sum of the samples, number of samples) of each code."""
    sums = x.new_zeros(codes, x.shape[1]).index_add(0, index, x)
    return sums, x.new_zeros(codes).index_add(0, index, torch.ones_like(x[:, 0]))
