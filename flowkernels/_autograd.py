"""What the autograd Functions of the operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers


class Function(torch.autograd.Function):
    """torch's, mapped by vmap as its operators are, except that arguments are bound to their names only where functorch
    needs it: that binding takes longer than a small flow's kernel."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


def backward_of(function: type[torch.autograd.Function], op: Callable[..., Any], *args: Any) -> Any:
    """Calls a backward operator: through its autograd Function where a double backward may follow, plainly elsewhere.

    torch.compile has no double backward and does not trace a Function inside the backward of another.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return op(*args)
    return function.apply(*args)


def fake_backward(grad_y: Tensor, grad_logdet: Tensor, x: Tensor, parameters: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Fake kernel of a backward whose reference runs autograd, which fake tensors do not have inside an operator."""
    return x.new_empty(x.shape), parameters.new_empty(parameters.shape)


def reference_double_backward(
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grad_grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Derivative of an operator's backward, by autograd through the operator's reference.

    The backward maps (grad_outputs, inputs) to the gradients of the inputs; given `grad_grads`, the gradients of those,
    this returns the gradients of (*grad_outputs, *inputs). Second derivatives are rare: readable beats fast.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (*grad_outputs, *inputs)]
        outer, inner = leaves[: len(grad_outputs)], leaves[len(grad_outputs) :]
        # An output that depends on no input (the log-det of the unit law) has no derivative to add.
        live = [(out, g) for out, g in zip(reference(*inner), outer, strict=True) if out.requires_grad]
        first = torch.autograd.grad(
            [out for out, _ in live], inner, [g for _, g in live], create_graph=True, allow_unused=True
        )
        wanted = [(g, gg) for g, gg in zip(first, grad_grads, strict=True) if g is not None and gg is not None]
        wanted = [(g, gg) for g, gg in wanted if g.requires_grad]
    if not wanted:
        return (None,) * len(leaves)
    return torch.autograd.grad([g for g, _ in wanted], leaves, [gg for _, gg in wanted], allow_unused=True)


class _NotTwice(Function):
    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} is not twice differentiable on this backend; "
            "`with flowkernels.use_backend('reference')` it is, in plain PyTorch"
        )


def not_twice_differentiable(name: str, grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`grads` as they are, except that a derivative of them raises instead of being silently zero."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        return grads
    same: tuple[Tensor, ...] = _NotTwice.apply(name, len(grads), *grads, *inputs)
    return same
