"""masked_linear's CUDA C++ kernels: degrees are sorted by torch, the products are `flowkernels_cuda::masked_linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowkernels.ops.masked_linear.degrees import sorted_degrees


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degrees: Tensor,
    out_degrees: Tensor,
    strict: bool,
    activation: int,
    *,
    kernels: Any = torch.ops.flowkernels_cuda,
) -> Tensor:
    s = sorted_degrees(in_degrees, out_degrees, strict)
    y: Tensor = kernels.masked_linear(x, weight, bias, s.columns, s.rows, s.depth, activation)
    return y


def masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    in_degrees: Tensor,
    out_degrees: Tensor,
    strict: bool,
    want_x: bool,
    want_weight: bool,
    *,
    kernels: Any = torch.ops.flowkernels_cuda,
) -> tuple[Tensor, Tensor, Tensor]:
    s = sorted_degrees(in_degrees, out_degrees, strict)
    grads: tuple[Tensor, Tensor, Tensor] = kernels.masked_linear_backward(
        grad, x, weight, s.columns, s.rows, s.depth, s.first, want_x, want_weight
    )
    return grads
