"""The affine transform of coupling and autoregressive flows, with its log-det."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_choice, check_float_tensor, check_logdet, check_parameter
from flowkernels._library import needs_grad
from flowkernels._masks import Mask, positions_of
from flowkernels.ops.affine_coupling import reference
from flowkernels.ops.affine_coupling.autograd import AffineCoupling, forward_op
from flowkernels.scales import FORMS, ScaleLaw, as_law

__all__ = ["affine_coupling"]

_FORM_CODES = {form: code for code, form in enumerate(FORMS)}


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    mask: Mask | None = None,
    law: str | ScaleLaw = "exp",
    form: str = "scale_shift",
    inverse: bool = False,
    logdet: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Affine transform of every element and the log-determinant of its Jacobian, in one pass over memory.

    With sigma the scale law `law` of `scale` (`flowkernels.scales`) and t = `shift`::

        scale_shift   y = sigma x + t                 inverse   x = (y - t) / sigma
        shift_scale   y = (x + t) sigma               inverse   x = y / sigma - t
        gate          y = sigma x + (1 - sigma) t     inverse   x = (y - (1 - sigma) t) / sigma
        logdet        sum_i log sigma_i over the last dimension (its negative when `inverse`), in nats

    With a mask, the features that it does not select go through unchanged and the log-det is that of the
    others.

    Args:
        x: (..., D), float64, float32, bfloat16 or float16; halves are calculated in float32.
        shift, scale: broadcastable to x's shape, same dtype and device. Strided views (``parameters[...,
        0::2]``, chunks)
            are read in place. With a mask, their last dimension may also be the number of transformed
            features. Under torch.autocast their dtype may differ from x's, and y is float32 whatever x is.
        mask: which features are transformed: (D,) booleans, or indices, as a tensor or a list. Indices also
            give the order of the columns of shift and scale that have no columns for the other features. A
            tensor is looked through once, a list in every call. `flowkernels.nn.masks` has the usual ones.
        law: a scale law's name or a `ScaleLaw` with its parameters. ``form="gate"`` needs the sigmoid law.
        form: one of scale_shift, shift_scale, gate.
        inverse: transform y back to x.
        logdet: (...), a running log-det that this one is added to.

    Returns:
        y (..., D) in x's dtype and logdet (...) in at least float32.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be.

    Sources: Dinh et al. 2017, arXiv:1605.08803 (scale_shift); Kingma & Dhariwal 2018, arXiv:1807.03039
        (shift_scale);
    Kingma et al. 2016, arXiv:1606.04934 (gate).
    """
    if type(law) is not ScaleLaw:
        law = as_law(law)
    check_float_tensor("x", x)
    shape = x.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"x must have at least one feature, its last dimension, got shape {tuple(shape)}")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, value in (("shift", shift), ("scale", scale)):
        check_parameter(name, value, x, autocast)
    if form not in _FORM_CODES:
        check_choice("form", form, FORMS)
    if form == "gate" and law.name != "sigmoid":
        raise ValueError(f"form 'gate' needs law 'sigmoid', got {law.name!r}")
    check_logdet(logdet, x)
    positions = None
    width = shape[-1]
    if mask is not None:
        positions, width = _positions(mask, width, shift, scale, x.device)
    target = shape if width == shape[-1] else torch.Size((*shape[:-1], width))
    if shift.shape != target:
        shift = _expand("shift", shift, target, shape)
    if scale.shape != target:
        scale = _expand("scale", scale, target, shape)

    if autocast and x.dtype != torch.float64:
        x = x.float()
        if shift.dtype != scale.dtype:
            shift, scale = shift.float(), scale.float()
    if logdet is not None and logdet.dtype != COMPUTE_DTYPE[x.dtype]:
        logdet = logdet.to(COMPUTE_DTYPE[x.dtype])
    flat = len(shape) == 2
    if not flat:
        # Sizes in full: with no rows, -1 would say nothing.
        count = math.prod(shape[:-1])
        x, shift, scale = (
            x.reshape(count, shape[-1]),
            shift.reshape(count, width),
            scale.reshape(count, width),
        )
        logdet = None if logdet is None else logdet.reshape(count)
    args = (x, shift, scale, logdet, positions, law.code, law.numbers, _FORM_CODES[form], inverse)
    if runs_reference(x, "affine_coupling"):
        y, total = reference.affine_coupling(*args)
    elif needs_grad(x, shift, scale, logdet):
        y, total = AffineCoupling.apply(*args)
    else:
        y, total = forward_op(*args)
    return (y, total) if flat else (y.reshape(shape), total.reshape(shape[:-1]))


def _positions(mask: Mask, features: int, shift: Tensor, scale: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """The mask as the operator reads it, and how many columns shift and scale have."""
    positions = positions_of(mask, features, device)
    widths = [t.shape[-1] if t.dim() else 1 for t in (shift, scale)]
    width = max(widths)
    if width == 1 and positions.selected != 1:
        width = features
    for name, own in zip(("shift", "scale"), widths, strict=True):
        if own not in (1, width) or (positions.selected is not None and width not in (features, positions.selected)):
            count = "the number of transformed features" if positions.selected is None else positions.selected
            raise ValueError(
                f"{name} has {own} columns; with this mask shift and scale need {features} (all features) or "
                f"{count} (the transformed ones), both the same"
            )
    return (positions.full, width) if width == features else (positions.compact, width)


def _expand(name: str, value: Tensor, target: torch.Size, shape: torch.Size) -> Tensor:
    try:
        return value.expand(target)
    except RuntimeError:
        columns = "" if target == shape else f" with {target[-1]} columns, the transformed features,"
        raise ValueError(
            f"{name} must broadcast to x's shape {tuple(shape)}{columns}, got {tuple(value.shape)}"
        ) from None
