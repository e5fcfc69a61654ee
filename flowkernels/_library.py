"""Declares the torch operators and loads the compiled kernels.

Each operator is declared once. Its plain-PyTorch reference is registered as the composite implementation: the
fallback on every device, the fake kernel for tracing, and the truth that the kernels are tested against. The compiled
library then adds its CPU kernels on top; on CUDA tensors `_cuda.run` chooses between CUDA C++ and Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("flowkernels", "DEF")
LIBRARY.define("build_info() -> str")
LIBRARY.define("fresh_output(Tensor like) -> Tensor")

# Operators with GPU kernels, CUDA C++ or Triton; the others run as their reference on CUDA tensors.
ON_CUDA = {
    "affine_coupling", "affine_coupling_backward", "masked_linear", "masked_linear_backward",
    "maf_pack", "maf", "maf_backward",
    "rq_spline", "rq_spline_backward",
    "gumbel_softmax", "gumbel_softmax_backward", "gumbel_argmax",
    "logistic_mixture", "logistic_mixture_backward", "dequantize",
}  # fmt: skip

# Why the compiled kernels are not here, or None when they are.
load_error: str | None = None


def operator(
    schema: str,
    reference: Callable[..., Any],
    *,
    vmap: Callable[..., Any] | None = None,
    rows: Sequence[int | None] | None = None,
    fake: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload[..., Any]:
    """Declares ``flowkernels::<schema>`` with `reference` as its composite implementation and returns the operator.

    `vmap(info, in_dims, *args)` is the batching rule; without one it is `vmap_rows` with the ranks in `rows`, or
    `vmap_loop` without those. `fake` gives only the outputs' shapes, for operators whose reference takes too long to
    trace.
    """
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0].strip()
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if name in ON_CUDA:
        LIBRARY.impl(name, lambda *args: _run_on_cuda(name, reference, *args), "CUDA")
    if fake is not None:
        torch.library.register_fake(f"flowkernels::{name}", fake, lib=LIBRARY)
    overload: torch._ops.OpOverload[..., Any] = getattr(torch.ops.flowkernels, name).default

    def batched(info: Any, dims: Any, *args: Any) -> Any:
        return vmap_loop(overload, info, dims, args) if rows is None else vmap_rows(overload, info, dims, args, rows)

    torch.library.register_vmap(f"flowkernels::{name}", vmap or batched, lib=LIBRARY)
    return overload


def _run_on_cuda(name: str, reference: Callable[..., Any], *args: Any) -> Any:
    from flowkernels import _cuda

    return _cuda.run(name, reference, *args)


def load_compiled() -> None:
    """Loads flowkernels/_C*.so if it was built; remembers why not otherwise."""
    global load_error
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        load_error = "the C++ kernels were not built (FLOWKERNELS_BUILD=0, or no `pip install` yet)"
        return
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        load_error = f"{libraries[0].name} does not load with torch {torch.__version__}: {error}"


def is_built() -> bool:
    return load_error is None


def build_info() -> dict[str, str]:
    """What the compiled library says of itself: instruction sets, compiler, the torch ABI that it was built for."""
    if not is_built():
        return {}
    text: str = torch.ops.flowkernels.build_info()
    return dict(item.split("=", 1) for item in text.split(";"))


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to hear of this call; when not, the operator is called without an autograd Function."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def vmap_rows(
    op: Callable[..., Any], info: Any, in_dims: Sequence[Any], args: Sequence[Any], ranks: Sequence[int | None]
) -> Any:
    """Batching rule of an operator whose tensors have a leading dimension of independent rows.

    `ranks[i]` is the rank of tensor argument i (None for what is no tensor). The mapped dimension is merged into the
    rows, the operator is called once, and the rows are split again.
    """
    size, rows = info.batch_size, None
    for arg, dim, rank in zip(args, in_dims, ranks, strict=True):
        if rank is not None and arg is not None:
            shape = list(arg.shape)
            if dim is not None:
                shape.pop(dim)
            rows = shape[0]
    merged = []
    for arg, dim, rank in zip(args, in_dims, ranks, strict=True):
        if rank is None or arg is None:
            merged.append(arg)
            continue
        front = arg.movedim(dim, 0) if dim is not None else arg.expand(size, *arg.shape)
        merged.append(front.reshape(-1, *front.shape[2:]))
    outputs = op(*merged)
    single = isinstance(outputs, Tensor)
    split = tuple(out.reshape(size, rows, *out.shape[1:]) for out in ((outputs,) if single else outputs))
    return (split[0], 0) if single else (split, (0,) * len(split))


def vmap_loop(op: Callable[..., Any], info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """Batching rule of last resort: one call per element of the mapped dimension, results stacked.

    For what no kernel does at once, such as many sets of weights.
    """

    def pick(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(arg)
            return [pick(a, d, i) for a, d in zip(arg, dims, strict=True)]
        return arg.select(dim, i) if dim is not None and isinstance(arg, Tensor) else arg

    calls = [op(*(pick(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])
