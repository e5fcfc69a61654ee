"""Feature masks of coupling layers: what users may write, checked, in the one form that operators read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Mask: TypeAlias = "Tensor | Sequence[bool] | Sequence[int]"


class Positions(NamedTuple):
    """Which column of the parameters each feature reads, -1 where it stays as it is; (features,), int64."""

    full: Tensor  # for parameters that have a column for every feature
    compact: Tensor  # for parameters that have a column for every transformed feature
    # How many features are transformed; None while torch.compile traces, where a mask has no values.
    selected: int | None


# Keyed on the tensor and its version: a change in place is noticed, a dead mask is forgotten.
_known: Any = WeakIdKeyDictionary()


def positions_of(mask: Mask, features: int, device: torch.device) -> Positions:
    """The positions of a mask over `features` features.

    A boolean mask has True where a feature is transformed. Indices name the transformed features; parameters
    without columns for the others follow their order.

    Raises:
        TypeError: neither booleans nor integers.
        ValueError: a wrong length, an index out of range or twice, nothing or everything selected.
    """
    if not isinstance(mask, Tensor):
        return _of_tensor(_as_tensor(mask, features, device), features, device)
    if torch.compiler.is_compiling() or mask.is_inference():
        return _of_tensor(mask, features, device)
    known = _known.get(mask)
    if known is not None and known[0] == (mask._version, features, device):
        found: Positions = known[1]
        return found
    positions = _of_tensor(mask, features, device)
    _known[mask] = (mask._version, features, device), positions
    return positions


def _as_tensor(mask: Sequence[bool] | Sequence[int], features: int, device: torch.device) -> Tensor:
    try:
        values = list(mask)
    except TypeError:
        raise TypeError(f"mask must be a tensor or a list of booleans or indices, got {type(mask).__name__}") from None
    if all(isinstance(v, bool) for v in values) and values:
        _check_length(len(values), features)
        _check_count(sum(values), features)
        return torch.tensor(values, dtype=torch.bool, device=device)
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int):
            raise TypeError(f"mask must hold booleans or indices only, got {v!r}")
    _check_indices(values, features)
    return torch.tensor(values, dtype=torch.int64, device=device)


def _of_tensor(mask: Tensor, features: int, device: torch.device) -> Positions:
    if mask.dim() != 1:
        raise ValueError(f"mask must have one dimension, the features, got shape {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device}, but x is on {device}: use one device")
    every = torch.arange(features, device=device)
    count: int | None = None
    if mask.dtype == torch.bool:
        _check_length(mask.shape[0], features)
        if not torch.compiler.is_compiling():
            count = int(mask.sum())
            _check_count(count, features)
        compact = torch.where(mask, mask.cumsum(0) - 1, -1)
        return Positions(torch.where(mask, every, -1), compact, count)
    if mask.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"mask must be boolean, or integers for indices, got {mask.dtype}")
    if not torch.compiler.is_compiling():
        _check_indices(mask.tolist(), features)
    count = mask.shape[0]
    _check_count(count, features)
    order = torch.arange(count, device=device)
    compact = torch.full((features,), -1, device=device).scatter(0, mask.long(), order)
    return Positions(torch.where(compact >= 0, every, -1), compact, count)


def _check_length(length: int, features: int) -> None:
    if length != features:
        raise ValueError(f"mask must have one entry for each of x's {features} features, got {length}")


def _check_count(count: int, features: int) -> None:
    if count == 0:
        raise ValueError(f"mask selects none of the {features} features: nothing would be transformed")
    if count == features:
        raise ValueError(f"mask selects all of the {features} features: leave mask out to transform everything")


def _check_indices(indices: Sequence[int], features: int) -> None:
    seen: set[int] = set()
    for i in indices:
        if not 0 <= i < features:
            raise ValueError(f"mask has index {i}, but x has features 0 to {features - 1}")
        if i in seen:
            raise ValueError(f"mask has index {i} twice")
        seen.add(i)
    _check_count(len(seen), features)
