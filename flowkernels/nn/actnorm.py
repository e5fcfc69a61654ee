"""ActNorm and the invertible 1x1 convolution: what Glow puts between its couplings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowkernels.ops.actnorm import actnorm
from flowkernels.ops.invertible_conv1x1 import invertible_conv1x1


class ActNorm(nn.Module):
    """``z = (x + shift) exp(log_scale)``, a shift and a scale for each channel; the first batch makes z normalised.

    Features are flat, channel after channel: (N, channels * positions).

    Args:
        channels: how many shifts and scales. positions: features of one channel (pixels of an image, steps of a
        sequence).
        data_init: take shift and scale from the first batch that comes in training mode; otherwise start as the
        identity.

    Source: Kingma & Dhariwal 2018 (Glow), arXiv:1807.03039.
    """

    initialised: Tensor

    def __init__(self, channels: int, positions: int = 1, *, data_init: bool = True) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("positions", positions)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.channels, self.positions = channels, positions
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialised", torch.tensor(not data_init))

    @torch.no_grad()
    def initialise(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Sets shift and scale so that these x come out with mean 0 and variance 1 in every channel.

        `mask` (N,) or (N, positions) is True for what counts: padding does not.

        Raises:
            ValueError: fewer than two values per channel, from which no variance can be had.
        """
        values = x.reshape(-1, self.channels, self.positions)
        weight = self._weight(x, mask)
        weight = values.new_ones(values.shape[0], 1, self.positions) if weight is None else weight
        count = weight.sum()
        if count < 2:
            raise ValueError(
                f"x must have at least 2 values per channel to initialise ActNorm from, got {int(count)}: "
                "use a larger batch or data_init=False"
            )
        mean = (values * weight).sum((0, 2)) / count
        variance = ((values - mean[:, None]).square() * weight).sum((0, 2)) / count
        self.shift.copy_(-mean)
        self.log_scale.copy_(-0.5 * (variance + 1e-6).log())
        self.initialised.fill_(True)

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z, logdet); padded positions, where `mask` is False, stay as they are and do not count."""
        if self.training and not self.initialised:
            self.initialise(x, mask)
        return self._run(x, mask, False)

    def inverse(self, z: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, mask, True)

    def _run(self, x: Tensor, mask: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return actnorm(x, self.shift, self.log_scale, mask=mask, inverse=inverse)

    def _weight(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """(N, 1, positions) 1 where x counts."""
        if mask is None:
            return None
        rows = x.shape[0]
        if mask.shape == (rows,):
            mask = mask[:, None].expand(rows, self.positions)
        if mask.shape != (rows, self.positions):
            raise ValueError(f"mask must have shape ({rows},) or ({rows}, {self.positions}), got {tuple(mask.shape)}")
        return mask[:, None, :].to(x)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, positions={self.positions}"


class Invertible1x1(nn.Module):
    """A linear map of the channels, the same at every position: ``z = W x`` with ``W = P L (U + diag(s))``.

    P is a fixed permutation, L unit lower and U strictly upper triangular, so the log-det is exactly
    ``positions * sum log |s|`` and the inverse is two triangular solves. Starts as a random rotation. Features are
    flat, channel after channel.

    Source: Kingma & Dhariwal 2018 (Glow), arXiv:1807.03039.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, positions: int = 1) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("positions", positions)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        self.channels, self.positions = channels, positions
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        dtype = torch.get_default_dtype()
        self.register_buffer("permutation", permutation.argmax(1))  # row i of P L is row permutation[i] of L
        self.register_buffer("sign", diagonal.sign().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_diagonal = nn.Parameter(diagonal.abs().log().to(dtype))

    def weight(self) -> Tensor:
        """(channels, channels) W."""
        eye = torch.eye(self.channels, dtype=self.lower.dtype, device=self.lower.device)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        return ((self.lower.tril(-1) + eye) @ upper)[self.permutation]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, True)

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        factors = self.lower, self.upper, self.log_diagonal, self.sign, self.permutation
        return invertible_conv1x1(x, *factors, inverse=inverse)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, positions={self.positions}"
