"""Flows over grey levels: uniform and variational dequantization."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkernels.models.flow import Flow
from flowkernels.ops.dequantize import bits_per_dim, dequantize


class VariationalNoise(nn.Module):
    """Noise u in (0, 1) for every feature from a flow conditioned on the image: ``u = sigmoid(v)``, v from `flow`.

    Args:
        flow: with ``flow.context_features == flow.features``: the image is its context, scaled to [-1, 1].
        levels: how many grey levels there are.

    Source: Ho et al. 2019 (Flow++), arXiv:1902.00275, section 3.1.
    """

    def __init__(self, flow: Flow, levels: int) -> None:
        super().__init__()
        if flow.context_features != flow.features:
            raise ValueError(
                f"flow must have context_features equal to its {flow.features} features, got {flow.context_features}"
            )
        self.flow, self.levels = flow, levels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(u, log q(u | x)) of (N, D) grey levels: (N, D) and (N,)."""
        like = next(self.flow.parameters())
        image = 2 * x.to(like.dtype) / (self.levels - 1) - 1
        v, log_q = self.flow.sample_and_log_prob(1, image)
        v, log_q = v[:, 0], log_q[:, 0]
        # log du/dv = log sigmoid(v) + log sigmoid(-v)
        return torch.sigmoid(v), log_q - (F.logsigmoid(v) + F.logsigmoid(-v)).sum(-1)


class DequantizedFlow(nn.Module):
    """A probability of grey levels from a flow's density of dequantized ones.

    ``log P(x) >= E_u [log density(y(x + u)) + log dy/dx - log q(u | x)]`` with y from `flowkernels.ops.dequantize`.

    Args:
        flow: over the dequantized image. levels: how many grey levels there are.
        noise: a `VariationalNoise`, or None for uniform noise, of which log q is 0.
        logit, margin: see `flowkernels.ops.dequantize`.
    """

    def __init__(
        self,
        flow: Flow,
        levels: int,
        *,
        noise: VariationalNoise | None = None,
        logit: bool = True,
        margin: float = 0.005,
    ) -> None:
        super().__init__()
        self.flow, self.levels, self.noise, self.logit, self.margin = flow, levels, noise, logit, margin

    def bound(self, x: Tensor) -> Tensor:
        """(N, D) grey levels -> (N,) one draw of the lower bound of log P(x), in nats."""
        dtype = next(self.flow.parameters()).dtype
        u, log_q = (None, 0.0) if self.noise is None else self.noise(x)
        y, logdet = dequantize(x, self.levels, noise=u, logit=self.logit, margin=self.margin, dtype=dtype)
        value: Tensor = self.flow.log_prob(y) + logdet - log_q
        return value

    forward = bound

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """(N,) upper bounds of the bits per dimension, one draw each."""
        return bits_per_dim(self.bound(x), self.flow.features)

    @torch.no_grad()
    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """(n, D) grey levels."""
        y = self.flow.sample(n, seed=seed)
        if self.logit:
            y = (torch.sigmoid(y) - self.margin) / (1 - 2 * self.margin)
        return (y * self.levels).floor().clamp(0, self.levels - 1)
