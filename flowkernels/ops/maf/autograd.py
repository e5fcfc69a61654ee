"""Operators and gradients of autoregressive transforms, one or a chain of them in one call.

Forward keeps the activations when a gradient is wanted. Backward runs each network transposed, with time reversed:
densely for the density direction, as a sweep for the sampling direction. Both then form the weights' gradients from
what they left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkernels._autograd import Function, not_twice_differentiable
from flowkernels._library import operator, vmap_loop
from flowkernels.scales import NAMES as LAWS

_LANES = 16  # csrc/cpu/panels.h: kLanes
CODES = 4  # numbers per transform in `codes`: law, form, inverse, saved rows
NUMBERS = 6  # numbers per transform in `numbers`: flowkernels.transforms.code_and_numbers


def form_of(codes: Sequence[int]) -> str:
    """What a chain is called where backends are chosen: one with a spline has kernels of its own."""
    return "maf_spline" if any(law >= len(LAWS) for law in codes[::CODES]) else "maf"


def _compiled_only(*args: Any) -> Any:
    raise NotImplementedError(
        "the packed autoregressive operators exist as compiled kernels only; this device has none"
    )


def _fake_pack(parameters: list[Tensor], masks: list[Tensor], table: Tensor, size: int) -> Tensor:
    return parameters[0].new_empty(size)


def _fake_maf(x: Tensor, contexts: Any, packed: Any, tables: Any, codes: list[int], numbers: Any, density: bool) -> Any:
    samples = x.shape[0]
    saved = x.new_empty(sum(codes[CODES - 1 :: CODES]), (samples + _LANES - 1) // _LANES * _LANES)
    return x.new_empty(x.shape), x.new_empty(samples), saved


def _fake_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    saved: Tensor,
    packed_back: Any,
    masks: list[Tensor],
    tables: Any,
    tables_back: Any,
    codes: Any,
    numbers: Any,
    context_widths: list[int],
    want_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = sum(m.numel() + m.shape[0] for m in masks) if want_parameters else 0
    contexts = grad_y.new_empty(sum(context_widths) * grad_y.shape[0])
    return grad_y.new_empty(grad_y.shape), contexts, grad_y.new_empty(count)


def _vmap_maf(info: Any, dims: Any, *args: Any) -> Any:
    x, codes = args[0], args[4]
    batched_weights = any(d is not None for group in dims[1:4] for d in (group or ()))
    if dims[0] is None or batched_weights or args[1] or any(codes[CODES - 1 :: CODES]):
        return vmap_loop(maf_op, info, dims, args)
    rows = x.movedim(dims[0], 0)
    y, logdet, saved = maf_op(rows.reshape(-1, rows.shape[-1]), *args[1:])
    return (y.reshape(rows.shape), logdet.reshape(rows.shape[:2]), saved), (0, 0, None)


def _no_fingerprint(tensors: list[Tensor], lengths: list[int]) -> Tensor:
    raise NotImplementedError("fingerprints are taken of tensors in this process's memory only")


fingerprint_op: Any = operator(
    "fingerprint(Tensor[] tensors, int[] lengths) -> Tensor",
    _no_fingerprint,
    vmap=_no_fingerprint,
)
pack_op: Any = operator(
    "maf_pack(Tensor[] parameters, Tensor[] masks, Tensor table, int size) -> Tensor",
    _compiled_only,
    fake=_fake_pack,
)
maf_op: Any = operator(
    "maf(Tensor x, Tensor[] contexts, Tensor[] packed, Tensor[] tables, int[] codes, float[] numbers,"
    " bool density) -> (Tensor, Tensor, Tensor)",
    _compiled_only,
    vmap=_vmap_maf,
    fake=_fake_maf,
)
backward_op: Any = operator(
    "maf_backward(Tensor grad_y, Tensor grad_logdet, Tensor saved, Tensor[] packed_back, Tensor[] masks,"
    " Tensor[] tables, Tensor[] tables_back, int[] codes, float[] numbers, int[] context_widths, bool want_parameters)"
    " -> (Tensor, Tensor, Tensor)",
    _compiled_only,
    fake=_fake_backward,
)


class Maf(Function):
    """A chain of transforms. The weights come packed; the parameters come along to receive their gradients.

    With `density`, log N(y; 0, I) is part of the log-det.

    `tensors` holds, `lengths[i]` of each kind: contexts, packed, packed_back, tables, tables_back, masks, parameters.
    """

    @staticmethod
    def forward(
        x: Tensor, lengths: Sequence[int], codes: list[int], numbers: list[float], density: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        contexts, packed, _, tables, *_ = _split(tensors, lengths)
        y, logdet, saved = maf_op(x, contexts, packed, tables, codes, numbers, density)
        return y, logdet, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, lengths, ctx.codes, ctx.numbers, ctx.density, *tensors = inputs
        contexts, _, packed_back, ctx.tables, ctx.tables_back, ctx.masks, parameters = _split(tensors, lengths)
        ctx.context_widths = [c.shape[1] for c in contexts] or [0] * len(packed_back)
        ctx.context_count = len(contexts)
        ctx.fixed = len(tensors) - len(contexts) - len(parameters)
        # x, contexts and parameters are kept only to say of which tensors there is no second derivative.
        ctx.save_for_backward(output[2], *packed_back, *(output[:1] if ctx.density else ()), x, *contexts, *parameters)
        ctx.steps = len(packed_back)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor, _: Any) -> Any:
        saved, *kept = ctx.saved_tensors
        packed_back, inputs = kept[: ctx.steps], kept[ctx.steps :]
        needs = ctx.needs_input_grad[5 + ctx.context_count + ctx.fixed :]
        want_parameters = any(needs)
        given = (grad_y, grad_logdet)
        if ctx.density:  # d log N(y; 0, I) / dy = -y
            y, *inputs = inputs
            grad_y = torch.addcmul(grad_y, grad_logdet.unsqueeze(1), y, value=-1)
        grads = backward_op(
            grad_y,
            grad_logdet,
            saved,
            packed_back,
            ctx.masks,
            ctx.tables,
            ctx.tables_back,
            ctx.codes,
            ctx.numbers,
            ctx.context_widths,
            want_parameters,
        )
        grad_x, flat_contexts, flat = not_twice_differentiable("maf", grads, (*given, *inputs))
        samples = grad_y.shape[0]
        contexts: tuple[Tensor, ...] = ()
        if ctx.context_count:
            parts = flat_contexts.split([w * samples for w in ctx.context_widths])
            contexts = tuple(p.view(samples, w) for p, w in zip(parts, ctx.context_widths, strict=True))
        parameters: list[Tensor | None] = [None] * len(needs)
        if want_parameters:
            parts = flat.split([n for m in ctx.masks for n in (m.numel(), m.shape[0])])
            weights = inputs[1 + ctx.context_count :]
            for i, (part, need, weight) in enumerate(zip(parts, needs, weights, strict=True)):
                if need:
                    part = part if part.dtype == weight.dtype else part.to(weight.dtype)  # weights in halves
                    parameters[i] = part if i % 2 else part.view(ctx.masks[i // 2].shape)
        return grad_x, None, None, None, None, *contexts, *(None,) * ctx.fixed, *parameters


def _split(tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    parts, begin = [], 0
    for length in lengths:
        parts.append(list(tensors[begin : begin + length]))
        begin += length
    return parts
