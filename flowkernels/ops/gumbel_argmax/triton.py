"""gumbel_argmax in Triton: the winner of logits + noise, and what the logits are normalised by, in one walk.

Several samples are uniform numbers that are looked up among the cumulated probabilities, which are never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels._triton import exp, gumbel_window, philox
from flowkernels.ops.gumbel_softmax.triton import MAX_BLOCK, blocks, options

SEVERAL = {"BLOCK": 256, "SAMPLES": 16}


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    logits_ptr, seed_ptr, index_ptr, log_prob_ptr, normaliser_ptr, rows, classes, row, column, stream,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = r < rows
    seed = tl.load(seed_ptr)
    number = tl.full((), 0, tl.int64) + stream
    base = r * classes
    best = tl.full((ROWS, 1), float("-inf"), COMPUTE)
    index = tl.zeros((ROWS, 1), tl.int64)
    top = tl.full((ROWS, 1), float("-inf"), COMPUTE)
    total = tl.zeros((ROWS, 1), COMPUTE)
    for begin in range(0, classes + 3, BLOCK):
        first = base // 4 * 4 + begin
        c = first - base + tl.arange(0, BLOCK)[None, :]
        inside = live & (c >= 0) & (c < classes)
        logits = tl.load(logits_ptr + r * row + c * column, mask=inside, other=float("-inf")).to(COMPUTE)
        p = tl.where(inside, logits + gumbel_window(seed, number, first, COMPUTE, ROWS, BLOCK), float("-inf"))
        here = tl.max(p, 1)[:, None]
        index = tl.where(here > best, tl.min(tl.where(p == here, c, classes + 3), 1)[:, None], index)
        best = tl.maximum(best, here)
        now = tl.maximum(top, tl.max(logits, 1)[:, None])
        shift = tl.where(now == float("-inf"), 0.0, now)
        total = total * exp(top - shift) + tl.sum(tl.where(inside, exp(logits - shift), 0.0), 1)[:, None]
        top = now
    log_sum = tl.log(total)
    chosen = tl.load(logits_ptr + r * row + index * column, mask=live, other=0.0).to(COMPUTE)
    tl.store(index_ptr + r, index, mask=live)
    tl.store(log_prob_ptr + r, (chosen - top) - log_sum, mask=live)
    tl.store(normaliser_ptr + 2 * r, top, mask=live)
    tl.store(normaliser_ptr + 2 * r + 1, log_sum, mask=live)


@triton.jit
def probabilities(logits_ptr, r, begin, top, classes, row, column, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """exp(logits - top) of a piece of row r in float64, zero past its end."""
    c = begin + tl.arange(0, BLOCK).to(tl.int64)
    logits = tl.load(logits_ptr + r * row + c * column, mask=c < classes, other=float("-inf")).to(COMPUTE)
    return tl.where(c < classes, exp(logits - top), 0.0).to(tl.float64)


@triton.jit
def several_kernel(
    logits_ptr, seed_ptr, index_ptr, log_prob_ptr, normaliser_ptr, classes, row, column, stream, samples,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr)
    number = tl.full((), 0, tl.int64) + stream
    highest = tl.full((BLOCK,), float("-inf"), COMPUTE)
    for begin in range(0, classes, BLOCK):
        c = begin + tl.arange(0, BLOCK).to(tl.int64)
        logits = tl.load(logits_ptr + r * row + c * column, mask=c < classes, other=float("-inf")).to(COMPUTE)
        highest = tl.maximum(highest, logits)
    top = tl.max(highest, 0)
    total = tl.full((), 0.0, tl.float64)
    for begin in range(0, classes, BLOCK):
        total += tl.sum(probabilities(logits_ptr, r, begin, top, classes, row, column, COMPUTE, BLOCK), 0)
    log_sum = tl.log(total.to(COMPUTE))
    tl.store(normaliser_ptr + 2 * r, top)
    tl.store(normaliser_ptr + 2 * r + 1, log_sum)
    for first in range(0, samples, SAMPLES):
        s = first + tl.arange(0, SAMPLES).to(tl.int64)
        sample = r * samples + s
        w0, w1, w2, w3 = philox(seed, number, sample // 2)
        high = tl.where(sample % 2 == 0, w0, w2).to(tl.float64)
        low = tl.where(sample % 2 == 0, w1, w3).to(tl.float64)
        uniform = tl.minimum((high * 4294967296.0 + low) * 5.421010862427522e-20, 0.9999999999999999)
        at = uniform * total
        index = tl.zeros((SAMPLES,), tl.int32)
        before = tl.full((), 0.0, tl.float64)
        for begin in range(0, classes, BLOCK):
            p = probabilities(logits_ptr, r, begin, top, classes, row, column, COMPUTE, BLOCK)
            sums = before + tl.cumsum(p, 0)
            index += tl.sum((sums[None, :] <= at[:, None]).to(tl.int32), 1)
            before += tl.sum(p, 0)
        # The sums may end a rounding below the total.
        index = tl.minimum(index.to(tl.int64), classes - 1)
        chosen = tl.load(logits_ptr + r * row + index * column).to(COMPUTE)
        tl.store(index_ptr + sample, index, mask=s < samples)
        tl.store(log_prob_ptr + sample, (chosen - top) - log_sum, mask=s < samples)


def gumbel_argmax(logits: Tensor, seed: Tensor, stream: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    index = logits.new_empty(rows, samples, dtype=torch.int64)
    log_prob, normaliser = logits.new_empty(rows, samples), logits.new_empty(rows, 2)
    compute = tl.float64 if logits.dtype == torch.float64 else tl.float32
    if rows and samples == 1:
        per, block, launch = blocks(classes, logits.dtype)
        forward_kernel[(triton.cdiv(rows, per),)](
            logits, seed, index, log_prob, normaliser, rows, classes, *logits.stride(), stream,
            compute, per, block, **launch,
        )  # fmt: skip
    elif rows:
        several_kernel[(rows,)](
            logits, seed, index, log_prob, normaliser, classes, *logits.stride(), stream, samples,
            compute, SEVERAL["BLOCK"], SEVERAL["SAMPLES"], num_warps=4, num_stages=1,
        )  # fmt: skip
    return index, log_prob, normaliser


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What tests/gpu compiles without a GPU."""
    for dtype, compute in (("fp32", tl.float32), ("fp64", tl.float64)):
        pointers = dict.fromkeys(("logits_ptr", "log_prob_ptr", "normaliser_ptr"), f"*{dtype}")
        pointers |= {"seed_ptr": "*i64", "index_ptr": "*i64"}
        for block in (1024, MAX_BLOCK // 2 if dtype == "fp64" else MAX_BLOCK):
            constants = {"COMPUTE": compute, "ROWS": 1, "BLOCK": block}
            yield f"gumbel_argmax {dtype} {block}", forward_kernel, pointers, constants, options(block, dtype == "fp64")
        several = {"COMPUTE": compute, **SEVERAL}
        launch = {"num_warps": 4, "num_stages": 1}
        yield f"gumbel_argmax, several {dtype}", several_kernel, pointers, several, launch
