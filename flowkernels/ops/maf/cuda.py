"""Chains of autoregressive transforms on CUDA tensors: one call of a kernel per transform and direction.

`kernels` is the compiled library's namespace, or has functions of the same names (`flowkernels.ops.maf.triton`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkernels.ops.maf.autograd import CODES, NUMBERS
from flowkernels.ops.maf.reference import log_normal


def maf(
    x: Tensor,
    contexts: Sequence[Tensor],
    packed: Sequence[Tensor],
    tables: Sequence[Tensor],
    codes: list[int],
    numbers: list[float],
    density: bool,
    *,
    kernels: Any = torch.ops.flowkernels_cuda,
) -> tuple[Tensor, Tensor, Tensor]:
    samples = x.shape[0]
    saved = x.new_empty(sum(codes[CODES - 1 :: CODES]), (samples + 15) // 16 * 16)
    total, begin = None, 0
    for t, (law, form, inverse, rows, *_) in enumerate(_per_transform(codes)):
        run = kernels.maf_inverse if inverse else kernels.maf_forward
        keep = saved.narrow(0, begin, rows) if rows else None
        x, logdet = run(
            x, _context(contexts, t), packed[t], tables[t], law, numbers[NUMBERS * t : NUMBERS * (t + 1)], form, keep
        )
        total = logdet if total is None else total + logdet
        begin += rows
    if total is None:
        total = x.new_zeros(samples)
    return x, total + log_normal(x) if density else total, saved


def maf_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    saved: Tensor,
    packed_back: Sequence[Tensor],
    masks: Sequence[Tensor],
    tables: Sequence[Tensor],
    tables_back: Sequence[Tensor],
    codes: list[int],
    numbers: list[float],
    context_widths: Sequence[int],
    want_parameters: bool,
    *,
    kernels: Any = torch.ops.flowkernels_cuda,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = _masks_of_each(masks)
    contexts: list[Tensor] = []
    parameters: list[Tensor] = []
    end = saved.shape[0]
    for t, (law, form, inverse, rows, *_) in reversed(list(enumerate(_per_transform(codes)))):
        run = kernels.maf_inverse_backward if inverse else kernels.maf_forward_backward
        grad_y, grad_context, flat = run(
            grad_y, grad_logdet, saved.narrow(0, end - rows, rows), packed_back[t], groups[t], tables[t],
            tables_back[t],
            law, numbers[NUMBERS * t : NUMBERS * (t + 1)], form, context_widths[t], want_parameters,
        )  # fmt: skip
        contexts.insert(0, grad_context.flatten())
        parameters.insert(0, flat)
        end -= rows
    return grad_y, torch.cat(contexts), torch.cat(parameters)


def _per_transform(codes: list[int]) -> list[list[int]]:
    return [codes[i : i + CODES] for i in range(0, len(codes), CODES)]


def _context(contexts: Sequence[Tensor], t: int) -> Tensor | None:
    return contexts[t] if contexts and contexts[t].shape[1] else None


def _masks_of_each(masks: Sequence[Tensor]) -> list[list[Tensor]]:
    """A network's layers fit together; the features of the next are not the parameters of the last."""
    groups: list[list[Tensor]] = []
    for mask in masks:
        if groups and groups[-1][-1].shape[0] == mask.shape[1]:
            groups[-1].append(mask)
        else:
            groups.append([mask])
    return groups
