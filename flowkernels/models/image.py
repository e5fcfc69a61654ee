"""Flows of coupling layers on images: RealNVP, Glow and Flow++.

Images are flat, (N, channels * height * width), in the order of ``x.reshape(N, -1)``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from flowkernels.models.flow import Flow
from flowkernels.nn.actnorm import ActNorm, Invertible1x1
from flowkernels.nn.conditioners import ConvNet
from flowkernels.nn.coupling import CouplingTransform
from flowkernels.nn.masks import channel_mask, checkerboard_mask
from flowkernels.nn.reshaping import FactorOut, Squeeze
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import LogisticMixture, Transform, as_transform, params_per_feature

Shape = tuple[int, int, int]


def _size(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2]


def _check_shape(shape: Shape, levels: int) -> None:
    if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"shape must be (channels, height, width), got {shape}")
    if levels < 1 or shape[1] % 2**levels or shape[2] % 2**levels:
        raise ValueError(f"levels must be at least 1 and 2^levels divide height and width, got {levels} for {shape}")


class _Couplings:
    """Makes the couplings of one flow, which differ in shape and mask only."""

    def __init__(self, transform: str | Transform, hidden: int, blocks: int, context: int, attention: int = 0) -> None:
        self.transform = as_transform(transform)
        self.network = {
            "hidden_channels": hidden,
            "blocks": blocks,
            "context_features": context,
            "attention": attention,
        }

    def __call__(self, shape: Shape, mask: Tensor, form: str = "scale_shift") -> CouplingTransform:
        network = ConvNet(shape, mask, params_per_feature(self.transform), **self.network)
        return CouplingTransform(mask, network, self.transform, form=form).start_at_identity()


def _multi_scale(shape: Shape, levels: int, stage: Callable[[Shape, int], list[nn.Module]]) -> list[nn.Module]:
    """The layers of `stage` at each level; after each but the last, half of the channels are done."""
    layers: list[nn.Module] = []
    target = layers
    for level in range(levels):
        new = stage(shape, level)
        target.extend(new)
        squeeze = [layer for layer in new if isinstance(layer, Squeeze)]
        if squeeze:
            shape = squeeze[-1].shape
        if level + 1 < levels:
            done = (shape[0] // 2) * shape[1] * shape[2]
            factor = FactorOut(done, [])
            target.append(factor)
            target = factor.layers  # type: ignore[assignment]
            shape = (shape[0] - shape[0] // 2, shape[1], shape[2])
    return layers


class ImageRealNVP(Flow):
    """RealNVP on images: checkerboard couplings, squeeze, channel couplings, and half of the channels factored out.

    Args:
        shape: (channels, height, width). hidden_channels, blocks: size of each conditioner.
        levels: how often the image is squeezed. couplings: of each kind at each level.
        law: scale law. context_features: K, width of the conditioning input.

    Source: Dinh et al. 2017, arXiv:1605.08803.
    """

    def __init__(
        self,
        shape: Shape,
        hidden_channels: int = 32,
        blocks: int = 2,
        *,
        levels: int = 2,
        couplings: int = 3,
        law: str | ScaleLaw = "tanh",
        context_features: int = 0,
    ) -> None:
        _check_shape(shape, levels)
        make = _Couplings(law, hidden_channels, blocks, context_features)

        def stage(at: Shape, level: int) -> list[nn.Module]:
            channels, height, width = at
            layers: list[nn.Module] = []
            for i in range(couplings):
                layers.append(ActNorm(channels, height * width))
                layers.append(make(at, checkerboard_mask(height, width, i % 2, channels=channels)))
            squeeze = Squeeze(at)
            layers.append(squeeze)
            channels, height, width = squeeze.shape
            for i in range(couplings):
                layers.append(ActNorm(channels, height * width))
                layers.append(make(squeeze.shape, channel_mask(channels, height, width, first=i % 2 == 1)))
            return layers

        super().__init__(_size(shape), _multi_scale(shape, levels, stage), context_features)
        self.shape = shape


class Glow(Flow):
    """Glow: squeeze, then steps of ActNorm, invertible 1x1 convolution and affine coupling, at several scales.

    Before half of the channels are factored out, a coupling transforms them given the other half: the learned
    prior of Glow.

    Args:
        shape: (channels, height, width). hidden_channels, blocks: size of each conditioner.
        levels: how often the image is squeezed. steps: at each level.
        law: scale law of ``z = (x + t) sigma``. context_features: K, width of the conditioning input.

    Source: Kingma & Dhariwal 2018, arXiv:1807.03039.
    """

    def __init__(
        self,
        shape: Shape,
        hidden_channels: int = 32,
        blocks: int = 1,
        *,
        levels: int = 2,
        steps: int = 4,
        law: str | ScaleLaw | None = None,
        context_features: int = 0,
    ) -> None:
        _check_shape(shape, levels)
        law = ScaleLaw("sigmoid", offset=2.0, floor=0.0) if law is None else law
        make = _Couplings(law, hidden_channels, blocks, context_features)

        def stage(at: Shape, level: int) -> list[nn.Module]:
            squeeze = Squeeze(at)
            channels, height, width = squeeze.shape
            layers: list[nn.Module] = [squeeze]
            for _ in range(steps):
                layers.append(ActNorm(channels, height * width))
                layers.append(Invertible1x1(channels, height * width))
                layers.append(make(squeeze.shape, channel_mask(channels, height, width), "shift_scale"))
            if level + 1 < levels:
                layers.append(make(squeeze.shape, channel_mask(channels, height, width, first=True), "shift_scale"))
            return layers

        super().__init__(_size(shape), _multi_scale(shape, levels, stage), context_features)
        self.shape = shape


class FlowPP(Flow):
    """Flow++, small: mixture-of-logistics couplings with gated convolutions and, if wanted, self-attention.

    Checkerboard couplings at full size, then channel couplings after a squeeze; ActNorm and 1x1 convolutions between.

    Args:
        shape: (channels, height, width). hidden_channels, blocks: size of each conditioner.
        couplings: how many of each kind. components: of each mixture.
        attention: heads of the self-attention in the conditioners, 0 for none.
        context_features: K, width of the conditioning input.

    Source: Ho et al. 2019, arXiv:1902.00275.
    """

    def __init__(
        self,
        shape: Shape,
        hidden_channels: int = 32,
        blocks: int = 2,
        *,
        couplings: int = 4,
        components: int = 8,
        attention: int = 0,
        context_features: int = 0,
    ) -> None:
        _check_shape(shape, 1)
        make = _Couplings(LogisticMixture(components), hidden_channels, blocks, context_features, attention)
        layers: list[nn.Module] = []
        channels, height, width = shape
        for i in range(couplings):
            layers.append(ActNorm(channels, height * width))
            layers.append(make(shape, checkerboard_mask(height, width, i % 2, channels=channels)))
        squeeze = Squeeze(shape)
        layers.append(squeeze)
        channels, height, width = squeeze.shape
        for i in range(couplings):
            layers.append(ActNorm(channels, height * width))
            layers.append(Invertible1x1(channels, height * width))
            layers.append(make(squeeze.shape, channel_mask(channels, height, width, first=i % 2 == 1)))
        super().__init__(_size(shape), layers, context_features)
        self.shape = shape
