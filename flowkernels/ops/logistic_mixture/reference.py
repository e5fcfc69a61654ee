"""logistic_mixture as a lecture writes it; the inverse by bisection."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkernels.scales import law_of_numbers


def mixture(x: Tensor, parameters: Tensor, min_log_scale: float) -> tuple[Tensor, Tensor]:
    """(m, log dm/dx): the logit of the mixture's distribution function; parameters without shift and scale."""
    logits, means, log_scales = parameters.chunk(3, dim=-1)
    log_pi = torch.log_softmax(logits, dim=-1)
    log_scales = log_scales.clamp(min=min_log_scale)
    v = (x[..., None] - means) * (-log_scales).exp()
    below = torch.logsumexp(log_pi + F.logsigmoid(v), dim=-1)
    above = torch.logsumexp(log_pi + F.logsigmoid(-v), dim=-1)
    density = torch.logsumexp(log_pi + F.logsigmoid(v) + F.logsigmoid(-v) - log_scales, dim=-1)
    return below - above, density - below - above


def solve(m: Tensor, parameters: Tensor, min_log_scale: float) -> Tensor:
    """x with mixture(x) = m. Each component alone would give m at means + scales m: these bracket the solution."""
    with torch.no_grad():
        _, means, log_scales = parameters.chunk(3, dim=-1)
        single = means + log_scales.clamp(min=min_log_scale).exp() * m[..., None]
        low, high = single.amin(-1), single.amax(-1)
        for _ in range(200):
            middle = (low + high) / 2
            right = mixture(middle, parameters, min_log_scale)[0] < m
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        return (low + high) / 2


def logistic_mixture(
    x: Tensor,
    parameters: Tensor,
    logdet: Tensor | None,
    min_log_scale: float,
    law: int,
    law_parameters: list[float],
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    shift, scale, rest = parameters[..., 0], parameters[..., 1], parameters[..., 2:]
    sigma, log_sigma = law_of_numbers(law, law_parameters)(scale)
    if inverse:
        target = (x - shift) / sigma
        y = solve(target, rest, min_log_scale)
        # A step of Newton's method that moves nothing carries the first derivatives, two carry the second as well: the
        # implicit function theorem.
        limit = math.log(torch.finfo(x.dtype).max) - 1
        for _ in range(2):
            m, slope = mixture(y, rest, min_log_scale)
            residual = m - target
            y = y - (residual - residual.detach()) * (-slope).clamp(max=limit).exp()
        ld = -mixture(y, rest, min_log_scale)[1] - log_sigma
    else:
        m, slope = mixture(x, rest, min_log_scale)
        y, ld = sigma * m + shift, slope + log_sigma
    total = ld.sum(-1)
    return y, total if logdet is None else logdet + total


def logistic_mixture_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    parameters: Tensor,
    min_log_scale: float,
    law: int,
    law_parameters: list[float],
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient of the input, gradient of the parameters), by autograd; x is the forward direction's input in both
    cases."""
    options = (None, min_log_scale, law, law_parameters)
    given = logistic_mixture(x, parameters, *options, False)[0] if inverse else x
    with torch.enable_grad():
        given, parameters = given.detach().requires_grad_(), parameters.detach().requires_grad_()
        outputs = logistic_mixture(given, parameters, *options, inverse)
        grad_x, grad_parameters = torch.autograd.grad(outputs, (given, parameters), (grad_y, grad_logdet))
    return grad_x, grad_parameters
