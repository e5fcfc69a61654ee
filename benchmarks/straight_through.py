"""straight_through beside the lines that it replaces, at 65536 x 256.

python -m pytest benchmarks/straight_through.py --benchmark-group-by=group
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flowkernels as fk

ROWS, CLASSES = 65536, 256


def plain_threshold(x: torch.Tensor) -> torch.Tensor:
    return (x > 0.5).to(x.dtype) - x.detach() + x


def plain_categorical(x: torch.Tensor) -> torch.Tensor:
    hard = torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1.0)
    return hard - x.detach() + x


CALLS = {
    ("threshold", "flowkernels"): fk.ops.straight_through,
    ("threshold", "torch"): plain_threshold,
    ("threshold", "compiled"): torch.compile(plain_threshold),
    ("categorical", "flowkernels"): lambda x: fk.ops.straight_through(x, "categorical"),
    ("categorical", "torch"): plain_categorical,
    ("categorical", "compiled"): torch.compile(plain_categorical),
}


@pytest.mark.parametrize(("kind", "name"), CALLS)
def test_forward(benchmark: Any, kind: str, name: str) -> None:
    benchmark.group = kind
    x = torch.rand(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))
    y = benchmark(CALLS[kind, name], x)
    expected = plain_threshold(x) if kind == "threshold" else plain_categorical(x)
    torch.testing.assert_close(y, expected)
