"""A codebook that follows its vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowkernels.ops.vector_quantize import Quantized, code_sums, move_codes_, nearest_code, vector_quantize
from flowkernels.random import gumbel


class VectorQuantizer(nn.Module):
    """Replaces vectors by their nearest code (`flowkernels.ops.vector_quantize`) and, in training, moves the codes.

    In a distributed job the codes follow the vectors of all ranks, and are the same on all of them: each call in
    training is then one that every rank of the default process group has to make.

    Args:
        codes, features: K and D.
        commitment: weight of the loss that pulls vectors to their codes.
        decay: of the exponential moving average by which codes follow; None leaves them to the loss and the optimizer.
        revive: codes whose average count falls below this are put onto vectors of the batch; 0 never.
        dim: the dimension of the vectors' features.
        synchronize: False where the ranks of a distributed job train codebooks of their own.

    Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; Razavi et al. 2019, arXiv:1906.00446.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        codes: int,
        features: int,
        *,
        commitment: float = 0.25,
        decay: float | None = 0.99,
        revive: float = 0.0,
        dim: int = -1,
        synchronize: bool = True,
    ) -> None:
        super().__init__()
        if codes < 1 or features < 1:
            raise ValueError(f"codes and features must be at least 1, got {codes} and {features}")
        self.commitment, self.decay, self.revive, self.dim = commitment, decay, revive, dim
        self.synchronize = synchronize
        start = torch.randn(codes, features) / features**0.5
        if decay is None:
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("sums", start.clone())
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, x: Tensor) -> Quantized:
        weight = 1.0 if self.decay is None else 0.0
        # The codes that quantized and loss were calculated with stay as they are for the backward.
        codebook = self.codebook if self.decay is None else self.codebook.clone()
        out = vector_quantize(x, codebook, commitment=self.commitment, codebook_weight=weight, dim=self.dim)
        if self.training:
            self._follow(x.detach().movedim(self.dim, -1).flatten(0, -2), out.index.flatten())
        return out

    @torch.no_grad()
    def _follow(self, x: Tensor, index: Tensor) -> None:
        sums, counts = code_sums(x, index, len(self.counts))
        together = self.synchronize and torch.distributed.is_available() and torch.distributed.is_initialized()
        if together:
            both = torch.cat([sums, counts[:, None]], 1)
            torch.distributed.all_reduce(both)
            sums, counts = both[:, :-1], both[:, -1]
        if self.decay is None:
            self.counts.mul_(0.99).add_(counts, alpha=0.01)
            return
        move_codes_(self.codebook, self.counts, self.sums, counts, sums, decay=self.decay)
        dead = self.counts < self.revive
        if self.revive > 0 and bool(dead.any()):
            # A random order of the batch's vectors: as many as are needed, some twice if there are too few.
            order = gumbel(len(x), device=x.device).argsort()
            fresh = x[order[torch.arange(int(dead.sum()), device=x.device) % len(x)]]
            if together:
                torch.distributed.broadcast(fresh, 0)  # every rank has drawn vectors of its own
            self.codebook[dead] = fresh
            self.sums[dead] = fresh
            self.counts[dead] = 1.0

    def encode(self, x: Tensor) -> Tensor:
        """The index of every vector's code."""
        return nearest_code(x, self.codebook, dim=self.dim)

    def decode(self, index: Tensor) -> Tensor:
        """The codes of the indices, their features in dimension `dim`."""
        codes = self.codebook[index]
        return codes.movedim(-1, self.dim)

    def perplexity(self) -> Tensor:
        """exp of the entropy of the codes' usage: how many codes are in use, from 1 to K."""
        p = self.counts / self.counts.sum()
        number: Tensor = torch.special.entr(p).sum().exp()
        return number
