"""rq_spline in Triton: y and the log-det in one pass over memory, and its backward; one element per lane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels._checks import COMPUTE_DTYPE
from flowkernels._triton import INTERPRETED, next_power_of_2, store_logdet
from flowkernels._triton_splines import COMPILED, REGISTERS, options_of, spline, spline_backward

# Elements of a program: one for each of its lanes. Interpreted, a program costs the same whatever its size.
ELEMENTS = 4096 if INTERPRETED else 128
_LAUNCH = {"num_warps": 4, **REGISTERS}


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, parameters_ptr, logdet_in_ptr, y_ptr, logdet_ptr,
    rows, features, x_row, x_column, parameters_row, parameters_column, parameters_step,
    RUNNING: tl.constexpr, INVERSE: tl.constexpr, STYLE: tl.constexpr, OPTIONS: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, BLOCK), COMPUTE)
    for begin in range(0, features, BLOCK):
        c = begin + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        inside = (r < rows) & (c < features)
        x = tl.load(x_ptr + r * x_row + c * x_column, mask=inside, other=0.0).to(COMPUTE)
        of_element = parameters_ptr + r * parameters_row + c * parameters_column
        y, one = spline(x, of_element, parameters_step, inside, INVERSE, STYLE, OPTIONS)
        tl.store(y_ptr + r * features + c, y.to(y_ptr.dtype.element_ty), mask=inside)
        total += tl.where(inside, one, 0.0)
    store_logdet(total, logdet_in_ptr, logdet_ptr, rows, RUNNING, ROWS)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_y_ptr, grad_logdet_ptr, x_ptr, parameters_ptr, grad_x_ptr, grad_parameters_ptr,
    rows, features, count,
    grad_row, grad_column, x_row, x_column, parameters_row, parameters_column, parameters_step,
    INVERSE: tl.constexpr, STYLE: tl.constexpr, OPTIONS: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < features)
    grad_y = tl.load(grad_y_ptr + r * grad_row + c * grad_column, mask=inside, other=0.0).to(COMPUTE)
    grad_logdet = tl.load(grad_logdet_ptr + r, mask=r < rows, other=0.0)
    x = tl.load(x_ptr + r * x_row + c * x_column, mask=inside, other=0.0).to(COMPUTE)
    at = r * features + c
    grad_x = spline_backward(
        grad_y, grad_logdet, x, parameters_ptr + r * parameters_row + c * parameters_column, parameters_step,
        grad_parameters_ptr + at * count, 1, inside, INVERSE, STYLE, OPTIONS,
    )  # fmt: skip
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def _blocks(features: int) -> tuple[int, int]:
    """(rows, columns) of a program's block."""
    block = min(ELEMENTS, next_power_of_2(max(1, features)))
    return ELEMENTS // block, block


def _compute(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def rq_spline(
    x: Tensor,
    parameters: Tensor,
    logdet: Tensor | None,
    bins: int,
    style: int,
    numbers: Sequence[float],
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    rows, features = x.shape
    y, total = x.new_empty(rows, features), x.new_empty(rows, dtype=COMPUTE_DTYPE[x.dtype])
    if rows:
        per, block = _blocks(features)
        running = None if logdet is None else logdet.contiguous()
        forward_kernel[(triton.cdiv(rows, per),)](
            x, parameters, total if running is None else running, y, total,
            rows, features, *x.stride(), *parameters.stride(),
            running is not None, inverse, style, options_of(style, numbers, bins),
            _compute(x), per, block, **_LAUNCH,
        )  # fmt: skip
    return y, total


def rq_spline_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    parameters: Tensor,
    bins: int,
    style: int,
    numbers: Sequence[float],
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    rows, features, count = parameters.shape
    grad_x, grad_parameters = x.new_empty(rows, features), x.new_empty(rows, features, count)
    if rows and features:
        per, block = _blocks(features)
        backward_kernel[(triton.cdiv(rows, per), triton.cdiv(features, block))](
            grad_y, grad_logdet.contiguous(), x, parameters, grad_x, grad_parameters,
            rows, features, count, *grad_y.stride(), *x.stride(), *parameters.stride(),
            inverse, style, options_of(style, numbers, bins), _compute(x), per, block, **_LAUNCH,
        )  # fmt: skip
    return grad_x, grad_parameters


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What tests/gpu compiles without a GPU."""
    splines = {name: (style, options_of(style, numbers, 8)) for name, style, numbers, _ in COMPILED}
    for dtype, name, inverse in (
        ("fp64", "linear", True), ("fp32", "nflows", True), ("fp32", "zuko", False), ("bf16", "linear", False)
    ):  # fmt: skip
        compute, sums = (tl.float64, "fp64") if dtype == "fp64" else (tl.float32, "fp32")
        constants = {
            "INVERSE": inverse, **dict(zip(("STYLE", "OPTIONS"), splines[name], strict=True)),
            "COMPUTE": compute, "ROWS": 1, "BLOCK": 128,
        }  # fmt: skip
        for kernel, more in ((forward_kernel, {"RUNNING": True}), (backward_kernel, {})):
            pointers = {n: f"*{sums if 'logdet' in n else dtype}" for n in kernel.arg_names if n.endswith("_ptr")}
            label = f"rq_spline {kernel.__name__} {name} {dtype} inverse={inverse}"
            yield label, kernel, pointers, {**constants, **more}, _LAUNCH
