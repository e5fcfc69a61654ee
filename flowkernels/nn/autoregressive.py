"""The autoregressive layer: a MADE and the transform that it parametrises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.nn.made import MADE
from flowkernels.ops.maf import Step, run_chain
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import Spline, as_transform, identity_parameters


class AutoregressiveTransform(nn.Module):
    """x -> z with ``z_i = transform(x_i; MADE(x_<i))`` and back.

    Args:
        features, hidden_features and the keywords that `MADE` takes.
        law, form: the affine transform, see `flowkernels.ops.affine_coupling`; or an `RQSpline` or `LRSpline` as law.
        flipped: the sequential direction is x -> z instead of z -> x: an IAF.
    """

    def __init__(
        self,
        features: int,
        *args: Any,
        law: str | ScaleLaw | Spline = "softplus",
        form: str = "scale_shift",
        flipped: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__()
        transform = as_transform(law)
        if not isinstance(transform, (ScaleLaw, Spline)):
            raise TypeError(f"law must be a scale law, an RQSpline or an LRSpline, got {type(transform).__name__}")
        if isinstance(transform, Spline):
            keywords["params_per_feature"] = transform.params_per_feature
            keywords["parameter_names"] = transform.parameter_names
        self.conditioner = MADE(features, *args, **keywords)
        self.law, self.form, self.flipped = transform, form, flipped
        if isinstance(transform, Spline):
            with torch.no_grad():
                bias: Tensor = self.conditioner.layers[-1].bias  # type: ignore[assignment]
                bias.add_(identity_parameters(transform).repeat(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z, logdet): the density direction."""
        return run_chain(x, [self.step(context, inverse=False)])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x, logdet): the sampling direction."""
        return run_chain(z, [self.step(context, inverse=True)])

    def step(self, context: Tensor | None, inverse: bool) -> Step:
        """This transform as one step of a chain, so that a flow of several runs in one call."""
        made = self.conditioner
        terms = made.context_terms(context)
        return Step(made.plan, made.plan_parameters(), terms, self.law, self.form, inverse != self.flipped)

    def extra_repr(self) -> str:
        return f"law={self.law}, form={self.form!r}, flipped={self.flipped}"
