"""Checks of the public faces. Each error names the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The type that kernels calculate in, per type of the tensors that come in: half precision is stored, never
# calculated in.
COMPUTE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def check_float_tensor(name: str, value: Any, *, like: Tensor | None = None, like_name: str = "x") -> None:
    """Raises unless `value` is a floating-point tensor that can be used together with `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in COMPUTE_DTYPE:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    if like is not None:
        check_device(name, value, like, like_name)
        if value.dtype != like.dtype:
            raise TypeError(f"{name} has dtype {value.dtype}, but {like_name} has {like.dtype}: use one dtype")


def check_device(name: str, value: Tensor, like: Tensor, like_name: str = "x") -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but {like_name} is on {like.device}: use one device")


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raises unless ``value.shape`` is `expected`; `meaning` says in words what that shape is."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {expected} ({meaning}), got {tuple(value.shape)}")


def check_logdet(logdet: Tensor | None, x: Tensor) -> None:
    """Raises unless the running log-det of rows `x`, where there is one, has a number for each row."""
    if logdet is not None:
        check_float_tensor("logdet", logdet)
        check_shape("logdet", logdet, tuple(x.shape[:-1]), "x's shape without the features")
        check_device("logdet", logdet, x)


def check_parameter(name: str, value: Any, x: Tensor, autocast: bool) -> None:
    """Raises unless `value` has x's dtype and device; under `autocast` a layer may give it in another dtype."""
    if autocast and isinstance(value, Tensor) and torch.float64 not in (value.dtype, x.dtype):
        check_float_tensor(name, value)
        check_device(name, value, x)
    else:
        check_float_tensor(name, value, like=x)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
