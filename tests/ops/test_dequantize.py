"""dequantize, bits_per_dim and discretized_logistic_mixture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowkernels import random, testing
from flowkernels.ops import bits_per_dim, dequantize, discretized_logistic_mixture
from flowkernels.ops.dequantize.autograd import forward_op


def levels_of(shape: tuple[int, ...], levels: int = 256) -> Tensor:
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(0))


def bound(x: Tensor, **options: Any) -> testing.Call:
    def call(noise: Tensor) -> tuple[Tensor, Tensor]:
        return dequantize(x, noise=noise, **options)

    return call


@pytest.mark.parametrize("logit", [True, False])
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5,), (0, 4), (3, 1), (7, 33), (2, 3, 16)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, levels: int, logit: bool) -> None:
    x = levels_of(shape, levels)
    noise = testing.random_tensor(shape, torch.float64).sigmoid().to(dtype)
    for given in (x, x.to(dtype), x.to(torch.uint8)):
        testing.check_against_reference(bound(given, levels=levels, logit=logit, margin=0.01), [noise])


@pytest.mark.parametrize("logit", [True, False])
def test_finite_differences_and_the_jacobian(logit: bool) -> None:
    x = levels_of((3, 4), 16)
    noise = testing.random_tensor((3, 4), torch.float64).sigmoid()
    call = bound(x, levels=16, logit=logit)
    testing.check_gradients(call, [noise], second=True)
    testing.check_logdet(call, noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_its_own_noise_is_that_of_the_stream(dtype: torch.dtype, backend: str) -> None:
    x = levels_of((9, 37))
    noise = random.uniform(9, 37, seed=5, dtype=dtype)
    testing.assert_same_bits(dequantize(x, seed=5, dtype=dtype), dequantize(x, noise=noise))
    wide = levels_of((2, 5003))
    noise = random.uniform(2, 5003, seed=6, dtype=dtype)
    testing.assert_same_bits(dequantize(wide, seed=6, dtype=dtype), dequantize(wide, noise=noise))


def test_seeds() -> None:
    x = levels_of((4, 8))
    torch.manual_seed(3)
    first = dequantize(x)
    torch.manual_seed(3)
    testing.assert_same_bits(first, dequantize(x))
    assert not torch.equal(first[0], dequantize(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_levels_come_back_and_nothing_is_infinite(dtype: torch.dtype, backend: str) -> None:
    x = torch.tensor([[0, 255, 128, 0, 255]])
    noise = torch.tensor([[0.0, 1.0, 0.5, 1.0, 0.0]], dtype=dtype)
    y, logdet = dequantize(x, noise=noise, margin=1e-6)
    assert y.isfinite().all()
    assert logdet.isfinite().all()
    drawn, _ = dequantize(levels_of((50, 20)), dtype=dtype, margin=0.01)
    p = (torch.sigmoid(drawn.double()) - 0.01) / 0.98
    assert torch.equal((p * 256).floor().long(), levels_of((50, 20)))


def test_opcheck_and_compile() -> None:
    x = levels_of((5, 4)).float()
    seed = torch.tensor(3)
    testing.check_opcheck(forward_op, (x, None, seed, 0, 256, True, 1e-6, False))
    noise = testing.random_tensor((5, 4)).sigmoid()
    testing.check_opcheck(forward_op, (x, noise, seed, 0, 256, False, 0.0, False))
    testing.check_compile(bound(levels_of((5, 4))), [noise])


def test_determinism_and_threads() -> None:
    x = levels_of((700, 64))
    testing.check_deterministic(lambda: dequantize(x, seed=1), [], gradients=False)
    testing.check_threads(lambda: dequantize(x, seed=1), [], gradients=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor([[0, 256]])}, ValueError, "x must hold grey levels 0 to 255, got values from 0 to 256"),
        ({"x": torch.tensor([[-1.0, 2.0]])}, ValueError, "got values from -1.0 to 2.0"),
        ({"x": torch.tensor([[math.nan, 2.0]])}, ValueError, "x must hold grey levels"),
        (
            {"levels": 16, "x": torch.tensor([[16]], dtype=torch.uint8)},
            ValueError,
            "grey levels 0 to 15, got values from 16",
        ),
        ({"levels": 1}, ValueError, "levels must be 2 to 65536, got 1"),
        ({"levels": 16.0}, TypeError, "levels must be an int, got float"),
        ({"margin": 0.5}, ValueError, r"margin must be in \[0, 1/2\), got 0.5"),
        ({"noise": torch.zeros(3)}, ValueError, r"noise must have shape \(1, 2\)"),
        ({"x": [1, 2]}, TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.tensor([[0, 1]])} | change
    with pytest.raises(error, match=message):
        dequantize(arguments.pop("x"), **arguments)


def test_bits_per_dim() -> None:
    """A uniform distribution over 256 levels needs 8 bits for each."""
    log_prob = torch.full((3,), -12 * math.log(256), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(log_prob, 12), torch.full((3,), 8.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="features must be an integer >= 1, got 0"):
        bits_per_dim(log_prob, 0)


# ---- discretized_logistic_mixture --------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_all_levels_together_have_mass_one(levels: int) -> None:
    theta = testing.random_tensor((6, 12), torch.float64, spread=3.0)
    every = torch.arange(levels)[:, None].expand(levels, 6)
    log_p = discretized_logistic_mixture(every, theta.expand(levels, 6, 12), levels=levels)
    torch.testing.assert_close(log_p.logsumexp(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_against_differences_of_the_distribution_function() -> None:
    theta = testing.random_tensor((5, 9), torch.float64)
    logits, means, log_scales = theta.chunk(3, -1)
    x = levels_of((5,), 16)
    v, half = 2 * x.double()[:, None] / 15 - 1, 1 / 15

    def distribution(at: Tensor) -> Tensor:
        return (logits.softmax(-1) * torch.sigmoid((at - means) / log_scales.exp())).sum(-1)

    upper = torch.where(x < 15, distribution(v + half), 1.0)
    lower = torch.where(x > 0, distribution(v - half), 0.0)
    torch.testing.assert_close(
        discretized_logistic_mixture(x, theta, levels=16), (upper - lower).log(), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_narrow_and_far_components_stay_finite(dtype: torch.dtype) -> None:
    """A scale of e^-7 far from the level: the difference of two sigmoids would be 0, and its logarithm infinite."""
    theta = torch.tensor([0.0, 0.0, -1.0, 0.9, -7.0, -9.0], dtype=dtype).requires_grad_()
    for level in (0, 1, 128, 254, 255):
        x = torch.tensor(level)
        log_p = discretized_logistic_mixture(x, theta)
        (grad,) = torch.autograd.grad(log_p, theta)
        assert log_p.isfinite()
        assert grad.isfinite().all()


def test_discretized_gradients() -> None:
    x = torch.tensor([0, 1, 7, 14, 15])
    theta = testing.random_tensor((5, 6), torch.float64)
    testing.check_gradients(lambda p: discretized_logistic_mixture(x, p, levels=16), [theta], second=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor([256])}, ValueError, "x must hold grey levels 0 to 255"),
        ({"parameters": torch.zeros(1, 4)}, ValueError, "parameters must have 3 K numbers"),
        ({"parameters": torch.zeros(2, 6)}, ValueError, "parameters must have shape"),
        ({"levels": 1}, ValueError, "levels must be an integer >= 2"),
    ],
)
def test_bad_discretized_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.tensor([3]), "parameters": torch.zeros(1, 6)} | change
    with pytest.raises(error, match=message):
        discretized_logistic_mixture(arguments.pop("x"), arguments.pop("parameters"), **arguments)
