"""MADE, MAF and IAF."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flowkernels.models.flow import Flow
from flowkernels.nn.autoregressive import AutoregressiveTransform
from flowkernels.ops.maf import Step, run_chain
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import Spline

Order = str | Sequence[int] | Tensor


def _orders(order: str | Sequence[Order], transforms: int) -> list[Order]:
    """The order of each transform: ``"alternating"`` natural and reversed, one name for all, or a list."""
    if isinstance(order, str):
        if order == "alternating":
            return ["reversed" if i % 2 else "natural" for i in range(transforms)]
        return [order] * transforms
    if len(order) != transforms:
        raise ValueError(
            f"order must be a name or hold one order for each of {transforms} transforms, got {len(order)}"
        )
    return list(order)


def _check_transforms(transforms: int) -> None:
    if not isinstance(transforms, int) or transforms < 1:
        raise ValueError(f"transforms must be an integer >= 1, got {transforms!r}")


class AutoregressiveFlow(Flow):
    """A flow whose layers are all autoregressive transforms: they run as one chain, in one call of an operator."""

    def _like(self, default: Tensor) -> Tensor:
        return self.layers._modules["0"].conditioner.plan_parameters()[0]  # type: ignore[union-attr,operator,no-any-return]

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return run_chain(x, self._steps(context, inverse))

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        return run_chain(x, self._steps(context, inverse=False), density=True)[1]

    def _steps(self, context: Tensor | None, inverse: bool) -> list[Step]:
        layers = self.layers._modules.values()
        return [layer.step(context, inverse) for layer in (reversed(layers) if inverse else layers)]  # type: ignore


class MAF(AutoregressiveFlow):
    """Masked autoregressive flow: each transform is ``z_i = sigma(x_<i) x_i + shift(x_<i)``.

    Densities take one pass per transform; sampling is sequential, and exact, in one sweep
    (`flowkernels.ops.maf_inverse`).

    Args:
        features: D. hidden_features: widths of each transform's MADE. transforms: how many.
        context_features: K, width of the conditioning input.
        law: scale law. activation, residual, degrees: see `flowkernels.nn.MADE`.
        order: ``"alternating"`` (natural, reversed, ...), one order for all transforms, or a list of them.

    Source: Papamakarios et al. 2017, arXiv:1705.07057.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (512, 512),
        transforms: int = 5,
        *,
        context_features: int = 0,
        law: str | ScaleLaw | Spline = "softplus",
        activation: str = "relu",
        order: str | Sequence[Order] = "alternating",
        degrees: str = "sequential",
        residual: bool = False,
    ) -> None:
        _check_transforms(transforms)
        layers = [
            AutoregressiveTransform(
                features,
                hidden_features,
                context_features=context_features,
                law=law,
                activation=activation,
                order=one,
                degrees=degrees,
                residual=residual,
            )
            for one in _orders(order, transforms)
        ]
        super().__init__(features, layers, context_features)


class MADE(MAF):
    """MADE as a density: Gaussian conditionals ``p(x_i | x_<i)`` with mean and scale from one masked network.

    It is a MAF of one transform. Arguments as for `MAF`. Source: Germain et al. 2015, arXiv:1502.03509.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (512, 512),
        *,
        context_features: int = 0,
        law: str | ScaleLaw = "softplus",
        activation: str = "relu",
        order: Order = "natural",
        degrees: str = "sequential",
        residual: bool = False,
    ) -> None:
        super().__init__(
            features,
            hidden_features,
            1,
            context_features=context_features,
            law=law,
            activation=activation,
            order=[order],
            degrees=degrees,
            residual=residual,
        )


class IAF(AutoregressiveFlow):
    """Inverse autoregressive flow: sampling is one pass per transform, the density of foreign points is sequential.

    Args:
        form: ``"exp"``: ``z'_i = exp(s(z_<i)) z_i + m(z_<i)``; ``"gate"``: ``z' = v z + (1 - v) m`` with
            ``v = sigmoid(s + 2)``, which stays stable in deep stacks.
        The rest as for `MAF`.

    Source: Kingma et al. 2016, arXiv:1606.04934.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (512, 512),
        transforms: int = 5,
        *,
        context_features: int = 0,
        form: str = "exp",
        activation: str = "relu",
        order: str | Sequence[Order] = "alternating",
        degrees: str = "sequential",
        residual: bool = False,
    ) -> None:
        _check_transforms(transforms)
        if form not in ("exp", "gate"):
            raise ValueError(f"form must be exp or gate, got {form!r}")
        layers = [
            AutoregressiveTransform(
                features,
                hidden_features,
                context_features=context_features,
                law=ScaleLaw("sigmoid", offset=2.0, floor=0.0) if form == "gate" else "exp",
                form="gate" if form == "gate" else "scale_shift",
                flipped=True,
                activation=activation,
                order=one,
                degrees=degrees,
                residual=residual,
            )
            for one in _orders(order, transforms)
        ]
        super().__init__(features, layers, context_features)
