"""Flows of coupling layers on vectors: NICE, RealNVP and the coupling kind of neural spline flow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flowkernels.models.flow import Flow
from flowkernels.nn.actnorm import ActNorm
from flowkernels.nn.conditioners import MLP
from flowkernels.nn.coupling import CouplingTransform
from flowkernels.nn.masks import alternating_mask, half_mask
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import RQSpline, Spline, Transform, as_transform, params_per_feature

MASKS = ("half", "alternating")


def _masks(features: int, mask: str | Sequence[Tensor], transforms: int) -> list[Tensor]:
    """One mask per transform: of two kinds in turns, or a list."""
    if not isinstance(mask, str):
        if len(mask) != transforms:
            raise ValueError(
                f"mask must be a name or hold one mask for each of {transforms} transforms, got {len(mask)}"
            )
        return list(mask)
    if mask == "half":
        return [half_mask(features, first=i % 2 == 1) for i in range(transforms)]
    if mask == "alternating":
        return [alternating_mask(features, parity=(i + 1) % 2) for i in range(transforms)]
    raise ValueError(f"mask must be one of {', '.join(MASKS)} or a list of masks, got {mask!r}")


class CouplingFlow(Flow):
    """A stack of couplings with multilayer perceptrons, on vectors.

    Args:
        features: D, at least 2. hidden_features: widths of each conditioner. transforms: how many couplings.
        transform: a scale law, an `RQSpline`, an `LRSpline` or a `LogisticMixture`, see
            `flowkernels.nn.CouplingTransform`.
        context_features: K, width of the conditioning input. activation: of the conditioners.
        mask: ``"half"`` or ``"alternating"`` (which half is transformed changes from layer to layer), or a list of
        masks.
        actnorm: an `ActNorm` before every coupling, initialised from the first batch.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (128, 128),
        transforms: int = 8,
        *,
        transform: str | Transform = "tanh",
        context_features: int = 0,
        activation: str = "relu",
        mask: str | Sequence[Tensor] = "half",
        actnorm: bool = False,
    ) -> None:
        if not isinstance(transforms, int) or transforms < 1:
            raise ValueError(f"transforms must be an integer >= 1, got {transforms!r}")
        spec = as_transform(transform)
        layers: list[nn.Module] = []
        for one in _masks(features, mask, transforms):
            chosen = int(one.sum())
            conditioner = MLP(
                features - chosen,
                chosen,
                params_per_feature(spec),
                hidden_features,
                context_features=context_features,
                activation=activation,
            )
            if actnorm:
                layers.append(ActNorm(features))
            layers.append(CouplingTransform(one, conditioner, spec).start_at_identity())
        super().__init__(features, layers, context_features)


class NICE(CouplingFlow):
    """Additive couplings, ``z_b = x_b + t(x_a)``, and one scale per feature at the end.

    Arguments as for `CouplingFlow`. Source: Dinh et al. 2015, arXiv:1410.8516.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (128, 128),
        transforms: int = 4,
        *,
        context_features: int = 0,
        activation: str = "relu",
        mask: str | Sequence[Tensor] = "half",
    ) -> None:
        super().__init__(
            features,
            hidden_features,
            transforms,
            transform="unit",
            context_features=context_features,
            activation=activation,
            mask=mask,
        )
        self.layers.append(ActNorm(features, data_init=False))


class RealNVP(CouplingFlow):
    """Affine couplings, ``z_b = sigma(x_a) x_b + t(x_a)``.

    Arguments as for `CouplingFlow`, with the scale law `law`. Source: Dinh et al. 2017, arXiv:1605.08803.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (128, 128),
        transforms: int = 8,
        *,
        law: str | ScaleLaw = "tanh",
        context_features: int = 0,
        activation: str = "relu",
        mask: str | Sequence[Tensor] = "half",
        actnorm: bool = False,
    ) -> None:
        super().__init__(
            features,
            hidden_features,
            transforms,
            transform=law,
            context_features=context_features,
            activation=activation,
            mask=mask,
            actnorm=actnorm,
        )


class CouplingNSF(CouplingFlow):
    """Neural spline flow of couplings: rational splines of one half, given the other.

    Arguments as for `CouplingFlow`, with an `RQSpline` or `LRSpline` in place of the transform. Source: Durkan et al.
    2019, arXiv:1906.04032.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (128, 128),
        transforms: int = 5,
        *,
        spline: Spline | None = None,
        context_features: int = 0,
        activation: str = "relu",
        mask: str | Sequence[Tensor] = "half",
        actnorm: bool = False,
    ) -> None:
        super().__init__(
            features,
            hidden_features,
            transforms,
            transform=RQSpline() if spline is None else spline,
            context_features=context_features,
            activation=activation,
            mask=mask,
            actnorm=actnorm,
        )
