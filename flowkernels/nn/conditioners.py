"""Networks that give the parameters of coupling transforms: (N, features seen) -> (N, features transformed, P)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkernels.ops.maf.reference import ACTIVATION


class MLP(nn.Module):
    """A multilayer perceptron; the context's linear image is added to the first pre-activation.

    Args:
        inputs, outputs: features seen and features transformed. params_per_feature: P.
        hidden_features: widths. context_features: width of the conditioning input.
        activation: a name of ``flowkernels.plan.ACTIVATIONS``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        params_per_feature: int,
        hidden_features: Sequence[int] = (128, 128),
        *,
        context_features: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATION:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATION)}, got {activation!r}")
        self.outputs, self.params_per_feature, self.activation = outputs, params_per_feature, activation
        widths = [inputs, *hidden_features, outputs * params_per_feature]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.context_layer = nn.Linear(context_features, widths[1], bias=False) if context_features else None

    def start_at(self, theta: Tensor) -> None:
        """Makes the output `theta` (P,) for every feature, whatever the input."""
        last: nn.Linear = self.layers[-1]  # type: ignore[assignment]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(theta.repeat(self.outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 0 and self.context_layer is not None:
                x = x + self.context_layer(context)
            if i + 1 < len(self.layers):
                x = ACTIVATION[self.activation](x)
        return x.reshape(-1, self.outputs, self.params_per_feature)


class Attention(nn.Module):
    """Self-attention over the pixels of (N, C, H, W), with the identity beside it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(1, channels)
        self.project = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.project(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        mixed = F.scaled_dot_product_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2])
        y: Tensor = x + self.out(mixed.transpose(-1, -2).reshape(n, c, h, w))
        return y


class GatedBlock(nn.Module):
    """x + gated(conv(act(conv(x)))), normalised before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + F.glu(self.second(F.silu(self.first(F.silu(self.norm(x))))), dim=1)
        return y


class ConvNet(nn.Module):
    """A residual convolutional network over an image of which some features are seen.

    Args:
        shape: (channels, height, width) of the whole image, whose features are flat in that order.
        mask: (channels * height * width,) True where a feature is transformed. Where whole channels are, the
            network sees the other channels; else it sees the image with zeros in the transformed places.
        params_per_feature: P. hidden_channels, blocks: size of the network.
        context_features: width of the conditioning input, whose linear image is added to every pixel.
        attention: heads of a self-attention after each block, 0 for none.
    """

    identity: Tensor
    transformed: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        mask: Tensor,
        params_per_feature: int,
        hidden_channels: int = 32,
        blocks: int = 2,
        *,
        context_features: int = 0,
        attention: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        if mask.shape != (channels * height * width,):
            raise ValueError(f"mask must have shape ({channels * height * width},), got {tuple(mask.shape)}")
        if attention and hidden_channels % attention:
            raise ValueError(
                f"hidden_channels must be a multiple of attention, {attention} heads, got {hidden_channels}"
            )
        self.shape, self.params_per_feature = shape, params_per_feature
        per_channel = mask.reshape(channels, -1)
        self.whole_channels = bool((per_channel == per_channel[:, :1]).all())
        self.register_buffer("identity", torch.nonzero(~mask).flatten(), persistent=False)
        self.register_buffer("transformed", torch.nonzero(mask).flatten(), persistent=False)
        seen = int((~per_channel[:, 0]).sum()) if self.whole_channels else channels
        self.out_channels = channels - seen if self.whole_channels else channels
        self.first = nn.Conv2d(seen, hidden_channels, 3, padding=1)
        self.context_layer = nn.Linear(context_features, hidden_channels, bias=False) if context_features else None
        body: list[nn.Module] = []
        for _ in range(blocks):
            body.append(GatedBlock(hidden_channels))
            if attention:
                body.append(Attention(hidden_channels, attention))
        self.body = nn.ModuleList(body)
        self.last = nn.Conv2d(hidden_channels, params_per_feature * self.out_channels, 3, padding=1)

    def start_at(self, theta: Tensor) -> None:
        """Makes the output `theta` (P,) for every feature, whatever the input."""
        with torch.no_grad():
            self.last.weight.zero_()
            assert self.last.bias is not None
            self.last.bias.copy_(theta.repeat_interleave(self.out_channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _, height, width = self.shape
        if not self.whole_channels:
            x = x.new_zeros(x.shape[0], self.shape[0] * height * width).index_copy(1, self.identity, x)
        x = self.first(x.reshape(x.shape[0], -1, height, width))
        if self.context_layer is not None:
            x = x + self.context_layer(context)[:, :, None, None]
        for block in self.body:
            x = block(x)
        # (N, P, features) seen as (N, features, P): the operators read strides, nothing is copied.
        theta: Tensor = self.last(F.silu(x)).reshape(x.shape[0], self.params_per_feature, -1).transpose(1, 2)
        return theta if self.whole_channels else theta[:, self.transformed]
