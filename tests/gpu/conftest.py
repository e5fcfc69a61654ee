"""What has to be there for the checks that need no GPU: Triton and nvcc. Without them tests skip; in CI they fail."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))


def missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; in CI that is a failure")
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """FK_SHARD=i/n: every n-th test from the i-th on. `make gpu` runs n processes, with or without pytest-xdist."""
    shard = os.environ.get("FK_SHARD")
    if shard:
        i, n = map(int, shard.split("/"))
        items[:] = items[i::n]


@pytest.fixture(scope="session")
def nvcc() -> str:
    import build

    found = build.nvcc()
    if found is None:
        missing("nvcc is not on the PATH: CUDA C++ is not compiled for real architectures")
    return str(found)


@pytest.fixture(scope="session")
def host_kernels() -> object:
    """torch.ops.flowkernels_cuda on CPU tensors: every .cu file built as host C++."""
    import shutil

    import torch

    import build

    if torch.version.cuda is not None and torch.cuda.is_available():
        pytest.skip("this process may hold the real CUDA kernels: tests/gpu/test_on_device.py runs those")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        missing("no C++ compiler")
    build.load_host_libraries()
    return torch.ops.flowkernels_cuda


@pytest.fixture(scope="session")
def triton() -> object:
    try:
        import triton
    except ImportError:
        missing("triton is not installed: Triton kernels are neither run interpreted nor compiled")
    return triton
