"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# What torch.compile has remembered from an earlier build of the operators would be tested instead of this one.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from flowkernels import available_backends, use_backend

# A first call may compile or fault in memory, which says nothing about the operator: no deadline. The
# examples of a run are the same everywhere, so that a red CI can be repeated; HYPOTHESIS_PROFILE=search looks
# for new ones.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.register_profile("search", parent=settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every backend that is here."""
    name: str = request.param
    if name not in available_backends():
        pytest.skip(f"backend {name} is not available")
    with use_backend(name):
        yield name
