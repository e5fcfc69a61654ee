"""A Gaussian mixture: the latent-variable model of which everything is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowkernels.ops import gumbel_argmax
from flowkernels.random import Seed, draw_stream, normal


class GaussianMixture(nn.Module):
    r"""z ~ Categorical(softmax(logits)), x|z ~ N(mean_z, diag scale_z^2)::

        log p(x) = logsumexp_k [log pi_k + log N(x; mean_k, scale_k)],   p(z|x) = softmax_k [...]

    Marginal likelihood and posterior are exact, so an ELBO and its gradients have something to be measured against.

    Args:
        features: D.
        components: K.
    """

    def __init__(self, features: int, components: int) -> None:
        super().__init__()
        if features < 1 or components < 1:
            raise ValueError(f"features and components must be at least 1, got {features} and {components}")
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, features))
        self.log_scales = nn.Parameter(torch.zeros(components, features))

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z = k), (N, K)."""
        return self.logits.log_softmax(-1) + self.log_likelihoods(x)

    def log_likelihoods(self, x: Tensor) -> Tensor:
        """log p(x | z = k), (N, K)."""
        u = (x[:, None] - self.means) * (-self.log_scales).exp()
        return -0.5 * u.square().sum(-1) - self.log_scales.sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (N,)."""
        return self.log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> Tensor:
        """Logits of p(z|x), (N, K), normalised."""
        return self.log_joint(x).log_softmax(-1)

    def log_target(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """z (S, N, 1, K) -> log p(x, z) + log K, (S, N): for `elbo_discrete`, whose prior is uniform."""
        joint = self.log_joint(x) + math.log(len(self.logits))
        return lambda z: (z[..., 0, :] * joint).sum(-1)

    @torch.no_grad()
    def em_step(self, x: Tensor) -> None:
        """One step of expectation maximisation, which never lowers the likelihood of x."""
        r = self.posterior(x).exp()
        total = r.sum(0)
        self.logits.copy_((total / len(x)).log())
        self.means.copy_(r.T @ x / total[:, None])
        variance = torch.stack([(r[:, k, None] * (x - m).square()).sum(0) for k, m in enumerate(self.means)])
        self.log_scales.copy_(0.5 * (variance / total[:, None]).clamp_min(1e-12).log())

    @torch.no_grad()
    def sample(self, n: int, *, seed: Seed = None) -> Tensor:
        """n draws of x, (n, D)."""
        source = draw_stream(seed, self.means.device)
        index, _ = gumbel_argmax(self.logits.expand(n, -1), seed=source)
        k = index[:, 0]
        z = normal(*self.means[k].shape, seed=source.further(1), dtype=self.means.dtype, device=self.means.device)
        return self.means[k] + self.log_scales[k].exp() * z
