"""Coupling layers: some features go through as they are and give the parameters of a transform of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.ops.affine_coupling import affine_coupling
from flowkernels.ops.logistic_mixture import logistic_mixture
from flowkernels.ops.rq_spline import rq_spline
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import (
    LogisticMixture,
    Spline,
    Transform,
    as_transform,
    identity_parameters,
    params_per_feature,
)


class CouplingTransform(nn.Module):
    """x -> z with ``z_b = transform(x_b; conditioner(x_a, context))`` and ``z_a = x_a``, and back.

    Args:
        mask: (D,) booleans, True for the features b that are transformed; `flowkernels.nn.masks` has the usual ones.
        conditioner: a module (N, len a), context -> (N, len b, P) with P the transform's parameters per feature,
            such as `flowkernels.nn.MLP` and `flowkernels.nn.ConvNet`.
        transform: a scale law (name or `ScaleLaw`) for an affine transform, ``"unit"`` for an additive one, an
            `RQSpline`, an `LRSpline` or a `LogisticMixture`.
        form: of the affine transform, see `flowkernels.ops.affine_coupling`.

    Sources: Dinh et al. 2015 (NICE), arXiv:1410.8516; Dinh et al. 2017 (RealNVP), arXiv:1605.08803.
    """

    mask: Tensor
    identity: Tensor
    transformed: Tensor

    def __init__(
        self,
        mask: Tensor,
        conditioner: nn.Module,
        transform: str | Transform = "exp",
        *,
        form: str = "scale_shift",
    ) -> None:
        super().__init__()
        mask = torch.as_tensor(mask)
        if mask.dim() != 1 or mask.dtype != torch.bool:
            raise ValueError(f"mask must be (D,) booleans, got {tuple(mask.shape)} of {mask.dtype}")
        if not mask.any() or mask.all():
            what = "everything" if mask.all() else "nothing"
            raise ValueError(f"mask selects {what}: a coupling needs features of both kinds")
        self.transform, self.form = as_transform(transform), form
        self.conditioner = conditioner
        self.register_buffer("mask", mask.clone())
        self.register_buffer("identity", torch.nonzero(~mask).flatten(), persistent=False)
        self.register_buffer("transformed", torch.nonzero(mask).flatten(), persistent=False)

    def start_at_identity(self) -> CouplingTransform:
        """Sets the conditioner's last layer so that the transform begins as the identity (a mixture: close to it)."""
        self.conditioner.start_at(identity_parameters(self.transform))  # type: ignore[operator]
        return self

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z, logdet): the density direction."""
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x, logdet): the sampling direction."""
        return self._run(z, context, True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        theta = self.conditioner(x[:, self.identity], context)
        if isinstance(self.transform, ScaleLaw):
            shift = theta[..., 0]
            # The unit law has no scale parameter; what stands in its place is not looked at.
            scale = shift if self.transform.name == "unit" else theta[..., 1]
            return affine_coupling(
                x, shift, scale, mask=self.transformed, law=self.transform, form=self.form, inverse=inverse
            )
        part, logdet = _elementwise(self.transform, x[:, self.transformed], theta, inverse)
        return x.index_copy(1, self.transformed, part), logdet

    def extra_repr(self) -> str:
        return f"features={len(self.mask)}, transformed={len(self.transformed)}, transform={self.transform}"


def _elementwise(transform: Any, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    if isinstance(transform, Spline):
        return rq_spline(x, theta, spline=transform, inverse=inverse)
    assert isinstance(transform, LogisticMixture)
    return logistic_mixture(x, theta, law=transform.law, min_log_scale=transform.min_log_scale, inverse=inverse)


__all__ = ["CouplingTransform", "params_per_feature"]
