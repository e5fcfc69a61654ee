"""affine_coupling in Triton: one pass over memory, laws and forms chosen when the kernel is compiled."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flowkernels._checks import COMPUTE_DTYPE
from flowkernels._triton import affine, affine_backward, next_power_of_2, store_logdet

MAX_BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, shift_ptr, scale_ptr, logdet_in_ptr, positions_ptr, y_ptr, logdet_ptr,
    rows, features,
    x_row, x_column, shift_row, shift_column, scale_row, scale_column,
    LAW: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    FORM: tl.constexpr, INVERSE: tl.constexpr, MASKED: tl.constexpr, RUNNING: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, BLOCK), COMPUTE)
    for begin in range(0, features, BLOCK):
        c = begin + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        inside = (r < rows) & (c < features)
        x = tl.load(x_ptr + r * x_row + c * x_column, mask=inside, other=0.0).to(COMPUTE)
        at, live = c, inside
        if MASKED:
            at = tl.load(positions_ptr + c, mask=c < features, other=-1)
            live = inside & (at >= 0)
        shift = tl.load(shift_ptr + r * shift_row + at * shift_column, mask=live, other=0.0).to(COMPUTE)
        u = tl.load(scale_ptr + r * scale_row + at * scale_column, mask=live, other=0.0).to(COMPUTE)
        y, one = affine(x, shift, u, LAW, A, B, C, FORM, INVERSE)
        if MASKED:
            y = tl.where(live, y, x)
        tl.store(y_ptr + r * features + c, y.to(y_ptr.dtype.element_ty), mask=inside)
        total += tl.where(live, one, 0.0)
    store_logdet(total, logdet_in_ptr, logdet_ptr, rows, RUNNING, ROWS)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_y_ptr, grad_logdet_ptr, x_ptr, shift_ptr, scale_ptr, positions_ptr, grad_x_ptr, grad_shift_ptr, grad_scale_ptr,
    rows, features, width,
    grad_row, grad_column, x_row, x_column, shift_row, shift_column, scale_row, scale_column,
    LAW: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    FORM: tl.constexpr, INVERSE: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    grad_logdet = tl.load(grad_logdet_ptr + r, mask=r < rows, other=0.0)
    for begin in range(0, features, BLOCK):
        c = begin + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        inside = (r < rows) & (c < features)
        grad_y = tl.load(grad_y_ptr + r * grad_row + c * grad_column, mask=inside, other=0.0).to(COMPUTE)
        x = tl.load(x_ptr + r * x_row + c * x_column, mask=inside, other=0.0).to(COMPUTE)
        at, live = c, inside
        if MASKED:
            at = tl.load(positions_ptr + c, mask=c < features, other=-1)
            live = inside & (at >= 0)
        shift = tl.load(shift_ptr + r * shift_row + at * shift_column, mask=live, other=0.0).to(COMPUTE)
        u = tl.load(scale_ptr + r * scale_row + at * scale_column, mask=live, other=0.0).to(COMPUTE)
        grad_x, grad_shift, grad_u = affine_backward(
            grad_y, grad_logdet, x, shift, u, LAW, A, B, C, FORM, INVERSE
        )  # fmt: skip
        if MASKED:
            grad_x = tl.where(live, grad_x, grad_y)
        tl.store(grad_x_ptr + r * features + c, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        to = r * width + at
        tl.store(grad_shift_ptr + to, grad_shift.to(grad_shift_ptr.dtype.element_ty), mask=live)
        tl.store(grad_scale_ptr + to, grad_u.to(grad_scale_ptr.dtype.element_ty), mask=live)


def _blocks(features: int) -> tuple[int, int]:
    """(rows, columns) of a program's block: about a thousand elements."""
    block = min(MAX_BLOCK, next_power_of_2(max(1, features)))
    return max(1, MAX_BLOCK // block), block


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    logdet: Tensor | None,
    positions: Tensor | None,
    law: int,
    law_parameters: list[float],
    form: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    rows, features = x.shape
    compute = COMPUTE_DTYPE[x.dtype]
    y, total = x.new_empty(rows, features), x.new_empty(rows, dtype=compute)
    if rows:
        per, block = _blocks(features)
        running = None if logdet is None else logdet.contiguous()
        forward_kernel[(triton.cdiv(rows, per),)](
            x, shift, scale, total if running is None else running, total if positions is None else positions, y, total,
            rows, features, *x.stride(), *shift.stride(), *scale.stride(),
            law, *law_parameters, form, inverse, positions is not None, running is not None,
            _tl(compute), per, block,
        )  # fmt: skip
    return y, total


def affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    positions: Tensor | None,
    law: int,
    law_parameters: list[float],
    form: int,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, features = x.shape
    grad_x = x.new_empty(rows, features)
    # With positions there may be columns that no feature reads.
    new = x.new_empty if positions is None else x.new_zeros
    grad_shift, grad_scale = new(rows, shift.shape[1]), new(rows, shift.shape[1])
    if rows:
        per, block = _blocks(features)
        backward_kernel[(triton.cdiv(rows, per),)](
            grad_y, grad_logdet.contiguous(), x, shift, scale, x if positions is None else positions,
            grad_x, grad_shift, grad_scale, rows, features, shift.shape[1],
            *grad_y.stride(), *x.stride(), *shift.stride(), *scale.stride(),
            law, *law_parameters, form, inverse, positions is not None,
            _tl(COMPUTE_DTYPE[x.dtype]), per, block,
        )  # fmt: skip
    return grad_x, grad_shift, grad_scale


def _tl(dtype: object) -> tl.dtype:
    return tl.float64 if str(dtype) == "torch.float64" else tl.float32
