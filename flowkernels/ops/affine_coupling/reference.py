"""affine_coupling as a lecture writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkernels._checks import COMPUTE_DTYPE
from flowkernels.scales import FORMS, law_of_numbers

# Which gradients are wanted, as bits of the backward operator's `needs`.
NEEDS_X, NEEDS_SHIFT, NEEDS_SCALE = 1, 2, 4


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    logdet: Tensor | None,
    positions: Tensor | None,
    law: int,
    law_parameters: list[float],
    form: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """(y, logdet). positions[i] is the column of feature i in shift and scale, -1 where y is x."""
    given, dtype = x, COMPUTE_DTYPE[x.dtype]
    x, shift, scale = x.to(dtype), spread(shift.to(dtype), positions), spread(scale.to(dtype), positions)
    if positions is not None:
        # The features that stay are taken out before anything is calculated: no infinity of theirs gets
        # anywhere.
        x = torch.where(positions >= 0, x, 0.0)
    sigma, log_sigma = law_of_numbers(law, law_parameters)(scale)
    match FORMS[form], inverse:
        case "scale_shift", False:
            y = sigma * x + shift
        case "scale_shift", True:
            y = (x - shift) / sigma
        case "shift_scale", False:
            y = (x + shift) * sigma
        case "shift_scale", True:
            y = x / sigma - shift
        case "gate", False:
            y = sigma * x + (1 - sigma) * shift
        case _:
            y = (x - (1 - sigma) * shift) / sigma
    y = y.to(given.dtype)
    if positions is not None:
        y = torch.where(positions >= 0, y, given)
        log_sigma = torch.where(positions >= 0, log_sigma, 0.0)
    total = (-log_sigma if inverse else log_sigma).sum(-1)
    return y, total if logdet is None else logdet + total


def affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    positions: Tensor | None,
    law: int,
    law_parameters: list[float],
    form: int,
    inverse: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_shift, grad_scale); one that `needs` leaves out has no columns.

    d y / d log sigma is sigma w forward and -w backward, with w as below.
    """
    given, dtype = (grad_y, x, shift, scale), COMPUTE_DTYPE[x.dtype]
    grad_y, x, shift, scale = (t.to(dtype) for t in given)
    shift, scale = spread(shift, positions), spread(scale, positions)
    if positions is not None:
        x = torch.where(positions >= 0, x, 0.0)
    law_ = law_of_numbers(law, law_parameters)
    sigma, _ = law_(scale)
    flow_x, _ = affine_coupling(x, shift, scale, None, None, law, law_parameters, form, True) if inverse else (x, None)
    w: Tensor
    dy_dshift: Tensor | float
    dx_dshift: Tensor | float
    match FORMS[form]:
        case "scale_shift":
            w, dy_dshift, dx_dshift = flow_x, 1.0, -1 / sigma
        case "shift_scale":
            w, dy_dshift, dx_dshift = flow_x + shift, sigma, -1.0
        case _:
            w, dy_dshift, dx_dshift = flow_x - shift, 1 - sigma, -(1 - sigma) / sigma
    slope = law_.slope(scale)
    if inverse:
        grad_x, grad_shift = grad_y / sigma, grad_y * dx_dshift
        grad_scale = -(grad_y * w + grad_logdet[..., None]) * slope
    else:
        grad_x, grad_shift = grad_y * sigma, grad_y * dy_dshift
        grad_scale = (grad_y * sigma * w + grad_logdet[..., None]) * slope
    grad_x = grad_x.to(given[1].dtype)
    if positions is not None:
        grad_x = torch.where(positions >= 0, grad_x, given[0].to(grad_x.dtype))
    gathered = (
        gather(g, positions, t.shape[-1]).to(t.dtype) for g, t in zip((grad_shift, grad_scale), given[2:], strict=True)
    )
    wanted = (needs & NEEDS_X, needs & NEEDS_SHIFT, needs & NEEDS_SCALE)
    g0, g1, g2 = (g if w else g.new_empty((g.shape[0], 0)) for g, w in zip((grad_x, *gathered), wanted, strict=True))
    return g0, g1, g2


def spread(parameter: Tensor, positions: Tensor | None) -> Tensor:
    """A parameter's columns, each at its feature; 0 at the features that have none."""
    if positions is None:
        return parameter
    return torch.where(positions >= 0, parameter.index_select(-1, positions.clamp(min=0)), 0.0)


def gather(grad: Tensor, positions: Tensor | None, width: int) -> Tensor:
    """The gradient of `spread`."""
    if positions is None:
        return grad
    columns = torch.where(positions >= 0, grad, 0.0)
    return grad.new_zeros((*grad.shape[:-1], width)).index_add(-1, positions.clamp(min=0), columns)
