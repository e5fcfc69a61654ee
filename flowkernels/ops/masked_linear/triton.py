"""masked_linear in Triton: block-triangular products over units sorted by degree, bias and activation on the way out.

No mask is formed. After sorting, output row n reads the first depth[n] inputs, and depth grows with n: the forward
product stops at the depth of its last row, the gradient of x starts at the first row that reaches its columns, and the
gradient of the weight leaves tiles out that no weight lies in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels._triton import INTERPRETED, activate
from flowkernels.ops.masked_linear.degrees import sorted_degrees


@triton.jit(do_not_specialize=["samples"])
def forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, in_ptr, out_ptr, depth_ptr, samples, inputs, outputs, x_row, x_column, w_row, w_column,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    # The deepest tiles begin first: what is left at the end is short.
    n = (tl.num_programs(1) - 1 - tl.program_id(1)) * N + tl.arange(0, N)
    depth = tl.load(depth_ptr + n, mask=n < outputs, other=0)
    row = tl.load(out_ptr + n, mask=n < outputs, other=0)
    deepest = tl.max(depth, 0).to(tl.int32)
    total = tl.zeros((M, N), tl.float32)
    for begin in range(0, deepest, K):
        k = begin + tl.arange(0, K)
        column = tl.load(in_ptr + k, mask=k < inputs, other=0)
        x = tl.load(
            x_ptr + m[:, None] * x_row + column[None, :] * x_column,
            mask=(m[:, None] < samples) & (k[None, :] < deepest), other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptr + row[None, :] * w_row + column[:, None] * w_column, mask=k[:, None] < depth[None, :], other=0.0
        )
        total = tl.dot(x, w, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(b_ptr + row, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    y = activate(total, ACTIVATION)
    inside = (m[:, None] < samples) & (n[None, :] < outputs)
    tl.store(y_ptr + m[:, None] * outputs + row[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["samples"])
def input_gradient_kernel(
    grad_ptr, w_ptr, out_grad_ptr, in_ptr, out_ptr, depth_ptr, first_ptr, samples, inputs, outputs,
    grad_row, grad_column, w_row, w_column,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    k = tl.program_id(1) * K + tl.arange(0, K)
    column = tl.load(in_ptr + k, mask=k < inputs, other=0)
    # Input k is read by the rows from first[k] on; the first column of the tile has the earliest.
    start = tl.load(first_ptr + tl.program_id(1) * K).to(tl.int32) // N * N
    total = tl.zeros((M, K), tl.float32)
    for begin in range(start, outputs, N):
        n = begin + tl.arange(0, N)
        row = tl.load(out_ptr + n, mask=n < outputs, other=0)
        depth = tl.load(depth_ptr + n, mask=n < outputs, other=0)
        g = tl.load(
            grad_ptr + m[:, None] * grad_row + row[None, :] * grad_column,
            mask=(m[:, None] < samples) & (n[None, :] < outputs), other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptr + row[:, None] * w_row + column[None, :] * w_column, mask=k[None, :] < depth[:, None], other=0.0
        )
        total = tl.dot(g, w, total, input_precision=PRECISION)
    inside = (m[:, None] < samples) & (k[None, :] < inputs)
    tl.store(out_grad_ptr + m[:, None] * inputs + column[None, :], total.to(out_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["samples"])
def weight_gradient_kernel(
    grad_ptr, x_ptr, out_w_ptr, out_b_ptr, in_ptr, out_ptr, depth_ptr, samples, inputs, outputs,
    grad_row, grad_column, x_row, x_column,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * N + tl.arange(0, N)
    first = tl.program_id(1) * K
    k = first + tl.arange(0, K)
    depth = tl.load(depth_ptr + n, mask=n < outputs, other=0)
    row = tl.load(out_ptr + n, mask=n < outputs, other=0)
    column = tl.load(in_ptr + k, mask=k < inputs, other=0)
    total = tl.zeros((N, K), tl.float32)
    bias = tl.zeros((N,), tl.float32)
    stop = tl.where((tl.max(depth, 0) <= first) & (first > 0), 0, samples)
    for begin in range(0, stop, M):
        m = begin + tl.arange(0, M).to(tl.int64)
        g = tl.load(
            grad_ptr + m[None, :] * grad_row + row[:, None] * grad_column,
            mask=(m[None, :] < samples) & (n[:, None] < outputs), other=0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + m[:, None] * x_row + column[None, :] * x_column,
            mask=(m[:, None] < samples) & (k[None, :] < inputs), other=0.0,
        )  # fmt: skip
        total = tl.dot(g, x, total, input_precision=PRECISION)
        bias += tl.sum(g.to(tl.float32), 1)
    total = tl.where(k[None, :] < depth[:, None], total, 0.0)
    inside = (n[:, None] < outputs) & (k[None, :] < inputs)
    tl.store(out_w_ptr + row[:, None] * inputs + column[None, :], total.to(out_w_ptr.dtype.element_ty), mask=inside)
    tl.store(out_b_ptr + row, bias.to(out_b_ptr.dtype.element_ty), mask=(n < outputs) & (first == 0))


def _options(dtype: torch.dtype) -> dict[str, int]:
    """Gathered addresses take registers, and so does the pipeline: more warps and stages are spills or gain nothing."""
    return {"num_warps": 8, "num_stages": 2 if dtype == torch.float32 else 3}


def _tiles(x: Tensor) -> tuple[int, int, int]:
    """(M, N, K): 64 x 64 leaves 53% of a sorted MADE mask to visit; interpreted, few and large ones are fastest."""
    if INTERPRETED:
        return 64, 64, 64
    return 64, 64, 16 if x.dtype == torch.float32 else 32


def _precision(x: Tensor) -> str:
    """float32 products in three TF32 products on tensor cores, with float32's accuracy."""
    return "ieee" if INTERPRETED or x.dtype != torch.float32 else "tf32x3"


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degrees: Tensor,
    out_degrees: Tensor,
    strict: bool,
    activation: int,
) -> Tensor:
    if x.dtype == torch.float64:
        from flowkernels.ops.masked_linear import reference

        return reference.masked_linear(x, weight, bias, in_degrees, out_degrees, strict, activation)
    samples, inputs, outputs = x.shape[0], weight.shape[1], weight.shape[0]
    y = x.new_empty(samples, outputs)
    if samples and outputs:
        s = sorted_degrees(in_degrees, out_degrees, strict)
        (m, n, k), launch = _tiles(x), _options(x.dtype)
        forward_kernel[(triton.cdiv(samples, m), triton.cdiv(outputs, n))](
            x, weight, y if bias is None else bias, y, s.columns, s.rows, s.depth, samples, inputs, outputs,
            *x.stride(), *weight.stride(), activation, bias is not None, _precision(x), m, n, k, **launch,
        )  # fmt: skip
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
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        from flowkernels.ops.masked_linear import reference

        return reference.masked_linear_backward(grad, x, weight, in_degrees, out_degrees, strict, want_x, want_weight)
    samples, inputs, outputs = x.shape[0], weight.shape[1], weight.shape[0]
    s = sorted_degrees(in_degrees, out_degrees, strict)
    (m, n, k), launch = _tiles(x), _options(x.dtype)
    grad_x = x.new_empty(samples if want_x else 0, inputs)
    if want_x and samples and inputs:
        input_gradient_kernel[(triton.cdiv(samples, m), triton.cdiv(inputs, k))](
            grad, weight, grad_x, s.columns, s.rows, s.depth, s.first, samples, inputs, outputs,
            *grad.stride(), *weight.stride(), _precision(x), m, n, k, **launch,
        )  # fmt: skip
    grad_weight = x.new_empty(outputs if want_weight else 0, inputs)
    grad_bias = x.new_empty(outputs if want_weight else 0)
    if want_weight and outputs:
        weight_gradient_kernel[(triton.cdiv(outputs, n), max(1, triton.cdiv(inputs, k)))](
            grad, x, grad_weight, grad_bias, s.columns, s.rows, s.depth, samples, inputs, outputs,
            *grad.stride(), *x.stride(), _precision(x), m, n, k, **launch,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What tests/gpu compiles without a GPU."""
    indices = dict.fromkeys(("in_ptr", "out_ptr", "depth_ptr", "first_ptr"), "*i64")
    sizes = dict.fromkeys(("samples", "inputs", "outputs"), "i32")
    for dtype in ("fp32", "bf16"):
        floats = ("x_ptr", "w_ptr", "b_ptr", "y_ptr", "grad_ptr", "out_grad_ptr", "out_w_ptr", "out_b_ptr")
        pointers = {**dict.fromkeys(floats, f"*{dtype}"), **indices, **sizes}
        precision = {
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
            "M": 64,
            "N": 64,
            "K": 16 if dtype == "fp32" else 32,
        }
        launch = _options(torch.float32 if dtype == "fp32" else torch.bfloat16)
        yield f"masked_linear {dtype}", forward_kernel, pointers, {"ACTIVATION": 1, "BIAS": True, **precision}, launch
        yield f"masked_linear gradient of x {dtype}", input_gradient_kernel, pointers, precision, launch
        yield f"masked_linear gradient of weight {dtype}", weight_gradient_kernel, pointers, precision, launch
