"""An autoencoder whose latents are codes of a learnt codebook."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowkernels.models.categorical_made import CategoricalMADE
from flowkernels.models.discrete_vae import binomial_log_likelihood
from flowkernels.nn.vector_quantizer import VectorQuantizer
from flowkernels.ops import gumbel_argmax
from flowkernels.random import Seed


class VQVAE(nn.Module):
    r"""Images x (N, C, H, W), entries from 0 to `levels` <- codes on a grid of half the size::

        z_e = encoder(x),  z_q = nearest codes,  p(x|z_q) = prod Binomial(x_i; levels, sigmoid(decoder(z_q)_i))

    `loss` is -log p(x|z_q) plus the quantizer's loss. The posterior is certain, so `elbo` is log p(x|z_q) plus the
    prior's log-probability of the codes: uniform, until `prior` is set to a distribution that was fitted to them.

    Source: van den Oord et al. 2017, arXiv:1711.00937.
    """

    def __init__(
        self,
        channels: int = 1,
        codes: int = 64,
        code_features: int = 16,
        hidden_channels: int = 64,
        *,
        levels: int = 1,
        commitment: float = 0.25,
        decay: float | None = 0.99,
        revive: float = 0.01,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.prior: CategoricalMADE | None = None
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, hidden_channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, code_features, 1),
        )
        self.quantizer = VectorQuantizer(codes, code_features, commitment=commitment, decay=decay, revive=revive, dim=1)
        self.decoder = nn.Sequential(
            nn.Conv2d(code_features, hidden_channels, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(hidden_channels, hidden_channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, channels, 3, padding=1),
        )

    def encode(self, x: Tensor) -> Tensor:
        """The codes' indices, (N, H/2, W/2)."""
        return self.quantizer.encode(self.encoder(x / self.levels * 2 - 1))

    def decode(self, index: Tensor) -> Tensor:
        """Logits of the pixels (N, C, H, W) from the codes' indices."""
        logits: Tensor = self.decoder(self.quantizer.decode(index))
        return logits

    def _log_likelihood(self, x: Tensor, logits: Tensor) -> Tensor:
        return binomial_log_likelihood(x.flatten(1), logits.flatten(1), self.levels)

    def loss(self, x: Tensor) -> Tensor:
        """-log p(x|z_q) + the quantizer's loss summed over the grid, (N,), to minimise."""
        quantized, _, penalty = self.quantizer(self.encoder(x / self.levels * 2 - 1))
        loss: Tensor = penalty.flatten(1).sum(-1) - self._log_likelihood(x, self.decoder(quantized))
        return loss

    def elbo(self, x: Tensor) -> Tensor:
        """Lower bound of log p(x) in nats, (N,)."""
        index = self.encode(x)
        return self._log_likelihood(x, self.decode(index)) + self.log_prior(index)

    def log_prior(self, index: Tensor) -> Tensor:
        """log p of codes (N, H/2, W/2) in nats, (N,)."""
        if self.prior is None:
            uniform = -index.shape[1:].numel() * math.log(len(self.quantizer.counts))
            return self.quantizer.counts.new_full(index.shape[:1], uniform)
        return self.prior.log_prob(index.flatten(1))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z_q), in x's shape."""
        return self.decode(self.encode(x)).sigmoid() * self.levels

    @torch.no_grad()
    def sample(self, n: int, size: tuple[int, int], *, seed: Seed = None) -> Tensor:
        """Means of n images of size (H, W), (n, C, H, W), whose codes are drawn from the prior.

        Without one that was fitted they are drawn by their usage, independently of each other.
        """
        grid = (n, size[0] // 2, size[1] // 2)
        if self.prior is None:
            index = gumbel_argmax(self.quantizer.counts.log().expand(*grid, -1), seed=seed)[0]
        else:
            index = self.prior.sample(n, seed=seed)
        return self.decode(index.reshape(grid)).sigmoid() * self.levels
