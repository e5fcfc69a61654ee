"""The usual masks of coupling layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowkernels.nn.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask


def test_half_mask() -> None:
    assert half_mask(5).tolist() == [False, False, True, True, True]
    assert half_mask(5, first=True).tolist() == [True, True, False, False, False]


def test_alternating_mask() -> None:
    assert alternating_mask(5).tolist() == [True, False, True, False, True]
    assert alternating_mask(5, 1).tolist() == [False, True, False, True, False]


def test_checkerboard_mask() -> None:
    assert checkerboard_mask(2, 3).reshape(2, 3).tolist() == [[True, False, True], [False, True, False]]
    two = checkerboard_mask(2, 3, 1, channels=2).reshape(2, 2, 3)
    assert two[0].tolist() == two[1].tolist() == [[False, True, False], [True, False, True]]


def test_channel_mask() -> None:
    assert channel_mask(3, 2, 1).tolist() == [False, False, True, True, True, True]
    assert channel_mask(2, 1, 2, first=True).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (half_mask(7), half_mask(7, first=True)),
        (alternating_mask(7), alternating_mask(7, 1)),
        (checkerboard_mask(3, 5, channels=2), checkerboard_mask(3, 5, 1, channels=2)),
        (channel_mask(3, 2, 2), channel_mask(3, 2, 2, first=True)),
    ],
)
def test_two_layers_transform_every_feature_once(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == torch.bool
    assert torch.equal(one, ~other)
    assert 0 < one.sum() < one.numel()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "features must be at least 2, got 1", lambda: half_mask(1)),
        (TypeError, "features must be an int, got float", lambda: alternating_mask(4.0)),
        (ValueError, "parity must be 0 or 1, got 2", lambda: alternating_mask(4, 2)),
        (ValueError, "two pixels, got 1 x 1", lambda: checkerboard_mask(1, 1)),
        (ValueError, "width must be at least 1, got 0", lambda: checkerboard_mask(2, 0)),
        (ValueError, "channels must be at least 2, got 1", lambda: channel_mask(1, 2, 2)),
    ],
)
def test_bad_input(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()
