"""A variational autoencoder with categorical latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flowkernels.objectives import elbo_discrete, every_latent
from flowkernels.objectives.discrete import Baseline
from flowkernels.ops import gumbel_argmax
from flowkernels.random import Seed, draw_stream, uniform


def binomial_log_likelihood(x: Tensor, logits: Tensor, levels: int) -> Tensor:
    """log Binomial(x; levels, sigmoid(logits)) summed over the last dimension, in nats; Bernoulli for levels 1."""
    n = float(levels)
    ways = math.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    return (ways + x * logits - n * nn.functional.softplus(logits)).sum(-1)


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DiscreteVAE(nn.Module):
    r"""x <- z in {1..d}^k with a uniform prior and a factorised posterior::

        p(z)   = d^-k
        p(x|z) = prod Binomial(x_i; levels, sigmoid(decoder(z)_i))
        q(z|x) = prod Categorical(encoder(x)_j)

    Args:
        features: D, the size of x, whose entries count from 0 to `levels` (0 or 1 for levels 1).
        latents, categories: k and d.
        hidden_features: widths of the hidden layers; the decoder has them in reverse.
        levels: the largest value of x.

    Source: Jang et al. 2017, arXiv:1611.01144.
    """

    def __init__(
        self,
        features: int,
        latents: int = 16,
        categories: int = 8,
        hidden_features: Sequence[int] = (256,),
        *,
        levels: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (
            ("features", features),
            ("latents", latents),
            ("categories", categories),
            ("levels", levels),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.features, self.latents, self.categories, self.levels = features, latents, categories, levels
        self.encoder = mlp((features, *hidden_features, latents * categories))
        self.decoder = mlp((latents * categories, *reversed(hidden_features), features))

    def encode(self, x: Tensor) -> Tensor:
        """Logits of q(z|x), (N, k, d)."""
        logits: Tensor = self.encoder(x / self.levels * 2 - 1)
        return logits.reshape(-1, self.latents, self.categories)

    def decode(self, z: Tensor) -> Tensor:
        """Logits of the pixels (..., D) from one-hot or relaxed z (..., k, d)."""
        logits: Tensor = self.decoder(z.flatten(-2))
        return logits

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) in nats: x (N, D), z (..., N, k, d) -> (..., N)."""
        return binomial_log_likelihood(x, self.decode(z), self.levels)

    def elbo(
        self,
        x: Tensor,
        *,
        estimator: str = "gumbel",
        tau: float | Tensor = 1.0,
        samples: int = 1,
        baseline: Baseline = None,
        eta: float | Tensor = 1.0,
        entropy: str = "exact",
        seed: Seed = None,
    ) -> Tensor:
        """Lower bound of log p(x) in nats, (N,), gradients by `estimator`: see `objectives.elbo_discrete`."""
        return elbo_discrete(
            self.encode(x),
            lambda z: self.log_likelihood(x, z),
            estimator=estimator,
            tau=tau,
            samples=samples,
            baseline=baseline,
            eta=eta,
            entropy=entropy,
            seed=seed,
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (N,), by enumeration of all d^k latents; only where there are few."""
        z = every_latent(self.latents, self.categories, like=x)
        pixels = self.decode(z)
        joint = torch.stack([binomial_log_likelihood(row, pixels, self.levels) for row in x])
        return joint.logsumexp(-1) - self.latents * math.log(self.categories)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) for the most probable z of each x, (N, D)."""
        z = nn.functional.one_hot(self.encode(x).argmax(-1), self.categories).to(x.dtype)
        return self.decode(z).sigmoid() * self.levels

    @torch.no_grad()
    def sample(self, n: int, *, seed: Seed = None) -> Tensor:
        """n draws of x, (n, D)."""
        like = next(self.parameters())
        source = draw_stream(seed, like.device)
        index, _ = gumbel_argmax(like.new_zeros(n, self.latents, self.categories), seed=source)
        z = nn.functional.one_hot(index[..., 0], self.categories).to(like.dtype)
        probability = self.decode(z).sigmoid()
        # A binomial is a sum of Bernoullis. The stream itself has drawn z.
        x = torch.zeros_like(probability)
        for level in range(self.levels):
            x += uniform(*x.shape, seed=source.further(level + 1), dtype=torch.float32, device=x.device) < probability
        return x
