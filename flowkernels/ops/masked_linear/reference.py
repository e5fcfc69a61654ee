"""masked_linear as a lecture writes it: multiply the weight by the mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flowkernels.ops.maf.reference import ACTIVATION
from flowkernels.plan import ACTIVATIONS


def mask_of(in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> Tensor:
    o, i = out_degrees[:, None], in_degrees[None, :]
    return o > i if strict else o >= i


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degrees: Tensor,
    out_degrees: Tensor,
    strict: bool,
    activation: int,
) -> Tensor:
    mask = mask_of(in_degrees, out_degrees, strict).to(weight.dtype)
    return ACTIVATION[ACTIVATIONS[activation]](F.linear(x, weight * mask, bias))


def masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    in_degrees: Tensor,
    out_degrees: Tensor,
    strict: bool,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias) from the gradient of the pre-activation; empty where not wanted."""
    mask = mask_of(in_degrees, out_degrees, strict).to(weight.dtype)
    grad_x = grad @ (weight * mask) if want_x else x.new_empty(0, x.shape[1])
    if not want_weight:
        return grad_x, x.new_empty(0, x.shape[1]), x.new_empty(0)
    return grad_x, (grad.T @ x) * mask, grad.sum(0)
