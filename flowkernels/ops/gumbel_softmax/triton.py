"""gumbel_softmax in Triton. Noise is drawn where it is used, and again: rows longer than a block are walked twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels._triton import exp, gumbel_window, next_power_of_2

MAX_BLOCK = 4096


@triton.jit
def perturbed_window(
    logits_ptr, seed, stream, r, inside_rows, begin, classes, row, column,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(logits + noise, columns, which exist) of a window that starts at a multiple of four of the row's elements."""
    base = r * classes
    first = base // 4 * 4 + begin
    c = first - base + tl.arange(0, BLOCK)[None, :]
    inside = inside_rows & (c >= 0) & (c < classes)
    logits = tl.load(logits_ptr + r * row + c * column, mask=inside, other=float("-inf")).to(COMPUTE)
    noise = gumbel_window(seed, stream, first, COMPUTE, ROWS, BLOCK)
    return tl.where(inside, logits + noise, float("-inf")), c, inside


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    logits_ptr, tau_ptr, seed_ptr, y_ptr, rows, classes, row, column, tau_row, stream,
    HARD: tl.constexpr, SINGLE: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = r < rows
    seed = tl.load(seed_ptr)
    stream = tl.full((), 0, tl.int64) + stream
    tau = tl.load(tau_ptr + r * tau_row, mask=live, other=1.0).to(COMPUTE)
    if SINGLE:
        p, c, inside = perturbed_window(
            logits_ptr, seed, stream, r, live, 0, classes, row, column, COMPUTE, ROWS, BLOCK
        )
        top = tl.max(p, 1)[:, None]
        index = tl.argmin(tl.where(p == top, c, classes + 3), 1)[:, None]
        e = tl.where(inside, exp((p - top) / tau), 0.0)
        total = tl.sum(e, 1)[:, None]
        y = e / total
        if HARD:
            at = tl.arange(0, BLOCK)[None, :]
            y = tl.where(total > 0.0, tl.where(at == index, y * 0.0 + 1.0, 0.0), y)
        tl.store(y_ptr + r * classes + c, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        top = tl.full((ROWS, 1), float("-inf"), COMPUTE)
        total = tl.zeros((ROWS, 1), COMPUTE)
        index = tl.zeros((ROWS, 1), tl.int64)
        for begin in range(0, classes + 3, BLOCK):
            p, c, inside = perturbed_window(
                logits_ptr, seed, stream, r, live, begin, classes, row, column, COMPUTE, ROWS, BLOCK
            )
            here = tl.max(p, 1)[:, None]
            first = tl.min(tl.where(p == here, c, classes + 3), 1)[:, None]
            index = tl.where(here > top, first, index)
            now = tl.maximum(top, here)
            # While everything is -inf there is nothing to rescale, and -inf - -inf must not become NaN.
            base = tl.where(now == float("-inf"), 0.0, now)
            total = total * exp((top - base) / tau)
            total += tl.sum(tl.where(inside, exp((p - base) / tau), 0.0), 1)[:, None]
            top = now
        for begin in range(0, classes + 3, BLOCK):
            p, c, inside = perturbed_window(
                logits_ptr, seed, stream, r, live, begin, classes, row, column, COMPUTE, ROWS, BLOCK
            )
            y = exp((p - top) / tau) / total
            if HARD:
                y = tl.where(total > 0.0, tl.where(c == index, y * 0.0 + 1.0, 0.0), y)
            tl.store(y_ptr + r * classes + c, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_ptr, y_ptr, tau_ptr, out_ptr, grad_tau_ptr, rows, classes, grad_row, grad_column, row, column, tau_row,
    TINY: tl.constexpr, FOR_TAU: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = r < rows
    tau = tl.load(tau_ptr + r * tau_row, mask=live, other=1.0).to(COMPUTE)
    dot = tl.zeros((ROWS, BLOCK), COMPUTE)
    for begin in range(0, classes, BLOCK):
        c = begin + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        inside = live & (c < classes)
        y = tl.load(y_ptr + r * row + c * column, mask=inside, other=0.0).to(COMPUTE)
        grad = tl.load(grad_ptr + r * grad_row + c * grad_column, mask=inside, other=0.0).to(COMPUTE)
        dot += y * grad
    mean = tl.sum(dot, 1)[:, None]
    for_tau = tl.zeros((ROWS, BLOCK), COMPUTE)
    for begin in range(0, classes, BLOCK):
        c = begin + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        inside = live & (c < classes)
        y = tl.load(y_ptr + r * row + c * column, mask=inside, other=0.0).to(COMPUTE)
        grad = tl.load(grad_ptr + r * grad_row + c * grad_column, mask=inside, other=0.0).to(COMPUTE)
        out = y / tau * (grad - mean)
        tl.store(out_ptr + r * classes + c, out.to(out_ptr.dtype.element_ty), mask=inside)
        if FOR_TAU:
            for_tau += tl.where(inside, out * tl.log(tl.maximum(y, TINY)), 0.0).to(COMPUTE)
    if FOR_TAU:
        tl.store(grad_tau_ptr + r, -tl.sum(for_tau, 1)[:, None], mask=live)


def blocks(classes: int, dtype: torch.dtype, *, backward: bool = False) -> tuple[int, int, dict[str, int]]:
    """(rows, columns) of a program's block, and its launch options; a row's window is up to three longer."""
    most = MAX_BLOCK // 2 if dtype == torch.float64 else MAX_BLOCK
    block = min(most, max(4, next_power_of_2(classes + 3)))
    return max(1, 1024 // block), block, options(block, backward != (dtype == torch.float64))


def options(block: int, heavy: bool) -> dict[str, int]:
    """Eight elements to a thread, or four: more would spill. One stage: a pipeline of the loops costs registers."""
    return {"num_warps": min(16, max(8 if heavy else 4, block // (128 if heavy else 256))), "num_stages": 1}


def gumbel_softmax(logits: Tensor, tau: Tensor, seed: Tensor, stream: int, hard: bool) -> Tensor:
    rows, classes = logits.shape
    y = logits.new_empty(rows, classes)
    if rows * classes:
        per, block, launch = blocks(classes, logits.dtype)
        compute = tl.float64 if logits.dtype == torch.float64 else tl.float32
        forward_kernel[(triton.cdiv(rows, per),)](
            logits, tau, seed, y, rows, classes, *logits.stride(), tau.stride(0), stream,
            hard, classes + 3 <= block, compute, per, block, **launch,
        )  # fmt: skip
    return y


def gumbel_softmax_backward(grad: Tensor, y: Tensor, tau: Tensor, for_tau: bool) -> tuple[Tensor, Tensor]:
    rows, classes = y.shape
    out, grad_tau = y.new_empty(rows, classes), y.new_empty(rows if for_tau else 0)
    if rows:
        per, block, launch = blocks(classes, y.dtype, backward=True)
        compute = tl.float64 if y.dtype == torch.float64 else tl.float32
        backward_kernel[(triton.cdiv(rows, per),)](
            grad, y, tau, out, grad_tau, rows, classes, *grad.stride(), *y.stride(), tau.stride(0),
            torch.finfo(y.dtype).tiny,
            for_tau, compute, per, block, **launch,
        )  # fmt: skip
    return out, grad_tau


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What tests/gpu compiles without a GPU."""
    for dtype, compute in (("fp32", tl.float32), ("fp64", tl.float64)):
        pointers = dict.fromkeys(("logits_ptr", "tau_ptr", "y_ptr", "grad_ptr", "out_ptr", "grad_tau_ptr"), f"*{dtype}")
        pointers["seed_ptr"] = "*i64"
        for block in (1024, MAX_BLOCK // 2 if dtype == "fp64" else MAX_BLOCK):
            size = {"COMPUTE": compute, "ROWS": 1, "BLOCK": block}
            for single in (True, False):
                for hard in (True, False):
                    constants = {"HARD": hard, "SINGLE": single, **size}
                    label = f"gumbel_softmax {dtype} {block} single={single} hard={hard}"
                    yield label, forward_kernel, pointers, constants, options(block, dtype == "fp64")
            constants = {"TINY": 1e-38, "FOR_TAU": True, **size}
            yield (
                f"gumbel_softmax backward {dtype} {block}",
                backward_kernel,
                pointers,
                constants,
                options(block, dtype == "fp32"),
            )
