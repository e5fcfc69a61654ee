"""Gradients of logistic_mixture. The inverse keeps its output: from there nothing has to be searched for again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowkernels._autograd import Function, backward_of, fake_backward, reference_double_backward
from flowkernels._library import operator
from flowkernels.ops.logistic_mixture import reference

_OPTIONS = "float min_log_scale, int law, float[] law_parameters, bool inverse"


def _fake(x: Tensor, parameters: Tensor, logdet: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0])


forward_op: Any = operator(
    f"logistic_mixture(Tensor x, Tensor parameters, Tensor? logdet, {_OPTIONS}) -> (Tensor, Tensor)",
    reference.logistic_mixture,
    rows=(2, 3, 1, None, None, None, None),
    fake=_fake,
)
backward_op: Any = operator(
    f"logistic_mixture_backward(Tensor grad_y, Tensor grad_logdet, Tensor x, Tensor parameters, {_OPTIONS})"
    " -> (Tensor, Tensor)",
    reference.logistic_mixture_backward,
    rows=(2, 1, 2, 3, None, None, None, None),
    fake=fake_backward,
)


class LogisticMixture(Function):
    forward = staticmethod(forward_op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, parameters, _, *ctx.options = inputs
        inverse = ctx.options[-1]
        ctx.save_for_backward(x, output[0] if inverse else x, parameters)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> Any:
        given, x, parameters = ctx.saved_tensors
        inputs = (grad_y, grad_logdet, x.detach(), parameters, given, *ctx.options)
        grads = backward_of(LogisticMixtureBackward, _backward, *inputs)
        return *grads, grad_logdet if ctx.needs_input_grad[2] else None, None, None, None, None


def _backward(grad_y: Tensor, grad_logdet: Tensor, x: Tensor, parameters: Tensor, given: Tensor, *options: Any) -> Any:
    return backward_op(grad_y, grad_logdet, x, parameters, *options)


class LogisticMixtureBackward(Function):
    """`given` is the input of the differentiated direction: what second derivatives are taken by."""

    forward = staticmethod(_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_y, grad_logdet, _, parameters, given, *ctx.options = inputs
        ctx.save_for_backward(grad_y, grad_logdet, given, parameters)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        grad_y, grad_logdet, given, parameters = ctx.saved_tensors
        of_y, of_logdet, of_given, of_parameters = reference_double_backward(
            lambda x, p: reference.logistic_mixture(x, p, None, *ctx.options),
            (given, parameters),
            (grad_y, grad_logdet),
            grad_grads,
        )
        return of_y, of_logdet, None, of_parameters, of_given, None, None, None, None
