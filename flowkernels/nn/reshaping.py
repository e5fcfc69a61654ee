"""Layers that move features or leave some of them out; features are flat, (N, D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Permutation(nn.Module):
    """``z = x[:, permutation]``; its log-det is 0."""

    permutation: Tensor
    back: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        super().__init__()
        order = torch.as_tensor(permutation).long()
        if order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(f"permutation must hold each of 0..{order.numel() - 1} once, got {order.tolist()}")
        self.register_buffer("permutation", order.clone())
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.permutation], x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z[:, self.back], z.new_zeros(z.shape[0])


class Squeeze(Permutation):
    """(C, H, W) to (4 C, H / 2, W / 2): each 2 by 2 block of pixels becomes four channels.

    Source: Dinh et al. 2017 (RealNVP), arXiv:1605.08803.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        if height % 2 or width % 2:
            raise ValueError(f"shape must have even height and width, got {shape}")
        image = torch.arange(channels * height * width).reshape(channels, height // 2, 2, width // 2, 2)
        super().__init__(image.permute(0, 2, 4, 1, 3).reshape(-1))
        self.shape = (4 * channels, height // 2, width // 2)


class FactorOut(nn.Module):
    """The first features are done; the rest goes through `layers`. The multi-scale architecture.

    Args:
        done: how many features are left out. layers: for the others.

    Source: Dinh et al. 2017 (RealNVP), arXiv:1605.08803, section 3.6.
    """

    def __init__(self, done: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        if done < 1:
            raise ValueError(f"done must be at least 1, got {done}")
        self.done = done
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, rest = x[:, : self.done], x[:, self.done :]
        total = x.new_zeros(x.shape[0])
        for layer in self.layers:
            rest, logdet = layer(rest, context)
            total = total + logdet
        return torch.cat([first, rest], dim=1), total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, rest = z[:, : self.done], z[:, self.done :]
        total = z.new_zeros(z.shape[0])
        for layer in reversed(self.layers):
            rest, logdet = layer.inverse(rest, context)  # type: ignore[operator]
            total = total + logdet
        return torch.cat([first, rest], dim=1), total
