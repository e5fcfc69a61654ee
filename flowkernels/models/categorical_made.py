"""An autoregressive distribution of categorical variables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from flowkernels.nn.masked_linear import MaskedLinear
from flowkernels.ops import gumbel_argmax
from flowkernels.random import Seed, draw_stream


class CategoricalMADE(nn.Module):
    r"""D variables of K categories each, one masked network for all conditionals::

        p(x) = prod_i softmax(net_i(x_1, ..., x_{i-1}))[x_i]

    The network sees x one-hot: the K inputs of a variable have its degree, and so have its K logits among the outputs.

    Args:
        features, categories: D and K.
        hidden_features: width of each hidden layer.

    Source: Germain et al. 2015, arXiv:1502.03509.
    """

    def __init__(self, features: int, categories: int, hidden_features: Sequence[int] = (256,)) -> None:
        super().__init__()
        if features < 1 or categories < 1:
            raise ValueError(f"features and categories must be at least 1, got {features} and {categories}")
        self.features, self.categories = features, categories
        own = torch.arange(1, features + 1).repeat_interleave(categories)
        degrees = [own, *(torch.arange(width) % max(1, features - 1) + 1 for width in hidden_features)]
        hidden = [MaskedLinear(a, b, activation="relu") for a, b in pairwise(degrees)]
        self.net = nn.Sequential(*hidden, MaskedLinear(degrees[-1], own, strict=True))

    def logits(self, x: Tensor) -> Tensor:
        """(N, D) int64 -> (N, D, K), those of variable i from the variables before it."""
        one_hot = nn.functional.one_hot(x, self.categories).to(next(self.parameters()).dtype)
        logits: Tensor = self.net(one_hot.flatten(1))
        return logits.reshape(-1, self.features, self.categories)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (N, D) int64 -> (N,)."""
        if x.dim() != 2 or x.shape[1] != self.features or x.dtype != torch.int64:
            raise ValueError(f"x must be int64 of shape (N, {self.features}), got {x.dtype} of shape {tuple(x.shape)}")
        return self.logits(x).log_softmax(-1).gather(-1, x[..., None])[..., 0].sum(-1)

    @torch.no_grad()
    def sample(self, n: int, *, seed: Seed = None) -> Tensor:
        """n draws of x, (n, D) int64, exact.

        A Gumbel-argmax of all variables at once, repeated with the same noise: after pass i the first i variables are
        what one after the other would draw, so D passes are enough, and one that changes nothing is the last.

        Source: Wiggers & Hoogeboom 2020, "Predictive sampling with forecasting autoregressive models".
        """
        parameter = next(self.parameters())
        source = draw_stream(seed, parameter.device)
        x = torch.zeros(n, self.features, dtype=torch.int64, device=parameter.device)
        for _ in range(self.features):
            before, x = x, gumbel_argmax(self.logits(x), seed=source)[0][..., 0]
            if torch.equal(x, before):
                break
        return x
