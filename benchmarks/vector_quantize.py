"""vector_quantize and nearest_code beside torch.cdist(x, codebook).argmin(-1), 65536 vectors of 64 and 1024 codes.

python -m pytest benchmarks/vector_quantize.py --benchmark-group-by=group
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flowkernels as fk

VECTORS, CODES, FEATURES = 65536, 1024, 64
CALLS = {
    "nearest_code": fk.ops.nearest_code,
    "vector_quantize": lambda x, codebook: fk.ops.vector_quantize(x, codebook).index,
    "torch": lambda x, codebook: torch.cdist(x, codebook).argmin(-1),
}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(VECTORS, FEATURES, generator=generator)
    return x, torch.randn(CODES, FEATURES, generator=generator)


def allocated(call: Any, *arguments: torch.Tensor) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        call(*arguments)
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())


@pytest.mark.parametrize("name", CALLS)
def test_search(benchmark: Any, name: str) -> None:
    benchmark.group = "nearest of 1024 codes"
    x, codebook = data()
    index = benchmark(CALLS[name], x, codebook)
    benchmark.extra_info["MB allocated"] = allocated(CALLS[name], x, codebook) / 2**20
    chosen = (x.double() - codebook[index].double()).square().sum(-1)
    nearest = torch.cdist(x[:2048].double(), codebook.double()).square().amin(-1)
    assert (chosen[:2048] - nearest).max() < 1e-4
    assert (chosen >= 0).all()
