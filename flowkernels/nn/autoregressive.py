"""The affine autoregressive layer: a MADE and the transform that it parametrises."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flowkernels.nn.made import MADE
from flowkernels.ops.maf import maf_forward, maf_inverse
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
        return self._run(x, context, self.flipped)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x, logdet): the sampling direction."""
        return self._run(z, context, not self.flipped)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        made = self.conditioner
        run = maf_inverse if inverse else maf_forward
        return run(
            x,
            made.plan,
            made.plan_parameters(),
            context=made.context_terms(context),
            law=self.law,
            form=self.form,
        )

    def extra_repr(self) -> str:
        return f"law={self.law}, form={self.form!r}, flipped={self.flipped}"
