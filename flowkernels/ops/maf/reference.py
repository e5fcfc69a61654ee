"""The autoregressive transform as a lecture writes it: one pass for the density, D passes for a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkernels.ops.affine_coupling import reference as affine
from flowkernels.ops.rq_spline.reference import rq_spline
from flowkernels.scales import FORMS, ScaleLaw
from flowkernels.transforms import Spline

if TYPE_CHECKING:
    from flowkernels.plan import Plan

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda v: v,
    "relu": F.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


def conditioner(x: Tensor, plan: Plan, parameters: Sequence[Tensor], context: Tensor | None) -> Tensor:
    """(N, D, P) the parameters of every feature's transform, from the features before it."""
    terms: dict[int, Tensor] = {}
    if context is not None:
        widths = [plan.masks[i].shape[0] for i in plan.context]
        terms = dict(zip(plan.context, context.split(widths, dim=1), strict=True))
    before: list[Tensor] = []
    a = x
    for i, mask in enumerate(plan.masks_on(x.device)):
        v = F.linear(a, parameters[2 * i] * mask.to(parameters[2 * i]), parameters[2 * i + 1])
        if i in terms:
            v = v + terms[i]
        if i < len(plan.activation):
            residual = plan.residual[i]
            if residual is not None:
                v = v + before[residual]
            before.append(v)
            a = ACTIVATION[plan.activation[i]](v)
    per = len(plan.parameters)
    if plan.layout == "interleaved":
        return v.reshape(-1, plan.features, per)
    return v.reshape(-1, per, plan.features).transpose(1, 2)


def transform(
    x: Tensor, theta: Tensor, plan: Plan, law: ScaleLaw | Spline, form: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    if isinstance(law, Spline):
        return rq_spline(x, theta, None, law.bins, law.code, law.numbers, inverse)
    shift = theta[..., plan.parameters.index("shift")]
    scale = theta[..., plan.parameters.index("scale")]
    return affine.affine_coupling(x, shift, scale, None, None, law.code, law.numbers, FORMS.index(form), inverse)


def maf_forward(
    x: Tensor, context: Tensor | None, plan: Plan, parameters: Sequence[Tensor], law: ScaleLaw | Spline, form: str
) -> tuple[Tensor, Tensor]:
    return transform(x, conditioner(x, plan, parameters, context), plan, law, form, False)


def maf_inverse(
    z: Tensor, context: Tensor | None, plan: Plan, parameters: Sequence[Tensor], law: ScaleLaw | Spline, form: str
) -> tuple[Tensor, Tensor]:
    """After pass s the features of steps 0..s are right; the rest is not yet, but nothing right depends on it."""
    x = torch.zeros_like(z)
    for _ in range(plan.steps):
        x, logdet = transform(z, conditioner(x, plan, parameters, context), plan, law, form, True)
    return x, logdet


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) over the last dimension, in nats."""
    squares: Tensor = torch.linalg.vecdot(z, z)
    return squares.mul(-0.5).sub(0.5 * z.shape[-1] * math.log(2 * math.pi))
