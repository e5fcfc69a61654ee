"""The ELBO with categorical latents and the estimators of its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowkernels import testing
from flowkernels.demo.estimators import gradients, measure
from flowkernels.objectives import (
    ESTIMATORS,
    MovingAverage,
    categorical_entropy,
    elbo_discrete,
    every_latent,
    leave_one_out,
    score_function_surrogate,
)

DRAWS = 200_000


def by_loop(logits: Tensor, log_likelihood) -> Tensor:
    """The ELBO as it is written: a sum over every z."""
    b, k, d = logits.shape
    q = logits.softmax(-1)
    total = torch.zeros(b, dtype=logits.dtype)
    for z in every_latent(k, d, like=logits):
        chance = (q * z).sum(-1).prod(-1)
        inside = log_likelihood(z.expand(1, b, k, d))[0] - k * math.log(d)
        total = total + torch.where(chance > 0, chance * (inside - chance.clamp_min(1e-300).log()), 0.0)
    return total


def target(z: Tensor) -> Tensor:
    weights = testing.random_tensor((z.shape[-1] * z.shape[-2], 3), torch.float64, seed=5)
    return -(z.flatten(-2) @ weights - 1).square().sum(-1)


def test_exact_is_the_sum_over_every_latent() -> None:
    logits = testing.random_tensor((4, 3, 2), torch.float64).requires_grad_()
    value, expected = elbo_discrete(logits, target, estimator="exact"), by_loop(logits, target)
    torch.testing.assert_close(value, expected)
    for got, want in zip(*(torch.autograd.grad(v.sum(), logits) for v in (value, expected)), strict=True):
        torch.testing.assert_close(got, want)


def test_exact_with_an_impossible_category() -> None:
    logits = testing.random_tensor((2, 2, 3), torch.float64)
    logits[:, 0, 1] = -math.inf
    logits.requires_grad_()
    value = elbo_discrete(logits, target, estimator="exact")
    torch.testing.assert_close(value, by_loop(logits, target))


@pytest.mark.parametrize("entropy", ["exact", "sampled"])
@pytest.mark.parametrize("estimator", ["gumbel_straight_through", "straight_through", "score_function", "rebar"])
def test_values_are_unbiased(estimator: str, entropy: str) -> None:
    logits = testing.random_tensor((1, 3, 2), torch.float64)
    exact = elbo_discrete(logits, target, estimator="exact")
    values = elbo_discrete(logits.expand(DRAWS, 3, 2), target, estimator=estimator, entropy=entropy, seed=1)
    assert (values.mean() - exact[0]).abs() < 4 * values.std() / math.sqrt(DRAWS)


def unbiased(grads: Tensor) -> bool:
    """Whether the mean of the draws is the exact gradient, as far as they can tell (5 standard errors in any entry)."""
    exact = gradients("exact", None, 1, 0)[0]
    error = grads.std(0) / math.sqrt(len(grads))
    return bool(((grads.mean(0) - exact).abs() < 5 * error.clamp_min(1e-12)).all())


@pytest.mark.parametrize("name", ["score_function", "score_function_leave_one_out"])
def test_score_function_is_unbiased(name: str) -> None:
    assert unbiased(gradients(name, None, DRAWS, seed=3))


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_rebar_is_unbiased_at_any_temperature(tau: float) -> None:
    assert unbiased(gradients("rebar", tau, DRAWS, seed=3))


def test_rebar_lowers_the_variance() -> None:
    plain, mild, warm = measure("score_function", None, DRAWS), *(measure("rebar", tau, DRAWS) for tau in (0.5, 2.0))
    assert mild.variance < plain.variance / 4
    assert mild.variance < warm.variance


def test_rebar_without_its_control_variate_is_the_score_function() -> None:
    grads, logits = [], testing.random_tensor((50, 2, 3), torch.float64)
    for options in ({"estimator": "score_function"}, {"estimator": "rebar", "eta": 0.0, "tau": 0.3}):
        at = logits.clone().requires_grad_()
        grads += torch.autograd.grad(elbo_discrete(at, target, seed=5, **options).sum(), at)
    torch.testing.assert_close(*grads)


def test_rebar_leaves_the_other_gradients_alone() -> None:
    """The control variate is of the logits: the model's own parameters have the gradient of the one-hot samples."""
    grads, logits = [], testing.random_tensor((50, 2, 3), torch.float64)
    for options in ({"estimator": "score_function"}, {"estimator": "rebar", "tau": 0.3}):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        value = elbo_discrete(logits, lambda z, scale=scale: target(z) * scale, seed=5, **options)
        grads += torch.autograd.grad(value.sum(), scale)
    torch.testing.assert_close(*grads)


def test_rebar_with_an_impossible_category() -> None:
    logits = testing.random_tensor((1, 2, 3), torch.float64)
    logits[:, 0, 1] = -math.inf
    many = logits.expand(DRAWS, 2, 3).clone().requires_grad_()
    (grads,) = torch.autograd.grad(elbo_discrete(many, target, estimator="rebar", tau=0.5, seed=2).sum(), many)
    single = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(elbo_discrete(single, target, estimator="exact").sum(), single)
    assert ((grads.mean(0) - exact[0]).abs() <= 5 * grads.std(0) / math.sqrt(DRAWS)).all()


@pytest.mark.parametrize("estimator", ["score_function", "rebar"])
def test_sampled_entropy_keeps_the_gradient_unbiased(estimator: str) -> None:
    logits = testing.random_tensor((1, 2, 3), torch.float64)
    many = logits.expand(DRAWS, 2, 3).clone().requires_grad_()
    value = elbo_discrete(many, target, estimator=estimator, entropy="sampled", seed=2)
    (grads,) = torch.autograd.grad(value.sum(), many)
    single = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(elbo_discrete(single, target, estimator="exact").sum(), single)
    assert ((grads.mean(0) - exact[0]).abs() < 5 * grads.std(0) / math.sqrt(DRAWS)).all()


def test_straight_through_is_biased_and_the_test_can_tell() -> None:
    assert not unbiased(gradients("straight_through", None, DRAWS, seed=3))
    biased = measure("straight_through", None, DRAWS)
    assert biased.bias > 20 * biased.error


@pytest.mark.parametrize("estimator", ["gumbel", "gumbel_straight_through"])
def test_bias_vanishes_and_variance_grows_as_tau_falls(estimator: str) -> None:
    """The lecture's claim about the relaxation."""
    warm, mild, cold = (measure(estimator, tau, DRAWS) for tau in (2.0, 0.5, 0.05))
    assert warm.bias > mild.bias + 5 * (warm.error + mild.error)
    assert mild.bias > cold.bias + 5 * (mild.error + cold.error)
    assert warm.bias > 5 * cold.bias
    assert cold.variance > 8 * mild.variance > 24 * warm.variance
    # 1 / tau: halving the temperature about doubles the variance in the end.
    colder = measure(estimator, 0.025, DRAWS)
    assert 1.5 < colder.variance / cold.variance < 2.7


def test_leave_one_out_lowers_the_variance() -> None:
    plain, four = (measure(n, None, DRAWS) for n in ("score_function", "score_function_leave_one_out"))
    assert four.variance < plain.variance / 4 / 2  # 4 for the number of samples alone


def test_surrogate() -> None:
    value = testing.random_tensor((5,), torch.float64).requires_grad_()
    log_q = testing.random_tensor((5,), torch.float64, seed=1).requires_grad_()
    surrogate = score_function_surrogate(value, log_q, 0.3)
    assert torch.equal(surrogate, value)
    to_value, to_log_q = torch.autograd.grad(surrogate.sum(), (value, log_q))
    assert torch.equal(to_value, torch.ones(5, dtype=torch.float64))
    assert torch.equal(to_log_q, (value - 0.3).detach())
    with pytest.raises(ValueError, match="log_prob must have value's shape"):
        score_function_surrogate(value, log_q[:2])


def test_baselines() -> None:
    values = torch.tensor([[1.0], [3.0], [8.0]])
    assert leave_one_out(values)[:, 0].tolist() == [5.5, 4.5, 2.0]
    with pytest.raises(ValueError, match="at least 2 samples"):
        leave_one_out(values[:1])
    average = MovingAverage(0.9)
    assert average(torch.tensor([2.0, 4.0])) == 0
    assert average(torch.tensor([7.0])) == pytest.approx(3.0)
    assert average(torch.tensor([0.0])) == pytest.approx((0.9 * 3 + 7) / 1.9)
    average.eval()
    assert average(torch.tensor([1e9])) == average(torch.tensor([1e9]))
    with pytest.raises(ValueError, match="decay"):
        MovingAverage(1.0)


def test_entropy() -> None:
    logits = testing.random_tensor((6, 5), torch.float64)
    torch.testing.assert_close(categorical_entropy(logits), torch.distributions.Categorical(logits=logits).entropy())
    one = torch.tensor([0.0, -math.inf, -math.inf]).requires_grad_()
    assert categorical_entropy(one) == 0
    assert categorical_entropy(torch.zeros(8)).item() == pytest.approx(math.log(8))


def test_estimators_switch_with_one_word() -> None:
    logits = testing.random_tensor((3, 2, 4)).requires_grad_()
    for estimator in ESTIMATORS:
        value = elbo_discrete(logits, lambda z: z[..., 0].sum(-1), estimator=estimator, samples=2, seed=1)
        assert value.shape == (3,)
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "magic"}, "estimator must be one of gumbel"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"entropy": "none"}, "entropy must be one of exact, sampled"),
        ({"baseline": "leave_one_out"}, "baseline is for estimator 'score_function'"),
        ({"estimator": "score_function", "baseline": "mean"}, "baseline must be one of leave_one_out"),
        ({"tau": 0.0}, "tau must be positive"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elbo_discrete(torch.zeros(2, 3, 4), lambda z: z.sum((-2, -1)), **options)
    with pytest.raises(ValueError, match="logits must have shape"):
        elbo_discrete(torch.zeros(3, 4), target)
    with pytest.raises(ValueError, match="too many to enumerate"):
        elbo_discrete(torch.zeros(1, 20, 8), target, estimator="exact")
