"""The score-function estimator (REINFORCE) as one differentiable expression, and baselines for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def score_function_surrogate(value: Tensor, log_prob: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    r"""An expression whose value is `value` and whose gradient is that of E[value] over samples z ~ q::

        value + sg(value - baseline) (log q(z) - sg(log q(z))),   sg = no gradient

    Differentiated, this is grad value + (value - baseline) grad log q: the path through value's own parameters plus
    REINFORCE. A baseline that does not depend on z leaves the mean alone and lowers the variance.

    Args:
        value: f(z) of each sample, with the gradient of its own parameters.
        log_prob: log q(z) of each sample, same shape.
        baseline: broadcastable to `value`.

    Sources: Williams 1992; Schulman et al. 2015, arXiv:1506.05254.
    """
    if value.shape != log_prob.shape:
        raise ValueError(f"log_prob must have value's shape {tuple(value.shape)}, got {tuple(log_prob.shape)}")
    return value + (value - baseline).detach() * (log_prob - log_prob.detach())


def leave_one_out(value: Tensor) -> Tensor:
    """Baseline of each of S samples, (S, ...): the mean of the S - 1 others, which does not depend on it.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """
    if value.dim() < 1 or value.shape[0] < 2:
        raise ValueError(f"leave_one_out needs at least 2 samples in dimension 0, got shape {tuple(value.shape)}")
    value = value.detach()
    return (value.sum(0) - value) / (value.shape[0] - 1)


class MovingAverage(nn.Module):
    """Baseline that follows the mean of the values so far, exponentially forgetting, unbiased from the start."""

    mean: Tensor
    weight: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        """The baseline from earlier calls (0 at first), then takes in the mean of `value` when training."""
        baseline = self.mean / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(self.decay).add_(value.detach().mean().to(self.mean), alpha=1 - self.decay)
                self.weight.mul_(self.decay).add_(1 - self.decay)
        return baseline
