"""affine_coupling as a lecture writes it."""

from __future__ import annotations

from torch import Tensor

from flowkernels.scales import FORMS, law_of_numbers


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    logdet: Tensor | None,
    law: int,
    law_parameters: list[float],
    form: int,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
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
    total = (-log_sigma if inverse else log_sigma).sum(-1)
    return y, total if logdet is None else logdet + total


def affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    law: int,
    law_parameters: list[float],
    form: int,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_shift, grad_scale). d y / d log sigma is sigma w forward and -w backward, with w as below."""
    law_ = law_of_numbers(law, law_parameters)
    sigma, _ = law_(scale)
    flow_x, _ = affine_coupling(x, shift, scale, None, law, law_parameters, form, True) if inverse else (x, None)
    match FORMS[form]:
        case "scale_shift":
            w, dy_dshift, dx_dshift = flow_x, 1.0, -1 / sigma
        case "shift_scale":
            w, dy_dshift, dx_dshift = flow_x + shift, sigma, -1.0
        case _:
            w, dy_dshift, dx_dshift = flow_x - shift, 1 - sigma, -(1 - sigma) / sigma
    slope = law_.slope(scale)
    if inverse:
        return grad_y / sigma, grad_y * dx_dshift, -(grad_y * w + grad_logdet[..., None]) * slope
    return grad_y * sigma, grad_y * dy_dshift, (grad_y * sigma * w + grad_logdet[..., None]) * slope
