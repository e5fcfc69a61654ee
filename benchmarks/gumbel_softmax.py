"""gumbel_softmax beside torch.nn.functional.gumbel_softmax, eager and compiled, at 65536 x 256.

python -m pytest benchmarks/gumbel_softmax.py --benchmark-group-by=group
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import flowkernels as fk

ROWS, CLASSES = 65536, 256


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))


CALLS = {
    "flowkernels": fk.ops.gumbel_softmax,
    "torch": F.gumbel_softmax,
    "compiled": torch.compile(F.gumbel_softmax),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_forward(benchmark, logits, name: str, hard: bool) -> None:
    benchmark.group = f"forward, {'hard' if hard else 'soft'}"
    y = benchmark(CALLS[name], logits, tau=0.7, hard=hard)
    # No figure without a check: rows of ones, and the first categories drawn as often as they should be.
    torch.testing.assert_close(y.sum(-1), torch.ones(ROWS))
    drawn, chance = (y.argmax(-1) == 0).float().mean(), logits.softmax(-1)[:, 0].mean()
    assert abs(drawn - chance) < 5 * (chance / ROWS) ** 0.5


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_forward_and_backward(benchmark, logits, name: str, hard: bool) -> None:
    benchmark.group = f"forward and backward, {'hard' if hard else 'soft'}"
    leaf, weight = logits.clone().requires_grad_(), torch.randn(ROWS, CLASSES)

    def step() -> torch.Tensor:
        return torch.autograd.grad(CALLS[name](leaf, tau=0.7, hard=hard), leaf, weight)[0]

    grad = benchmark(step)
    assert grad.isfinite().all()
    assert grad.sum(-1).abs().max() < 1e-3
