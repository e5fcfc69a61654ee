"""Counter-based random streams: Philox4x32-10, the same numbers on every backend.

The noise of an element depends on (seed, stream, element) and nothing else::

    key     = the 64-bit seed
    counter = (block low, block high, stream low, stream high),   block = element // 4
    word    = element % 4 of the four words that come out

so it can be drawn again instead of being stored, in any order, on any device. Seeds come from torch's generators: what
`torch.manual_seed` fixes stays fixed, and recomputation under activation checkpointing, which restores torch's
generator, sees the same noise. The upper half of the stream number is the rank, so the ranks of a distributed job draw
different noise even if each of them calls ``torch.manual_seed(0)``.

Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE
from flowkernels._library import operator

__all__ = ["Stream", "bits", "draw_stream", "gumbel", "normal", "philox", "uniform"]

KINDS = ("bits", "uniform", "normal", "gumbel")
_MASK = 0xFFFFFFFF


class Stream(NamedTuple):
    """Where noise comes from: the seed, an int64 tensor of one element, and the number of the stream."""

    seed: Tensor
    number: int

    def further(self, by: int) -> Stream:
        """Another stream of the same seed and rank: independent noise for a second purpose."""
        return Stream(self.seed, self.number + by)


Seed = int | Tensor | torch.Generator | Stream | None


def draw_stream(seed: Seed = None, device: torch.device | str | None = None) -> Stream:
    """The stream that `seed` names.

    Args:
        seed: None draws from torch's default generator of `device`, a `torch.Generator` from that one; both give this
            rank its own stream. An int or an int64 tensor of one element is taken as it is, on every rank, and so is a
            `Stream`, for callers that draw more than once from one seed.
        device: where the seed tensor shall be, the CPU by default.
    """
    device = torch.device("cpu") if device is None else torch.device(device)
    if seed is None or isinstance(seed, torch.Generator):
        where = device if seed is None else seed.device
        drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=where, generator=seed)
        return Stream(drawn.to(device), _rank() << 32)
    if isinstance(seed, Stream):
        return Stream(seed.seed.to(device), seed.number)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
        return Stream(seed.reshape(()).to(device), 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be None, an int, an int64 tensor or a torch.Generator, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return Stream(torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device), 0)


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def philox(seed: Tensor, stream: int, block: Tensor) -> Tensor:
    """The four words of each block, (..., 4) int64 with values in [0, 2^32)."""
    c0, c1 = block & _MASK, (block >> 32) & _MASK
    c2, c3 = torch.full_like(block, stream & _MASK), torch.full_like(block, (stream >> 32) & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 wraps modulo 2^64, so shifting and masking read both halves of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), -1)


def words(seed: Tensor, stream: int, count: int, block: int = 0) -> Tensor:
    """The words of elements 4 block .. 4 block + count - 1, (count,) int64."""
    blocks = block + torch.arange((count + 3) // 4, dtype=torch.int64, device=seed.device)
    return philox(seed, stream, blocks).reshape(-1)[:count]


def uniform_of_words(word: Tensor, dtype: torch.dtype) -> Tensor:
    """v = (word + 1/2) 2^-32, in the open interval (0, 1): what rounds to 1 becomes the largest value below it."""
    v = (word.to(dtype) + 0.5) * 2.0**-32
    return v.clamp(max=1 - torch.finfo(dtype).eps / 2)


def uniform_of_pairs(pairs: Tensor) -> Tensor:
    """The 53 first bits of two words, in [0, 1): float64 for what is rarer than 2^-32."""
    v = (pairs[..., 0].double() * 2.0**32 + pairs[..., 1].double()) * 2.0**-64
    return v.clamp(max=1 - 2.0**-53)


def gumbel_of_words(word: Tensor, dtype: torch.dtype) -> Tensor:
    """g = -log E with E = -log(1 - v): from -2.9 (-3.2 in float64) to +22.9."""
    return -(-torch.log1p(-uniform_of_words(word, dtype))).log()


def normal_of_words(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """Box and Muller: words (w0, w1) give r cos a and r sin a with a = 2 pi w1 / 2^32 and r = sqrt(-2 log v0)."""
    radius = (-2 * uniform_of_words(pairs[..., 0], dtype).log()).sqrt()
    angle = pairs[..., 1].double() * (2 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos().to(dtype), radius * angle.sin().to(dtype)), -1)


def reference_noise(seed: Tensor, stream: int, block: int, count: int, kind: int, in_double: bool) -> Tensor:
    dtype = torch.float64 if in_double else torch.float32
    match KINDS[kind]:
        case "bits":
            return words(seed, stream, count, block).clone()
        case "uniform":
            return uniform_of_words(words(seed, stream, count, block), dtype)
        case "gumbel":
            return gumbel_of_words(words(seed, stream, count, block), dtype)
        case _:
            pairs = words(seed, stream, count + count % 2, block).reshape(-1, 2)
            return normal_of_words(pairs, dtype).reshape(-1)[:count].clone()


noise_op: Any = operator(
    "noise(Tensor seed, int stream, int block, SymInt count, int kind, bool in_double) -> Tensor",
    reference_noise,
)


def noise(kind: str, source: Stream, count: int, dtype: torch.dtype) -> Tensor:
    """The first `count` elements of a stream, (count,), in float64 or float32."""
    op: Any = reference_noise if runs_reference(source.seed) else noise_op
    drawn: Tensor = op(source.seed, source.number, 0, count, KINDS.index(kind), dtype == torch.float64)
    return drawn


def _draw(
    kind: str, size: tuple[Any, ...], seed: Seed, dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    shape = torch.Size(size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size)
    if any(n < 0 for n in shape):
        raise ValueError(f"size must not be negative, got {tuple(shape)}")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in COMPUTE_DTYPE:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    drawn = noise(kind, draw_stream(seed, device), shape.numel(), COMPUTE_DTYPE[dtype]).reshape(shape)
    return drawn if kind == "bits" else drawn.to(dtype)


def bits(*size: int, seed: Seed = None, device: torch.device | str | None = None) -> Tensor:
    """Uniform 32-bit words, as int64 in [0, 2^32)."""
    return _draw("bits", size, seed, None, device)


def uniform(
    *size: int, seed: Seed = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Uniform noise in the open interval (0, 1), in steps of 2^-32 where the dtype has them."""
    return _draw("uniform", size, seed, dtype, device)


def normal(
    *size: int, seed: Seed = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Standard normal noise, tails to 6.8."""
    return _draw("normal", size, seed, dtype, device)


def gumbel(
    *size: int, seed: Seed = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Standard Gumbel noise -log(-log v), tails to +22.9: 2^-28 of the time it is above 19.4, as it should be."""
    return _draw("gumbel", size, seed, dtype, device)
