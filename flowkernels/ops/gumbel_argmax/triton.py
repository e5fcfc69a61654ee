"""gumbel_argmax in Triton: the winner of logits + noise, and what normalises the logits, in one walk over a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowkernels._triton import exp, gumbel_window
from flowkernels.ops.gumbel_softmax.triton import MAX_BLOCK, blocks, options


@triton.jit
def forward_kernel(
    logits_ptr, seed_ptr, index_ptr, log_prob_ptr, normaliser_ptr, rows, classes, row, column, stream, samples,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    sample = tl.program_id(1).to(tl.int64)
    live = r < rows
    seed = tl.load(seed_ptr)
    number = tl.full((), 0, tl.int64) + stream + sample
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
    # Kept apart: beside a large maximum the logarithm would lose its digits.
    log_sum = tl.log(total)
    chosen = tl.load(logits_ptr + r * row + index * column, mask=live, other=0.0).to(COMPUTE)
    tl.store(index_ptr + r * samples + sample, index, mask=live)
    tl.store(log_prob_ptr + r * samples + sample, (chosen - top) - log_sum, mask=live)
    tl.store(normaliser_ptr + 2 * r, top, mask=live & (sample == 0))
    tl.store(normaliser_ptr + 2 * r + 1, log_sum, mask=live & (sample == 0))


def gumbel_argmax(logits: Tensor, seed: Tensor, stream: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    index = logits.new_empty(rows, samples, dtype=torch.int64)
    log_prob, normaliser = logits.new_empty(rows, samples), logits.new_empty(rows, 2)
    if rows:
        per, block, launch = blocks(classes, logits.dtype)
        compute = tl.float64 if logits.dtype == torch.float64 else tl.float32
        forward_kernel[(triton.cdiv(rows, per), samples)](
            logits,
            seed,
            index,
            log_prob,
            normaliser,
            rows,
            classes,
            *logits.stride(),
            stream,
            samples,
            compute,
            per,
            block,
            **launch,
        )
    return index, log_prob, normaliser


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What tests/gpu compiles without a GPU."""
    for dtype, compute in (("fp32", tl.float32), ("fp64", tl.float64)):
        pointers = dict.fromkeys(("logits_ptr", "log_prob_ptr", "normaliser_ptr"), f"*{dtype}")
        pointers |= {"seed_ptr": "*i64", "index_ptr": "*i64"}
        for block in (1024, MAX_BLOCK // 2 if dtype == "fp64" else MAX_BLOCK):
            constants = {"COMPUTE": compute, "ROWS": 1, "BLOCK": block}
            yield f"gumbel_argmax {dtype} {block}", forward_kernel, pointers, constants, options(block, dtype == "fp64")
