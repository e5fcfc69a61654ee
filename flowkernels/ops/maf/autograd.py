"""Operators and gradients of the autoregressive transform.

Forward keeps the activations when a gradient is wanted. Backward runs the same network transposed, with time reversed: densely
for the density direction, as a sweep for the sampling direction. Both then form the weights' gradients from what they left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkernels._autograd import not_twice_differentiable
from flowkernels._library import operator, vmap_loop, vmap_rows

_OPTIONS = "int law, float[] law_parameters, int form"
_LANES = 16  # csrc/cpu/maf.h


def _compiled_only(*args: Any) -> Any:
    raise NotImplementedError("the packed autoregressive operators exist as compiled kernels only; this device has none")


def _fake_pack(parameters: list[Tensor], masks: list[Tensor], table: Tensor, size: int) -> Tensor:
    return parameters[0].new_empty(size)


def _fake(
    x: Tensor, context: Tensor | None, packed: Tensor, table: Tensor, law: int, numbers: list[float], form: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    samples = x.shape[0]
    return x.new_empty(x.shape), x.new_empty(samples), x.new_empty(rows, ((samples + _LANES - 1) // _LANES + 1) * _LANES)


def _fake_backward(
    grad_output: Tensor, grad_logdet: Tensor, x: Tensor, saved: Tensor, packed_back: Tensor, masks: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, context_width, want_parameters = rest
    count = sum(m.numel() + m.shape[0] for m in masks) if want_parameters else 0
    return x.new_empty(x.shape), x.new_empty(x.shape[0], context_width), x.new_empty(count)


def _vmap(op: Any, info: Any, dims: Any, *args: Any) -> Any:
    if dims[2] is not None or args[-1]:  # many sets of weights, or activations to keep per set
        return vmap_loop(op, info, dims, args)
    y, logdet = vmap_rows(
        lambda *a: op(*a)[:2], info, dims, args, (2, None if args[1] is None else 2, None, None, None, None, None, None)
    )[0]
    return (y, logdet, y.new_empty(info.batch_size, 0, 0)), (0, 0, 0)


def _direction(name: str) -> tuple[Any, Any]:
    forward: Any = operator(
        f"{name}(Tensor x, Tensor? context, Tensor packed, Tensor table, {_OPTIONS}, int saved_rows)"
        " -> (Tensor, Tensor, Tensor)",
        _compiled_only,
        vmap=lambda info, dims, *args: _vmap(forward, info, dims, *args),
        fake=_fake,
    )
    backward: Any = operator(
        f"{name}_backward(Tensor grad_output, Tensor grad_logdet, Tensor x, Tensor saved, Tensor packed_back, Tensor[] masks,"
        f" Tensor table, Tensor table_back, {_OPTIONS}, int context_width, bool want_parameters)"
        " -> (Tensor, Tensor, Tensor)",
        _compiled_only,
        vmap=lambda info, dims, *args: vmap_loop(backward, info, dims, args),
        fake=_fake_backward,
    )
    return forward, backward


pack_op: Any = operator(
    "maf_pack(Tensor[] parameters, Tensor[] masks, Tensor table, int size) -> Tensor",
    _compiled_only,
    vmap=lambda info, dims, *args: vmap_loop(pack_op, info, dims, args),
    fake=_fake_pack,
)
FORWARD, INVERSE = _direction("maf_forward"), _direction("maf_inverse")


class Maf(torch.autograd.Function):
    """Either direction. `packed` and `packed_back` carry the weights; `parameters` come along to receive their gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        context: Tensor | None,
        packed: Tensor,
        packed_back: Tensor,
        tables: tuple[Tensor, Tensor],
        masks: Sequence[Tensor],
        inverse: bool,
        law: int,
        numbers: list[float],
        form: int,
        saved_rows: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        op = (INVERSE if inverse else FORWARD)[0]
        y, logdet, saved = op(x, context, packed, tables[0], law, numbers, form, saved_rows)
        return y, logdet, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, context, _, packed_back, ctx.tables, ctx.masks, ctx.inverse, *options = inputs
        ctx.options = tuple(options[:3])
        ctx.context_width = 0 if context is None else context.shape[1]
        ctx.want_parameters = any(ctx.needs_input_grad[11:])
        ctx.save_for_backward(x, output[2], packed_back)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor, _: Any) -> Any:  # type: ignore[override]
        x, saved, packed_back = ctx.saved_tensors
        op = (INVERSE if ctx.inverse else FORWARD)[1]
        grad_x, grad_context, flat = op(
            grad_y,
            grad_logdet,
            x,
            saved,
            packed_back,
            ctx.masks,
            *ctx.tables,
            *ctx.options,
            ctx.context_width,
            ctx.want_parameters,
        )
        grad_x, grad_context, flat = not_twice_differentiable(
            "maf_inverse" if ctx.inverse else "maf_forward", (grad_x, grad_context, flat), (grad_y, grad_logdet, x)
        )
        grads: list[Tensor | None] = [None] * (2 * len(ctx.masks))
        if ctx.want_parameters:
            sizes = [n for m in ctx.masks for n in (m.numel(), m.shape[0])]
            grads = [g if i % 2 else g.view(ctx.masks[i // 2].shape) for i, g in enumerate(flat.split(sizes))]
            grads = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[11:], strict=True)]
        return grad_x, grad_context if ctx.context_width else None, *(None,) * 9, *grads

