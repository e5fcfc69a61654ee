"""What every flow can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.ops.maf.reference import log_normal


class Flow(nn.Module):
    """A normalizing flow with a standard normal base: x -> z through `layers`, each with ``forward`` and ``inverse``.

    ``log p(x) = log N(z; 0, I) + log |det dz/dx|``, in nats.

    A layer maps ``(N, D), context -> (N, D), (N,)`` in both directions. Subclasses only build the layers.
    """

    def __init__(self, features: int, layers: Sequence[nn.Module], context_features: int = 0) -> None:
        super().__init__()
        self.features, self.context_features = features, context_features
        self.layers = nn.ModuleList(layers)

    def transform(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Density direction: x (N, D) [, context (N, K)] -> z (N, D), logdet (N,)."""
        self._check_input("x", x, context)
        return self._run(x, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sampling direction: z (N, D) [, context (N, K)] -> x (N, D), logdet (N,), the negative of `transform`'s."""
        self._check_input("z", z, context)
        return self._run(z, context, inverse=True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for layer in reversed(self.layers) if inverse else self.layers:
            x, logdet = layer.inverse(x, context) if inverse else layer(x, context)  # type: ignore[operator]
            total = total + logdet
        return x, total

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, D) [, context (N, K)] -> (N,) log-densities in nats."""
        self._check_input("x", x, context)
        return self._log_prob(x, context)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        z, logdet = self._run(x, context, inverse=False)
        return logdet + log_normal(z)

    @torch.no_grad()
    def sample(self, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        """n samples (n, D); with context (C, K): n for each row, (C, n, D).

        `seed` makes the noise reproducible without touching torch's generator.
        """
        return self.rsample(n, context, seed=seed)

    def rsample(self, n: int, context: Tensor | None = None, *, seed: int | None = None) -> Tensor:
        """As `sample`, differentiable with respect to the parameters and the context."""
        noise, rows, shape = self._noise(n, context, seed)
        x, _ = self.inverse(noise, rows)
        return x.reshape(*shape, self.features)

    def sample_and_log_prob(
        self, n: int, context: Tensor | None = None, *, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples as `rsample` gives them and their log-densities, (n,) or (C, n), from the same sweep."""
        noise, rows, shape = self._noise(n, context, seed)
        x, logdet = self.inverse(noise, rows)
        return x.reshape(*shape, self.features), (log_normal(noise) - logdet).reshape(shape)

    def _noise(self, n: int, context: Tensor | None, seed: int | None) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """Noise (rows, D), the context of each row, and the shape that the rows come back in."""
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"n must be an integer, got {type(n).__name__}")
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        shape: tuple[int, ...] = (n,)
        rows = None
        if context is not None or self.context_features:
            self._check_context(context)
            assert context is not None
            shape = (context.shape[0], n)
            rows = context.repeat_interleave(n, dim=0)
        like = self._like(torch.empty(0))
        generator = None
        if seed is not None:
            generator = torch.Generator(device=like.device).manual_seed(seed)
        noise = torch.randn(math.prod(shape), self.features, dtype=like.dtype, device=like.device, generator=generator)
        return noise, rows, shape

    def _check_input(self, name: str, value: Any, context: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dim() != 2 or value.shape[1] != self.features:
            raise ValueError(f"{name} must have shape (N, {self.features}), got {tuple(value.shape)}")
        if context is not None or self.context_features:
            self._check_context(context)
            if context.shape[0] != value.shape[0]:
                raise ValueError(
                    f"context must have one row for each of {value.shape[0]} rows of {name}, got {context.shape[0]}"
                )
        like = self._like(value)
        if value.dtype != like.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype}, but the flow's parameters have {like.dtype}: use one dtype"
            )
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device}, but the flow is on {like.device}: use one device")

    def _like(self, default: Tensor) -> Tensor:
        """A parameter, for the dtype and device that inputs must have."""
        return next(self.parameters(), default)

    def _check_context(self, context: Any) -> None:
        if context is None:
            raise ValueError(f"context is missing: this flow needs one of shape (C, {self.context_features})")
        if not self.context_features:
            raise ValueError("context was given, but this flow was built with context_features=0")
        if not isinstance(context, Tensor):
            raise TypeError(f"context must be a torch.Tensor, got {type(context).__name__}")
        if context.dim() != 2 or context.shape[1] != self.context_features:
            raise ValueError(f"context must have shape (C, {self.context_features}), got {tuple(context.shape)}")
