"""The affine autoregressive layer: a MADE and the transform that it parametrises."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flowkernels.nn.made import MADE
from flowkernels.ops.maf import Step, run_chain
from flowkernels.scales import ScaleLaw, as_law


class AutoregressiveTransform(nn.Module):
    """x -> z with ``z_i = affine(x_i; MADE(x_<i))`` and back.

    Args:
        features, hidden_features and the keywords that `MADE` takes.
        law, form: the affine transform, see `flowkernels.ops.affine_coupling`.
        flipped: the sequential direction is x -> z instead of z -> x: an IAF.
    """

    def __init__(
        self,
        features: int,
        *args: Any,
        law: str | ScaleLaw = "softplus",
        form: str = "scale_shift",
        flipped: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__()
        self.conditioner = MADE(features, *args, **keywords)
        self.law, self.form, self.flipped = as_law(law), form, flipped

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
