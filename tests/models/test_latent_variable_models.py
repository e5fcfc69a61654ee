"""DiscreteVAE, VQVAE and GaussianMixture."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture as SklearnMixture

from flowkernels import testing
from flowkernels.demo.common import LEVELS as GREY_LEVELS
from flowkernels.demo.common import Options, load_digits
from flowkernels.models import VQVAE, CategoricalMADE, DiscreteVAE, GaussianMixture
from flowkernels.models.discrete_vae import binomial_log_likelihood
from flowkernels.objectives import elbo_discrete
from flowkernels.ops import gumbel_argmax


def small_vae() -> DiscreteVAE:
    torch.manual_seed(1)
    return DiscreteVAE(4, latents=2, categories=3, hidden_features=(8,), levels=2).double()


def test_binomial() -> None:
    x, logits = torch.tensor([[0.0, 3.0, 16.0]]), torch.tensor([[0.3, -1.0, 2.0]])
    expected = stats.binom.logpmf(x, 16, logits.sigmoid()).sum()
    assert binomial_log_likelihood(x, logits, 16).item() == pytest.approx(expected, rel=1e-5)


def test_probabilities_of_every_x_sum_to_one() -> None:
    x = torch.tensor(list(itertools.product(range(3), repeat=4)), dtype=torch.float64)
    assert small_vae().log_prob(x).exp().sum().item() == pytest.approx(1.0)


def test_elbo_is_log_prob_minus_kl() -> None:
    model = small_vae()
    x = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]], dtype=torch.float64)
    elbo, log_prob = model.elbo(x, estimator="exact"), model.log_prob(x)
    assert (elbo < log_prob).all()
    q = model.encode(x).softmax(-1)
    kl = torch.zeros(2, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        z = torch.nn.functional.one_hot(torch.tensor([a, b]), 3).double().expand(2, 2, 3)
        log_q = (q[:, 0, a] * q[:, 1, b]).log()
        posterior = model.log_likelihood(x, z) - 2 * math.log(3) - log_prob
        kl += log_q.exp() * (log_q - posterior)
    torch.testing.assert_close(elbo, log_prob - kl)


def test_vae_samples_follow_its_probabilities() -> None:
    model = small_vae()
    x = model.sample(100_000, seed=2)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)), dtype=torch.float64)
    counts = (x @ torch.tensor([27.0, 9.0, 3.0, 1.0], dtype=x.dtype)).long().bincount(minlength=81)
    expected = model.log_prob(every).exp().detach() * 100_000
    assert stats.chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue > 1e-3


def test_exact_estimator_agrees_with_samples_of_a_mixture() -> None:
    model = GaussianMixture(2, 5).double()
    with torch.no_grad():
        model.logits.copy_(testing.random_tensor((5,), torch.float64))
    x = testing.random_tensor((7, 2), torch.float64, seed=1)
    target = model.log_target(x)
    # At the exact posterior the bound is tight, and its gradient is that of the likelihood.
    posterior = model.posterior(x).detach()[:, None]
    elbo = elbo_discrete(posterior, target, estimator="exact")
    torch.testing.assert_close(elbo, model.log_prob(x))
    parameters = tuple(model.parameters())
    got = torch.autograd.grad(elbo.sum(), parameters)
    expected = torch.autograd.grad(model.log_prob(x).sum(), parameters)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
    # Every sample has the value log p(x) there: an estimator of variance zero.
    sampled = elbo_discrete(posterior, target, estimator="score_function", entropy="sampled", samples=9, seed=1)
    torch.testing.assert_close(sampled, model.log_prob(x))


def test_samples_of_another_rank_have_other_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only other noise on the same latents: with certain pixels and no spread the latents are all there is."""
    vae, mixture = small_vae(), GaussianMixture(2, 5)
    with torch.no_grad():
        vae.decoder[-1].weight.mul_(1e4)
        mixture.log_scales.fill_(-40.0)
    for model in (vae, mixture):
        drawn = []
        for rank in (0, 1):
            monkeypatch.setattr("flowkernels.random._rank", lambda rank=rank: rank)
            torch.manual_seed(0)
            drawn.append(model.sample(100))
        assert not torch.equal(*drawn)


def test_mixture_against_scikit_learn() -> None:
    x = torch.cat([testing.random_tensor((200, 2), torch.float64, seed=s) + 4 * s for s in range(3)])
    theirs = SklearnMixture(3, covariance_type="diag", random_state=0, tol=1e-9, max_iter=500).fit(x.numpy())
    model = GaussianMixture(2, 3).double()
    with torch.no_grad():
        model.logits.copy_(torch.tensor(theirs.weights_).log())
        model.means.copy_(torch.tensor(theirs.means_))
        model.log_scales.copy_(torch.tensor(theirs.covariances_).log() / 2)
    torch.testing.assert_close(model.log_prob(x), torch.tensor(theirs.score_samples(x.numpy())))
    torch.testing.assert_close(
        model.posterior(x).exp(), torch.tensor(theirs.predict_proba(x.numpy())), atol=1e-9, rtol=1e-6
    )


def test_em_never_lowers_the_likelihood_and_finds_the_components() -> None:
    x = torch.cat([0.5 * testing.random_tensor((200, 2), torch.float64, seed=s) + 4 * s for s in range(3)])
    torch.manual_seed(0)
    model = GaussianMixture(2, 3).double()
    with torch.no_grad():
        model.means.copy_(x[[0, 250, 500]])
    values = []
    for _ in range(30):
        values.append(model.log_prob(x).mean().item())
        model.em_step(x)
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    assert sorted(model.means[:, 0].tolist()) == pytest.approx([0, 4, 8], abs=0.15)


def test_mixture_samples() -> None:
    torch.manual_seed(0)
    model = GaussianMixture(1, 3).double()
    x = model.sample(50_000, seed=1)[:, 0].numpy()
    weights = model.logits.softmax(-1).detach().numpy()

    def cdf(t):
        parts = zip(weights, model.means[:, 0].tolist(), model.log_scales[:, 0].exp().tolist(), strict=True)
        return sum(w * stats.norm.cdf(t, m, s) for w, m, s in parts)

    assert stats.kstest(x, cdf).pvalue > 1e-3


@pytest.mark.parametrize("decay", [0.99, None])
def test_vqvae_shapes_and_gradients(decay: float | None) -> None:
    model = VQVAE(codes=8, code_features=4, hidden_channels=8, levels=GREY_LEVELS - 1, decay=decay)
    x = load_digits().test[:6].reshape(6, 1, 8, 8)
    loss = model.loss(x)
    assert loss.shape == (6,)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert model.encode(x).shape == (6, 4, 4)
    assert model.reconstruct(x).shape == x.shape
    assert model.sample(3, (8, 8), seed=0).shape == (3, 1, 8, 8)
    model.eval()
    assert (model.elbo(x) < 0).all()


def categorical_made(features: int = 4, categories: int = 3) -> CategoricalMADE:
    torch.manual_seed(3)
    model = CategoricalMADE(features, categories, hidden_features=(16, 16)).double()
    with torch.no_grad():  # far from uniform
        for p in model.parameters():
            p.mul_(4)
    return model


@pytest.mark.parametrize(("features", "categories"), [(4, 3), (1, 5), (5, 1), (2, 7)])
def test_categorical_probabilities_sum_to_one(features: int, categories: int) -> None:
    x = torch.tensor(list(itertools.product(range(categories), repeat=features)))
    assert categorical_made(features, categories).log_prob(x).exp().sum().item() == pytest.approx(1.0)


def test_categorical_logits_see_earlier_variables_alone() -> None:
    model = categorical_made()
    x = torch.randint(3, (50, 4))
    logits = model.logits(x)
    for i in range(4):
        y = x.clone()
        y[:, i] = (y[:, i] + 1) % 3
        changed = (model.logits(y) != logits).flatten(2).any(-1).any(0).tolist()
        assert changed == [j > i for j in range(4)]


def test_categorical_samples_are_those_of_one_variable_after_the_other() -> None:
    model = categorical_made(6, 4)
    x = torch.zeros(200, 6, dtype=torch.int64)
    for i in range(6):
        x[:, i] = gumbel_argmax(model.logits(x), seed=9)[0][:, i, 0]
    assert torch.equal(model.sample(200, seed=9), x)


def test_categorical_samples_follow_the_probabilities() -> None:
    model = categorical_made()
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    counts = (model.sample(100_000, seed=2) @ torch.tensor([27, 9, 3, 1])).bincount(minlength=81)
    expected = model.log_prob(every).exp().detach() * 100_000
    likely = expected > 5
    assert likely.sum() > 20
    assert (
        stats.chisquare(counts[likely], expected[likely] * (counts[likely].sum() / expected[likely].sum())).pvalue
        > 1e-3
    )
    assert stats.binomtest(int(counts[~likely].sum()), 100_000, float(expected[~likely].sum() / 1e5)).pvalue > 1e-3


def test_the_prior_of_a_vqvae() -> None:
    model = VQVAE(codes=5, code_features=4, hidden_channels=8, levels=GREY_LEVELS - 1).double().eval()
    x = load_digits().test[:6].reshape(6, 1, 8, 8).double()
    index, uniform = model.encode(x), model.elbo(x)
    model.prior = CategoricalMADE(16, 5).double()
    torch.testing.assert_close(model.elbo(x) - uniform, model.prior.log_prob(index.flatten(1)) + 16 * math.log(5))
    codes = model.prior.sample(3, seed=4).reshape(3, 4, 4)
    torch.testing.assert_close(model.sample(3, (8, 8), seed=4), model.decode(codes).sigmoid() * (GREY_LEVELS - 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dvae", "vqvae"])
def test_they_learn_the_digits(name: str, tmp_path: Path) -> None:
    """After a few epochs both beat the best model without latents by far."""
    demo = importlib.import_module(f"flowkernels.demo.{name}")
    demo.run(Options(out=tmp_path, epochs=12))
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["bits_per_dim"] < found["without_latents"] - 0.8
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="latents must be at least 1, got 0"):
        DiscreteVAE(4, latents=0)
    with pytest.raises(ValueError, match="components must be at least 1"):
        GaussianMixture(2, 0)
    with pytest.raises(ValueError, match="features and categories must be at least 1, got 0 and 2"):
        CategoricalMADE(0, 2)
    for x in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"x must be int64 of shape \(N, 4\)"):
            categorical_made().log_prob(x)
