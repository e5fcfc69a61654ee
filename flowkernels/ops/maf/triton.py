"""Autoregressive transforms in Triton, in the host-blocked form: both directions and their gradients.

The functions here have the signatures of the C++ kernels (csrc/cuda/maf.cu) and the same layouts, packed panels and
kept activations, so that `flowkernels.ops.maf.cuda` chains either. Activations lie as [unit][sample] in device memory,
the units of every layer in the plan's order. Two kernels do the arithmetic:

    rows_kernel   block-triangular product of some rows of one layer with columns that are final, on tensor cores;
                  bias, context, residual connection and activation on the way out
    sweep_kernel  walks the steps of one block: what became final inside the block is added, row by row

The density direction is one rows_kernel per layer. The sampling direction goes block by block, one rows_kernel per
layer for everything earlier and one sweep_kernel. Gradients run the same way through the transposed plan; the weights'
are one matrix product per layer, left to torch. The last layer is a kernel of its own, apart from the transform: its
parameters are kept for the gradient anyway, and a fused kernel would save no more than one pass over them.

A feature has PER rows of parameters: shift and scale, or those of a spline, whose bins are loops that read them from
there (flowkernels/_triton_splines.py). Which of the two is a constant of the kernels, and NUMBERS the law's three
numbers or the spline's options.

The host reads a plan's table once, when it meets it for the first time: capture a CUDA graph after a first call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from flowkernels._triton import INTERPRETED, activate, affine, affine_backward, slope_from_kept
from flowkernels._triton_splines import COMPILED, REGISTERS, options_of, spline, spline_backward
from flowkernels.ops.maf import cuda
from flowkernels.ops.maf.autograd import _LANES
from flowkernels.plan import ACTIVATIONS
from flowkernels.scales import NAMES

# What a kernel knows of a layer, one row of `_Net.layers`: the first of its rows among those of all layers; the first
# kept row of what it reads, of what it gives and of its pre-activations (backwards the slope of row r comes from the
# kept row SLOPE - r); where in the table the rows final at each time are, the same of what it reads, the rows of its
# residual connection and its order; the first row of the residual's source; where its bias is packed; the column of its
# context. One number more keeps all rows at multiples of 16 bytes, which Triton compiles kernels for.
FIELDS = tl.constexpr(12)
FIRST, COLUMNS, OUT, SLOPE, UP_TO, COLUMNS_UP_TO, RESIDUAL, PERM, SOURCE, BIAS, CONTEXT = (
    tl.constexpr(i) for i in range(11)
)

# Transforms are numbered: laws from 0, then come the splines (flowkernels.transforms.code_and_numbers).
SPLINES = tl.constexpr(len(NAMES))


@triton.jit
def finish(
    v, r, n, inside, layer_ptr, table_ptr, state_ptr, pre_ptr, saved_ptr, stride,
    ACTIVATION: tl.constexpr, RESIDUALS: tl.constexpr, BACKWARD: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """From the sums v of the rows r to what the next layer reads."""
    first, out, slope = tl.load(layer_ptr + FIRST), tl.load(layer_ptr + OUT), tl.load(layer_ptr + SLOPE)
    if BACKWARD and not LAST:
        kept = tl.load(saved_ptr + (slope - r) * stride + n, mask=inside, other=0.0)
        v = v * slope_from_kept(kept, ACTIVATION)
    if RESIDUALS:
        where, source = tl.load(layer_ptr + RESIDUAL), tl.load(layer_ptr + SOURCE)
        row = tl.load(table_ptr + where + r, mask=inside & (where >= 0), other=-1)
        # Forwards pre-activations are added, backwards the gradients of pre-activations.
        source_ptr = pre_ptr
        if BACKWARD:
            source_ptr = state_ptr
        v += tl.load(source_ptr + (source + row) * stride + n, mask=inside & (row >= 0), other=0.0)
        if not BACKWARD:
            tl.store(pre_ptr + (first + r) * stride + n, v, mask=inside)
    if BACKWARD:
        tl.store(state_ptr + (out + r) * stride + n, v, mask=inside)
    else:
        if (ACTIVATION == 4) | (ACTIVATION == 6):
            tl.store(state_ptr + (slope + r) * stride + n, v, mask=inside)
        tl.store(state_ptr + (out + r) * stride + n, activate(v, ACTIVATION), mask=inside)


# Neither the size of a batch nor where blocks of steps begin and end is anything to compile kernels for.
@triton.jit(do_not_specialize=["samples", "row0", "row1", "to"])
def rows_kernel(
    packed_ptr, rows_ptr, layer_ptr, table_ptr, state_ptr, pre_ptr, saved_ptr, context_ptr,
    samples, stride, all_rows, context_width, row0, row1, to,
    ACTIVATION: tl.constexpr, RESIDUALS: tl.constexpr, CONTEXTS: tl.constexpr, BACKWARD: tl.constexpr,
    LAST: tl.constexpr, FINISH: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Rows [row0, row1) of a layer, summed over the columns [0, to); finished, or left as sums."""
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)[None, :]
    r = row0 + tl.program_id(1).to(tl.int64) * R + tl.arange(0, R)
    first, columns = tl.load(layer_ptr + FIRST), tl.load(layer_ptr + COLUMNS)
    real = r < row1
    record = rows_ptr + first + r
    base = tl.load(record, mask=real, other=0)
    height = tl.load(record + all_rows, mask=real, other=0)
    depth = tl.minimum(tl.load(record + 2 * all_rows, mask=real, other=0), to)
    deepest = tl.max(depth, 0).to(tl.int32)
    total = tl.zeros((R, N), state_ptr.dtype.element_ty)
    for begin in range(0, deepest, K):
        k = begin + tl.arange(0, K)
        w = tl.load(
            packed_ptr + base[:, None] + k[None, :] * height[:, None], mask=k[None, :] < depth[:, None], other=0.0
        ).to(total.dtype)
        a = tl.load(
            state_ptr + (columns + k[:, None]) * stride + n, mask=(k[:, None] < deepest) & (n < samples), other=0.0
        )
        total = tl.dot(w, a, total, input_precision=PRECISION, out_dtype=total.dtype)
    inside = real[:, None] & (n < samples)
    if not BACKWARD:
        total += tl.load(packed_ptr + tl.load(layer_ptr + BIAS) + r, mask=real, other=0.0).to(total.dtype)[:, None]
        if CONTEXTS:
            column = tl.load(layer_ptr + CONTEXT)
            at = column + tl.load(table_ptr + tl.load(layer_ptr + PERM) + r, mask=real, other=0)
            total += tl.load(context_ptr + n * context_width + at[:, None], mask=inside & (column >= 0), other=0.0)
    if FINISH:
        finish(
            total, r[:, None], n, inside, layer_ptr, table_ptr, state_ptr, pre_ptr, saved_ptr, stride,
            ACTIVATION, RESIDUALS, BACKWARD, LAST,
        )  # fmt: skip
    else:
        tl.store(pre_ptr + (first + r[:, None]) * stride + n, total, mask=inside)


@triton.jit
def transform_features(
    f, n, inside, x_ptr, y_ptr, state_ptr, perm_ptr, theta, noise, samples, features, stride,
    LAW: tl.constexpr, NUMBERS: tl.constexpr, FORM: tl.constexpr, PER: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """The features f of the samples n, whose parameters begin at the kept row theta; their log-dets."""
    at = n * features + tl.load(perm_ptr + f, mask=f < features, other=0)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    parameters = state_ptr + (theta + PER * f) * stride + n
    if LAW < SPLINES:
        shift = tl.load(parameters, mask=inside, other=0.0)
        u = tl.load(parameters + stride, mask=inside, other=0.0)
        y, logdet = affine(x, shift, u, LAW, NUMBERS[0], NUMBERS[1], NUMBERS[2], FORM, INVERSE)
    else:
        y, logdet = spline(x, parameters, stride, inside, INVERSE, LAW - SPLINES, NUMBERS)
    tl.store(y_ptr + at, y, mask=inside)
    if INVERSE:
        tl.store(state_ptr + f * stride + n, y, mask=inside)
        tl.store(state_ptr + (noise + f) * stride + n, x, mask=inside)
    return tl.where(inside, logdet, 0.0)


@triton.jit
def transform_features_backward(
    r, n, inside, through, grad_y_ptr, grad_logdet_ptr, grad_x_ptr, state_ptr, saved_ptr, perm_ptr, theta, noise,
    samples, features, stride,
    LAW: tl.constexpr, NUMBERS: tl.constexpr, FORM: tl.constexpr, PER: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Row r of the backward net is feature features - 1 - r; what the transform was given is kept from row `noise`."""
    f = features - 1 - r
    at = n * features + tl.load(perm_ptr + f, mask=(f >= 0) & (f < features), other=0)
    grad_y = tl.load(grad_y_ptr + at, mask=inside, other=0.0) + through
    grad_logdet = tl.load(grad_logdet_ptr + n, mask=n < samples, other=0.0)
    x = tl.load(saved_ptr + (noise + f) * stride + n, mask=inside, other=0.0)
    parameters = saved_ptr + (theta + PER * f) * stride + n
    # Time runs backwards: the last parameter comes first.
    if LAW < SPLINES:
        shift = tl.load(parameters, mask=inside, other=0.0)
        u = tl.load(parameters + stride, mask=inside, other=0.0)
        grad_x, grad_shift, grad_u = affine_backward(
            grad_y, grad_logdet, x, shift, u, LAW, NUMBERS[0], NUMBERS[1], NUMBERS[2], FORM, INVERSE
        )
        tl.store(grad_x_ptr + at, grad_x, mask=inside)
        tl.store(state_ptr + 2 * r * stride + n, grad_u, mask=inside)
        tl.store(state_ptr + (2 * r + 1) * stride + n, grad_shift, mask=inside)
    else:
        grad_x = spline_backward(
            grad_y, grad_logdet, x, parameters, stride, state_ptr + (PER * r + PER - 1) * stride + n, -stride, inside,
            INVERSE, LAW - SPLINES, NUMBERS,
        )  # fmt: skip
        tl.store(grad_x_ptr + at, grad_x, mask=inside)


@triton.jit(do_not_specialize=["samples"])
def density_kernel(
    x_ptr, y_ptr, logdet_ptr, state_ptr, perm_ptr, theta, samples, features, stride,
    LAW: tl.constexpr, NUMBERS: tl.constexpr, FORM: tl.constexpr, PER: tl.constexpr,
    F: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    total = tl.zeros((N,), x_ptr.dtype.element_ty)
    for begin in range(0, features, F):
        f = begin + tl.arange(0, F)[:, None].to(tl.int64)
        inside = (f < features) & (n[None, :] < samples)
        total += tl.sum(
            transform_features(
                f, n[None, :], inside, x_ptr, y_ptr, state_ptr, perm_ptr, theta, 0, samples, features, stride,
                LAW, NUMBERS, FORM, PER, False,
            ),
            0,
        )  # fmt: skip
    tl.store(logdet_ptr + n, total, mask=n < samples)


@triton.jit(do_not_specialize=["samples"])
def density_backward_kernel(
    grad_y_ptr, grad_logdet_ptr, grad_x_ptr, state_ptr, saved_ptr, perm_ptr, theta, samples, features, stride,
    LAW: tl.constexpr, NUMBERS: tl.constexpr, FORM: tl.constexpr, PER: tl.constexpr,
    F: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)[None, :]
    r = tl.program_id(1).to(tl.int64) * F + tl.arange(0, F)[:, None]
    transform_features_backward(
        r, n, (r < features) & (n < samples), 0.0, grad_y_ptr, grad_logdet_ptr, grad_x_ptr, state_ptr, saved_ptr,
        perm_ptr, theta, 0, samples, features, stride, LAW, NUMBERS, FORM, PER, False,
    )  # fmt: skip


@triton.jit
def advance(
    packed_ptr, rows_ptr, layer_ptr, table_ptr, state_ptr, pre_ptr, saved_ptr, samples, stride, all_rows, n,
    block, step, time,
    ACTIVATION: tl.constexpr, RESIDUALS: tl.constexpr, BACKWARD: tl.constexpr, LAST: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The rows that become final at `step`: columns from the block's first on, final by `time`, are added."""
    first, columns = tl.load(layer_ptr + FIRST), tl.load(layer_ptr + COLUMNS)
    up_to = table_ptr + tl.load(layer_ptr + UP_TO) + step
    row0, row1 = tl.load(up_to).to(tl.int32), tl.load(up_to + 1).to(tl.int32)
    columns_up_to = table_ptr + tl.load(layer_ptr + COLUMNS_UP_TO)
    column0, column1 = tl.load(columns_up_to + block).to(tl.int32), tl.load(columns_up_to + time).to(tl.int32)
    for begin in range(row0, row1, R):
        r = begin + tl.arange(0, R)
        record = rows_ptr + first + r
        real = r < row1
        base = tl.load(record, mask=real, other=0)
        height = tl.load(record + all_rows, mask=real, other=0)
        depth = tl.minimum(tl.load(record + 2 * all_rows, mask=real, other=0), column1)
        inside = real[:, None] & (n[None, :] < samples)
        total = tl.load(pre_ptr + (first + r[:, None]) * stride + n[None, :], mask=inside, other=0.0)
        for k0 in range(column0, column1, K):
            k = k0 + tl.arange(0, K)
            w = tl.load(
                packed_ptr + base[:, None] + k[None, :] * height[:, None], mask=k[None, :] < depth[:, None], other=0.0
            ).to(total.dtype)
            a = tl.load(
                state_ptr + (columns + k[:, None]) * stride + n[None, :],
                mask=(k[:, None] < column1) & (n[None, :] < samples), other=0.0,
            )  # fmt: skip
            total += tl.sum(w[:, :, None] * a[None, :, :], 1)
        finish(
            total, r[:, None].to(tl.int64), n[None, :], inside, layer_ptr, table_ptr, state_ptr, pre_ptr, saved_ptr,
            stride, ACTIVATION, RESIDUALS, BACKWARD, LAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "block", "end"])
def sweep_kernel(
    packed_ptr, rows_ptr, layers_ptr, table_ptr, state_ptr, pre_ptr, saved_ptr, perm_ptr,
    x_ptr, y_ptr, logdet_ptr, theta, noise, samples, features, stride, all_rows, block, end,
    LAW: tl.constexpr, NUMBERS: tl.constexpr, FORM: tl.constexpr, PER: tl.constexpr,
    LAYERS: tl.constexpr, ACTIVATIONS: tl.constexpr, RESIDUALS: tl.constexpr, BACKWARD: tl.constexpr,
    R: tl.constexpr, LAST_R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The steps [block, end) of a tile of samples. Backwards x, y, logdet are the gradients of y, of x and of logdet.

    ACTIVATIONS holds one decimal digit for each layer: constants of a kernel have to be numbers.
    What one thread stores others load: the barriers stand for that.
    """
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    last_ptr = layers_ptr + (LAYERS - 1) * FIELDS
    for step in range(block, end):
        advance(
            packed_ptr, rows_ptr, last_ptr, table_ptr, state_ptr, pre_ptr, saved_ptr, samples, stride, all_rows, n,
            block, step, step, 0, False, BACKWARD, True, LAST_R, K,
        )  # fmt: skip
        tl.debug_barrier()
        up_to = table_ptr + tl.load(last_ptr + UP_TO) + step
        row0, row1 = tl.load(up_to).to(tl.int32), tl.load(up_to + 1).to(tl.int32)
        if BACKWARD:
            out = tl.load(last_ptr + OUT)
            for begin in range(row0, row1, R):
                r = begin + tl.arange(0, R)[:, None].to(tl.int64)
                inside = (r < row1) & (n[None, :] < samples)
                through = tl.load(state_ptr + (out + r) * stride + n[None, :], mask=inside, other=0.0)
                transform_features_backward(
                    r, n[None, :], inside, through, x_ptr, logdet_ptr, y_ptr, state_ptr, saved_ptr, perm_ptr,
                    theta, noise, samples, features, stride, LAW, NUMBERS, FORM, PER, True,
                )  # fmt: skip
        else:
            total = tl.load(logdet_ptr + n, mask=n < samples, other=0.0)
            for begin in range(row0 // PER, row1 // PER, R):
                f = begin + tl.arange(0, R)[:, None].to(tl.int64)
                inside = (f < row1 // PER) & (n[None, :] < samples)
                total += tl.sum(
                    transform_features(
                        f, n[None, :], inside, x_ptr, y_ptr, state_ptr, perm_ptr, theta, noise, samples, features,
                        stride, LAW, NUMBERS, FORM, PER, True,
                    ),
                    0,
                )  # fmt: skip
            tl.store(logdet_ptr + n, total, mask=n < samples)
        tl.debug_barrier()
        for layer in tl.static_range(LAYERS - 1):
            advance(
                packed_ptr, rows_ptr, layers_ptr + layer * FIELDS, table_ptr, state_ptr, pre_ptr, saved_ptr,
                samples, stride, all_rows, n, block, step, step + 1,
                (ACTIVATIONS // (10**layer)) % 10, RESIDUALS, BACKWARD, False, R, K,
            )  # fmt: skip
            tl.debug_barrier()


@triton.jit
def pack_kernel(
    weight_ptr, mask_ptr, packed_ptr, rows_ptr, perm_ptr, columns_ptr,
    rows, columns, all_rows, row_stride, column_stride,
    R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Weights of one layer into its panels, masked ones as zero."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    k = tl.program_id(1).to(tl.int64) * K + tl.arange(0, K)
    base = tl.load(rows_ptr + r, mask=r < rows, other=0)
    height = tl.load(rows_ptr + all_rows + r, mask=r < rows, other=0)
    depth = tl.load(rows_ptr + 2 * all_rows + r, mask=r < rows, other=0)
    inside = k[None, :] < depth[:, None]
    row = tl.load(perm_ptr + r, mask=r < rows, other=0)
    column = tl.load(columns_ptr + k, mask=k < columns, other=0)
    at = row[:, None] * row_stride + column[None, :] * column_stride
    exists = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    w = tl.load(weight_ptr + at, mask=inside & exists, other=0.0)
    tl.store(packed_ptr + base[:, None] + k[None, :] * height[:, None], w, mask=inside)


# ---- plans ---------------------------------------------------------------------------------------------------------


class _Net:
    """A plan's table (csrc/common/net.h) as the launches need it; `forward` is the other direction's of a transposed
    net."""

    def __init__(self, table: Tensor, forward: _Net | None = None) -> None:
        t = table.cpu()
        header = t[:16].tolist()
        self.steps, count, blocks, self.inputs = header[:4]
        self.features, self.parameters, self.context_width = header[8:11]
        self.blocks: list[int] = t[header[7] : header[7] + blocks + 1].tolist()
        self.records: list[list[int]] = t[16 : 16 + 16 * count].view(count, 16).tolist()
        times = [header[6], *(record[8] for record in self.records)]
        self.up_to: list[list[int]] = [t[begin : begin + self.steps + 1].tolist() for begin in times]
        rows = [record[0] for record in self.records]
        self.rows_of = rows
        self.all_rows = sum(rows)
        self.residuals = any(record[5] >= 0 for record in self.records)
        self.activations = [record[4] for record in self.records]
        orders = [header[5], *(record[7] for record in self.records)]
        perms = [t[begin : begin + n] for begin, n in zip(orders, (self.inputs, *rows), strict=True)]
        self.perms = [p.to(table.device) for p in perms]  # of what the first layer reads, then of every layer
        self.data = t[header[12] : header[12] + self.inputs].to(table.device)  # where the features lie in a row of x

        # Kept rows, as csrc/cuda/maf.cu has them: inputs, and per layer outputs and pre-activations that slopes need.
        self.out: list[int] = []
        self.slope: list[int] = []
        kept = self.inputs
        for record in self.records:
            self.out.append(kept)
            if not record[3] and ACTIVATIONS[record[4]] in ("silu", "gelu"):
                kept += record[0]
            self.slope.append(kept)
            kept += record[0]
        self.kept = kept
        layers, pieces, first = [], [], 0
        for at, record in enumerate(self.records):
            panels = t[record[10] : record[10] + 5 * record[11]].view(-1, 5)
            row, many, height, depth, offset = (panels[:, i] for i in range(5))
            in_panel = torch.arange(record[0]) - row.repeat_interleave(many)
            base = offset.repeat_interleave(many) + in_panel
            pieces.append(torch.stack([base, height.repeat_interleave(many), depth.repeat_interleave(many)]))
            slope = self.slope[at]
            if forward is not None:
                slope = forward.slope[count - 2 - at] + record[0] - 1 if at < count - 1 else 0
            source = 0
            if record[5] >= 0:
                source = self.out[record[5]] if forward is not None else sum(rows[: record[5]])
            layers.append(
                [
                    first, self.out[at - 1] if at else 0, self.out[at], slope, record[8],
                    self.records[at - 1][8] if at else header[6], record[6], record[7], source, *record[12:14], 0,
                ]
            )  # fmt: skip
            first += record[0]
        self.rows = torch.cat(pieces, 1).contiguous().to(table.device)
        self.layers = torch.tensor(layers).to(table.device)


_nets: Any = WeakIdKeyDictionary()
_layouts: Any = WeakIdKeyDictionary()  # of transposed nets whose forward net is not known: enough for packing


def _net(table: Tensor, forward: _Net | None = None) -> _Net:
    net: _Net | None = _nets.get(table)
    if net is None:
        net = _nets[table] = _Net(table, forward)
    return net


# ---- launches ------------------------------------------------------------------------------------------------------


def _tiles(dtype: torch.dtype, rows: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """(rows, samples, columns) of a program of rows_kernel. The rows of a block of steps are few."""
    if INTERPRETED:
        return (64, 64, 64), {}
    if dtype == torch.float64:
        return (16, 32, 16), {"num_warps": 4}
    return (16 if rows <= 64 else 64, 64, 16), {"num_warps": 4 if rows <= 64 else 8, "num_stages": 2}


# Few warps meet at a barrier sooner, and this with a tile of two rows is what ptxas compiles without spills for every
# type and architecture. Nothing is fetched ahead: a step reads what the step before it has stored.
_SWEEP = {"num_warps": 2, "num_stages": 1}


def _sweep_tile() -> tuple[int, int, int]:
    """(rows, samples, columns) of a step."""
    return (16, 64, 64) if INTERPRETED else (2, 32, 16)


def _last_rows(law: int, backward: bool) -> int:
    """Rows of the last layer at a time: where all other layers have a few that become final in a step, the parameters
    of a spline are dozens."""
    return 8 if law >= SPLINES.value and not backward else _sweep_tile()[0]


class _Run:
    """One net over one batch: the buffers, and the launches on them."""

    def __init__(
        self, net: _Net, packed: Tensor, table: Tensor, state: Tensor, samples: int, *, sweep: bool,
        saved: Tensor | None = None, context: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.net, self.packed, self.table, self.state, self.samples = net, packed, table, state, samples
        self.backward = saved is not None
        self.saved = state if saved is None else saved
        self.context = None if context is None else context.contiguous()
        # Sums of a block that wait for its steps, and pre-activations that residual connections read.
        rows = net.all_rows if sweep or net.residuals else 0
        self.pre = state.new_empty(rows, state.shape[1])

    def rows(self, layer: int, row0: int, row1: int, to: int, finished: bool) -> None:
        if row1 == row0:
            return
        net, state = self.net, self.state
        (r, n, k), launch = _tiles(state.dtype, row1 - row0)
        grid = triton.cdiv(self.samples, n), triton.cdiv(row1 - row0, r)
        rows_kernel[grid](
            self.packed, net.rows, net.layers[layer], self.table, state, self.pre, self.saved,
            state if self.context is None else self.context,
            self.samples, state.shape[1], net.all_rows, net.context_width, row0, row1, to,
            net.activations[layer], net.residuals, self.context is not None, self.backward,
            layer == len(net.records) - 1, finished, _precision(state.dtype), r, n, k, **launch,
        )  # fmt: skip

    def dense(self) -> None:
        for layer, count in enumerate(self.net.rows_of):
            self.rows(layer, 0, count, 1 << 30, True)

    def sweep(
        self, x: Tensor, y: Tensor, logdet: Tensor, theta: int, noise: int, perm: Tensor,
        law: int, numbers: Sequence[float], form: int,
    ) -> None:  # fmt: skip
        net = self.net
        r, n, k = _sweep_tile()
        for layer in range(len(net.records) - 1):  # what depends on no feature at all
            self.rows(layer, 0, net.up_to[layer + 1][0], net.up_to[layer][0], True)
        for begin, end in zip(net.blocks, net.blocks[1:], strict=False):
            for layer in range(len(net.records)):
                up_to = net.up_to[layer + 1]
                self.rows(layer, up_to[begin], up_to[end], net.up_to[layer][begin], False)
            sweep_kernel[(triton.cdiv(self.samples, n),)](
                self.packed, net.rows, net.layers, self.table, self.state, self.pre, self.saved, perm,
                x, y, logdet, theta, noise, self.samples, net.features, self.state.shape[1], net.all_rows, begin, end,
                *_transform(law, numbers, form, net),
                len(net.records), sum(a * 10**i for i, a in enumerate(net.activations)), net.residuals, self.backward,
                r, _last_rows(law, self.backward), n, k, **_SWEEP, **_registers(law),
            )  # fmt: skip


def _features(law: int) -> int:
    """Features of a program that transforms 32 samples: a spline is one element per lane."""
    if INTERPRETED:
        return 64
    return 16 if law < SPLINES.value else 4


def _registers(law: int) -> dict[str, int]:
    return {} if law < SPLINES.value else REGISTERS


def _transform(
    law: int, numbers: Sequence[float], form: int, net: _Net
) -> tuple[int, tuple[float | int, ...], int, int]:
    """LAW, NUMBERS, FORM and PER."""
    splines = SPLINES.value
    described = tuple(numbers[:3]) if law < splines else options_of(law - splines, numbers[:5], int(numbers[5]))
    return law, described, form, net.parameters


def _precision(dtype: torch.dtype) -> str:
    """float32 products in three TF32 products on tensor cores, with float32's accuracy."""
    return "ieee" if INTERPRETED or dtype != torch.float32 else "tf32x3"


def maf_pack(parameters: Sequence[Tensor], masks: Sequence[Tensor], table: Tensor, size: int) -> Tensor:
    # A transposed net's layout is read on its own here: slopes are none of packing's business.
    net = _nets.get(table) or _layouts.get(table)
    if net is None:
        net = _layouts[table] = _Net(table)
    packed = parameters[0].new_zeros(size)
    first = 0
    for at, record in enumerate(net.records):
        rows, columns, weight, transposed, bias = record[0], record[1], record[2], record[3], record[12]
        w = parameters[2 * weight].contiguous()
        strides = (1, w.shape[1]) if transposed else (w.shape[1], 1)
        if rows and columns:
            pack_kernel[(triton.cdiv(rows, 32), triton.cdiv(columns, 32))](
                w, masks[weight].view(torch.uint8), packed, net.rows[:, first:], net.perms[at + 1], net.perms[at],
                rows, columns, net.all_rows, *strides, 32, 32,
            )  # fmt: skip
        if bias >= 0:
            packed[bias : bias + rows] = parameters[2 * weight + 1][net.perms[at + 1]]
        first += rows
    return packed


def _stride(samples: int) -> int:
    return (samples + _LANES - 1) // _LANES * _LANES


def maf_forward(
    x: Tensor, context: Tensor | None, packed: Tensor, table: Tensor, law: int, numbers: Sequence[float], form: int,
    saved: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    net, samples, x = _net(table), x.shape[0], x.contiguous()
    y, logdet = torch.empty_like(x), x.new_empty(samples)
    if samples:
        state = x.new_empty(net.kept, _stride(samples)) if saved is None else saved
        state[: net.inputs, :samples] = x.t()[net.data]
        _Run(net, packed, table, state, samples, sweep=False, context=context).dense()
        density_kernel[(triton.cdiv(samples, 32),)](
            x, y, logdet, state, net.data, net.out[-1], samples, net.features, state.shape[1],
            *_transform(law, numbers, form, net), _features(law), 32, **_registers(law),
        )  # fmt: skip
    return y, logdet


def maf_inverse(
    x: Tensor, context: Tensor | None, packed: Tensor, table: Tensor, law: int, numbers: Sequence[float], form: int,
    saved: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    net, samples, x = _net(table), x.shape[0], x.contiguous()
    y, logdet = torch.empty_like(x), x.new_zeros(samples)
    if samples:
        state = x.new_empty(net.kept + net.features, _stride(samples)) if saved is None else saved
        run = _Run(net, packed, table, state, samples, sweep=True, context=context)
        run.sweep(x, y, logdet, net.out[-1], net.kept, net.data, law, numbers, form)
    return y, logdet


def _backward(
    inverse: bool, grad_y: Tensor, grad_logdet: Tensor, saved: Tensor, packed_back: Tensor, masks: Sequence[Tensor],
    table: Tensor, table_back: Tensor, law: int, numbers: Sequence[float], form: int, context_width: int,
    want_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    net = _net(table)
    back, samples = _net(table_back, net), grad_y.shape[0]
    grad_y, grad_logdet = grad_y.contiguous(), grad_logdet.contiguous()
    grad_x = torch.empty_like(grad_y)
    grads = grad_y.new_empty(back.kept, _stride(samples))
    if samples:
        run = _Run(back, packed_back, table_back, grads, samples, sweep=inverse, saved=saved)
        if inverse:
            run.sweep(grad_y, grad_x, grad_logdet, net.out[-1], net.kept, net.data, law, numbers, form)
        else:
            features = _features(law)
            density_backward_kernel[(triton.cdiv(samples, 32), triton.cdiv(net.features, features))](
                grad_y, grad_logdet, grad_x, grads, saved, net.data, net.out[-1], samples, net.features,
                grads.shape[1], *_transform(law, numbers, form, net), features, 32, **_registers(law),
            )  # fmt: skip
            run.dense()
            through = grads[back.out[-1] : back.out[-1] + net.features, :samples].flip(0)
            grad_x[:, net.data] += through.t()
    # Rows of gradients of pre-activations, per layer, in the forward net's order.
    layers = len(net.records)
    of_layer = []
    for at, count in enumerate(net.rows_of):
        first = 0 if at == layers - 1 else back.out[layers - 2 - at]
        of_layer.append(grads[first : first + count, :samples].flip(0))
    grad_context = grad_y.new_zeros(samples, context_width)
    for at, record in enumerate(net.records):
        if record[13] >= 0:
            grad_context[:, record[13] + net.perms[at + 1]] = of_layer[at].t()
    if not want_parameters:
        return grad_x, grad_context, grad_y.new_empty(0)
    parts = []
    for at, mask in enumerate(masks):
        first = net.out[at - 1] if at else 0
        product = of_layer[at] @ saved[first : first + len(net.perms[at]), :samples].t()
        weight, bias = grad_y.new_zeros(mask.shape), grad_y.new_zeros(mask.shape[0])
        weight[net.perms[at + 1][:, None], net.perms[at]] = product
        bias[net.perms[at + 1]] = of_layer[at].sum(1)
        parts += [weight.masked_fill_(~mask, 0.0).flatten(), bias]
    return grad_x, grad_context, torch.cat(parts)


def maf_forward_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(False, *args)


def maf_inverse_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(True, *args)


class _Kernels:
    """The functions above under the names of the C++ operators."""

    maf_forward = staticmethod(maf_forward)
    maf_inverse = staticmethod(maf_inverse)
    maf_forward_backward = staticmethod(maf_forward_backward)
    maf_inverse_backward = staticmethod(maf_inverse_backward)


def maf(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cuda.maf(*args, kernels=_Kernels)


def maf_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cuda.maf_backward(*args, kernels=_Kernels)


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """What tests/gpu compiles without a GPU."""
    indices = dict.fromkeys(("rows_ptr", "layer_ptr", "layers_ptr", "table_ptr", "perm_ptr", "columns_ptr"), "*i64")
    sizes = dict.fromkeys(("features", "block", "end", "to", "row0", "row1"), "i32")
    names = (
        "packed",
        "state",
        "pre",
        "saved",
        "context",
        "x",
        "y",
        "logdet",
        "grad_y",
        "grad_logdet",
        "grad_x",
        "weight",
    )
    affine = {"LAW": 1, "NUMBERS": (0.0, 1e-3, 0.0), "FORM": 0, "PER": 2}
    splines = {
        style: {"LAW": SPLINES.value + code, "NUMBERS": options_of(code, numbers, 8), "FORM": 0, "PER": per}
        for style, code, numbers, per in COMPILED
    }
    for name, dtype, stored, style in (
        ("fp32", torch.float32, "fp32", "zuko"),
        ("fp64", torch.float64, "fp64", "linear"),
        ("fp32 of bf16", torch.float32, "bf16", "nflows"),
    ):
        pointers = {**{f"{n}_ptr": f"*{name[:4]}" for n in names}, **indices, **sizes, "mask_ptr": "*u8"}
        pointers |= {"packed_ptr": f"*{stored}", "weight_ptr": f"*{stored}"}
        transforms = {"affine": affine, style: splines[style]}
        for backward in (False, True):
            for rows in (16, 1024):
                (r, n, k), launch = _tiles(dtype, rows)
                for finished in (False, True):
                    constants = {
                        "ACTIVATION": 4, "RESIDUALS": True, "CONTEXTS": not backward, "BACKWARD": backward,
                        "LAST": False, "FINISH": finished, "PRECISION": _precision(dtype), "R": r, "N": n, "K": k,
                    }  # fmt: skip
                    label = f"maf rows {name} backward={backward} {r} rows finished={finished}"
                    yield label, rows_kernel, pointers, constants, launch
            r, n, k = _sweep_tile()
            constants = {
                "LAYERS": 3, "ACTIVATIONS": 42, "RESIDUALS": True, "BACKWARD": backward, "R": r, "N": n, "K": k
            }  # fmt: skip
            for transform, described in transforms.items():
                label = f"maf sweep {transform} {name} backward={backward}"
                law = described["LAW"]
                last = {"LAST_R": _last_rows(law, backward)}
                yield label, sweep_kernel, pointers, {**described, **constants, **last}, {**_SWEEP, **_registers(law)}
        for transform, described in transforms.items():
            constants = {**described, "F": _features(described["LAW"]), "N": 32}
            for label, kernel in (("density", density_kernel), ("density gradient", density_backward_kernel)):
                options = {"num_warps": 4, **_registers(described["LAW"])}
                yield f"maf {label} {transform} {name}", kernel, pointers, constants, options
        yield f"maf pack {name}", pack_kernel, pointers, {"R": 32, "K": 32}, {"num_warps": 4}
