"""The affine transform of coupling and autoregressive flows, with its log-det."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_choice, check_float_tensor, check_shape
from flowkernels._library import needs_grad
from flowkernels.ops.affine_coupling import reference
from flowkernels.ops.affine_coupling.autograd import AffineCoupling, forward_op
from flowkernels.scales import FORMS, ScaleLaw, as_law

__all__ = ["affine_coupling"]


def affine_coupling(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
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

    Args:
        x: (..., D), float64, float32, bfloat16 or float16; halves are calculated in float32.
        shift, scale: broadcastable to x's shape, same dtype and device. Strided views (``parameters[..., 0::2]``, chunks)
            are read in place.
        law: a scale law's name or a `ScaleLaw` with its parameters. ``form="gate"`` needs the sigmoid law.
        form: one of scale_shift, shift_scale, gate.
        inverse: transform y back to x.
        logdet: (...), a running log-det that this one is added to.

    Returns:
        y (..., D) in x's dtype and logdet (...) in at least float32.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be.

    Sources: Dinh et al. 2017, arXiv:1605.08803 (scale_shift); Kingma & Dhariwal 2018, arXiv:1807.03039 (shift_scale);
    Kingma et al. 2016, arXiv:1606.04934 (gate).
    """
    law = as_law(law)
    check_float_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, the features, got a scalar")
    for name, value in (("shift", shift), ("scale", scale)):
        check_float_tensor(name, value, like=x)
        try:
            fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} must broadcast to x's shape {tuple(x.shape)}, got {tuple(value.shape)}")
    check_choice("form", form, FORMS)
    if form == "gate" and law.name != "sigmoid":
        raise ValueError(f"form 'gate' needs law 'sigmoid', got {law.name!r}")
    dtype = COMPUTE_DTYPE[x.dtype]
    if logdet is not None:
        check_float_tensor("logdet", logdet)
        check_shape("logdet", logdet, tuple(x.shape[:-1]), "x's shape without the features")
        if logdet.device != x.device:
            raise ValueError(f"logdet is on {logdet.device}, but x is on {x.device}: use one device")

    features = x.shape[-1]
    rows = [t.to(dtype).expand(x.shape).reshape(-1, features) for t in (x, shift, scale)]
    running = None if logdet is None else logdet.to(dtype).reshape(-1)
    args = (*rows, running, law.code, law.numbers, FORMS.index(form), inverse)
    if runs_reference(x):
        y, total = reference.affine_coupling(*args)
    elif needs_grad(x, shift, scale, logdet):
        y, total = AffineCoupling.apply(*args)
    else:
        y, total = forward_op(*args)
    return y.reshape(x.shape).to(x.dtype), total.reshape(x.shape[:-1])
