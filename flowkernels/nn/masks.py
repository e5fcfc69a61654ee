"""The masks of coupling layers, True where a feature is transformed: for ``affine_coupling(..., mask=...)``.

Two layers in a row with `parity` 0 and 1 (`first` True and False) transform every feature once. Image masks
are flat, in the order of ``x.reshape(batch, -1)`` for x (batch, channels, height, width).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["alternating_mask", "channel_mask", "checkerboard_mask", "half_mask"]


def half_mask(features: int, *, first: bool = False) -> Tensor:
    """(features,) with one half True: the second, or the first if `first`. The first half is the smaller one.

    Source: Dinh et al. 2015 (NICE), arXiv:1410.8516.
    """
    _at_least("features", features, 2)
    return (torch.arange(features) < features // 2) == first


def alternating_mask(features: int, parity: int = 0) -> Tensor:
    """(features,) with the features of index `parity`, `parity` + 2, ... True."""
    _at_least("features", features, 2)
    _check_parity(parity)
    return torch.arange(features) % 2 == parity


def checkerboard_mask(height: int, width: int, parity: int = 0, *, channels: int = 1) -> Tensor:
    """(channels * height * width,) with the pixels of (row + column) % 2 = `parity` True, in every channel.

    Source: Dinh et al. 2017 (RealNVP), arXiv:1605.08803, figure 3.
    """
    for name, value in (("height", height), ("width", width), ("channels", channels)):
        _at_least(name, value, 1)
    if height * width < 2:
        raise ValueError(f"height and width must make at least two pixels, got {height} x {width}")
    _check_parity(parity)
    squares = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == parity
    return squares.expand(channels, height, width).reshape(-1)


def channel_mask(channels: int, height: int = 1, width: int = 1, *, first: bool = False) -> Tensor:
    """(channels * height * width,) with all pixels of one half of the channels True, as `half_mask` has them.

    Source: Dinh et al. 2017 (RealNVP), arXiv:1605.08803, figure 3.
    """
    for name, value in (("height", height), ("width", width)):
        _at_least(name, value, 1)
    _at_least("channels", channels, 2)
    return half_mask(channels, first=first).repeat_interleave(height * width)


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_parity(parity: int) -> None:
    if parity not in (0, 1):
        raise ValueError(f"parity must be 0 or 1, got {parity!r}")
