"""gumbel_argmax beside torch.multinomial on softmaxed logits, at 65536 x 256.

python -m pytest benchmarks/gumbel_argmax.py --benchmark-group-by=group
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flowkernels as fk

ROWS, CLASSES = 65536, 256
CALLS = {
    "flowkernels": lambda logits, k: fk.ops.gumbel_argmax(logits, k)[0],
    "torch": lambda logits, k: torch.multinomial(logits.softmax(-1), k, replacement=k > 1),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("k", [1, 4])
def test_samples(benchmark: Any, name: str, k: int) -> None:
    benchmark.group = f"{k} samples"
    logits = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))
    index = benchmark(CALLS[name], logits, k)
    drawn, chance = (index == 0).float().mean(), logits.softmax(-1)[:, 0].mean()
    assert abs(drawn - chance) < 5 * (chance / ROWS / k) ** 0.5
