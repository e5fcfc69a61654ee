"""affine_coupling on CUDA tensors: what both GPU backends need around their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowkernels.ops.affine_coupling.reference import NEEDS_SCALE, NEEDS_SHIFT, NEEDS_X


def affine_coupling(
    kernel: Callable[..., Any], x: Tensor, shift: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The kernels read one type; under autocast x may be wider than its parameters."""
    y, logdet = kernel(x, shift.to(x.dtype), scale.to(x.dtype), *rest)
    return y, logdet


def affine_coupling_backward(
    kernel: Callable[..., Any], grad_y: Tensor, grad_logdet: Tensor, x: Tensor, shift: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *options, needs = rest
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = (grad_y.to(x.dtype), grad_logdet.to(sums), x, shift.to(x.dtype), scale.to(x.dtype))
    grads = kernel(*inputs, *options)
    wanted = (needs & NEEDS_X, needs & NEEDS_SHIFT, needs & NEEDS_SCALE)
    return tuple(
        g.to(like.dtype) if want else like.new_empty((like.shape[0], 0))
        for g, like, want in zip(grads, (x, shift, scale), wanted, strict=True)
    )
