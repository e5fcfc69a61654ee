"""What the demonstrations share: the digits, dequantization, bits per dimension, the training loop, a baseline.

An objective is a function of a batch of images, (N, 64) grey levels, that returns (N,) lower bounds of log P(image) in
nats: a flow's density of the dequantized image, or a VAE's ELBO. Training loop and measures work on objectives.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LEVELS = 17  # grey levels 0..16
SIDE = 8
PIXELS = SIDE * SIDE

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """What the command line says: where pictures go, and how much to do."""

    out: Path = Path("out")
    quick: bool = False
    epochs: int | None = None
    study: str | None = None
    seed: int = 0


# ---- data ---------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Handwritten digits, (N, 64) grey levels 0..16 as float32."""

    train: Tensor
    valid: Tensor
    test: Tensor


def load_digits() -> Digits:
    """scikit-learn's 1797 digits, always split in the same way: 1257 to train, 270 to validate, 270 to test."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise SystemExit("the demo needs scikit-learn for its data: pip install 'flowkernels[demo]'") from error
    images = torch.as_tensor(load().data, dtype=torch.float32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1797))
    train, valid, test = images[order].split([1257, 270, 270])
    return Digits(train, valid, test)


class Dequantizer:
    """Grey levels to the whole real line and back: ``x = (level + u) / 17``, ``y = logit(margin + (1 - 2 margin) x)``.

    With u uniform in [0, 1), ``log P(level) >= E_u log p(level + u)`` (Theis et al. 2016, arXiv:1511.01844), and the
    density of ``level + u`` is that of y times dy/d(level), which `encode` returns the logarithm of. The margin keeps
    the logit from stretching black and white over the whole line (Dinh et al. 2017, arXiv:1605.08803).
    """

    def __init__(self, margin: float = 0.01) -> None:
        self.margin = margin

    def encode(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) levels -> y (N, D) and log |dy/dlevel| (N,), with fresh noise from torch's generator."""
        width = 1 - 2 * self.margin
        inner = self.margin + width * (levels + torch.rand_like(levels)) / LEVELS
        # A margin of 0 would otherwise meet the logit's poles.
        inner = inner.clamp(torch.finfo(levels.dtype).tiny, 1 - torch.finfo(levels.dtype).eps)
        low, high = inner.log(), torch.log1p(-inner)
        return low - high, (math.log(width / LEVELS) - low - high).sum(-1)

    def decode(self, y: Tensor) -> Tensor:
        """The images of y, as grey levels 0..16."""
        x = (torch.sigmoid(y) - self.margin) / (1 - 2 * self.margin)
        return (x * LEVELS).floor().clamp(0, LEVELS - 1)

    def bound(self, log_prob: Callable[[Tensor], Tensor]) -> Objective:
        """The objective of a density of y: one draw of log p(level + u) per image."""

        def objective(levels: Tensor) -> Tensor:
            y, logdet = self.encode(levels)
            return log_prob(y) + logdet

        return objective


# ---- measures -----------------------------------------------------------------------------------------------------


def to_bits(nats: float) -> float:
    """A log-likelihood of one image in nats, as bits per dimension: what a code would need for each pixel."""
    return -nats / (PIXELS * math.log(2))


@contextlib.contextmanager
def fixed_noise(seed: int) -> Iterator[None]:
    """Torch's generator starts from `seed` inside and is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def bits_per_dim(objective: Objective, levels: Tensor, *, draws: int = 16, seed: int = 1) -> tuple[float, float]:
    """Bits per dimension, averaged over `draws` of the objective's noise, and the standard error over images.

    The average of the logarithm, not of the density: the bound itself, not a tighter one.
    """
    with fixed_noise(seed):
        nats = torch.stack([objective(levels).double() for _ in range(draws)]).mean(0)
    scale = abs(to_bits(1.0))
    return to_bits(float(nats.mean())), scale * float(nats.std()) / math.sqrt(len(nats))


# ---- training -----------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """A fit: bits per dimension after each epoch, and how long it took."""

    train: list[float] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0


def fit(
    model: nn.Module,
    objective: Objective,
    digits: Digits,
    *,
    label: str,
    epochs: int,
    batch: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 1e-3,
    average: float = 0.98,
    patience: int = 40,
    seed: int = 0,
) -> Curve:
    """Maximises `objective` and leaves the model with the parameters that were best on the validation images.

    AdamW with a cosine schedule. What is validated, and kept, is an exponential moving average of the parameters over
    ``1 / (1 - average)`` steps. It stops when `patience` epochs have brought nothing. Every epoch draws new noise for
    the same images; two models with one seed see the same images in the same order with the same noise.
    """
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    steps = -(-len(digits.train) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    averages = [p.detach().clone() for p in parameters]
    kept = copy.deepcopy(model.state_dict())
    curve, least, count, begin = Curve(), math.inf, 0, time.perf_counter()
    with _progress(epochs, label) as bar, fixed_noise(seed):
        for epoch in range(epochs):
            model.train()
            total = 0.0
            for rows in torch.randperm(len(digits.train)).split(batch):
                optimizer.zero_grad(set_to_none=True)
                loss = -objective(digits.train[rows]).mean() / PIXELS
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                count += 1
                total += float(loss.detach()) * len(rows)
                with torch.no_grad():
                    torch._foreach_lerp_(averages, parameters, 1 - min(average, count / (10 + count)))
            model.eval()
            with _values(parameters, averages):
                valid, _ = bits_per_dim(objective, digits.valid, draws=2)
                if valid < least:
                    least, curve.best = valid, epoch
                    kept = copy.deepcopy(model.state_dict())
            curve.train.append(total / len(digits.train) / math.log(2))
            curve.valid.append(valid)
            bar.set_postfix_str(f"train {curve.train[-1]:.3f}, validation {valid:.3f} bits/dim", refresh=False)
            bar.update()
            if epoch - curve.best >= patience:
                bar.set_postfix_str(f"stopped early, validation {least:.3f} bits/dim")
                break
    model.load_state_dict(kept)
    curve.seconds = time.perf_counter() - begin
    return curve


@contextlib.contextmanager
def _values(parameters: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """The parameters have other values inside."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, values)
        yield
        torch._foreach_copy_(parameters, before)


def _progress(total: int, label: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise SystemExit("the demo needs tqdm for its progress bar: pip install 'flowkernels[demo]'") from error
    # A terminal gets a moving bar, a file a line now and then.
    return tqdm(
        total=total, desc=label, unit="epoch", mininterval=0.2 if sys.stderr.isatty() else 10.0, dynamic_ncols=True
    )


class Gaussian(nn.Module):
    """A normal distribution with full covariance, fitted in closed form: the baseline of every flow.

    ``shrinkage`` mixes the covariance with its diagonal; the best of a few on the validation images is taken.
    """

    def __init__(self, digits: Digits, dequantizer: Dequantizer, *, draws: int = 32, seed: int = 0) -> None:
        super().__init__()
        with fixed_noise(seed):
            y = torch.cat([dequantizer.encode(digits.train)[0] for _ in range(draws)]).double()
        self.mean, covariance = y.mean(0), torch.cov(y.T)
        found = []
        for self.shrinkage in (0.0, 0.01, 0.03, 0.1, 0.2):
            mixed = torch.lerp(covariance, torch.diag(covariance.diagonal()), self.shrinkage)
            self.root = torch.linalg.cholesky(mixed)
            valid, _ = bits_per_dim(dequantizer.bound(self.log_prob), digits.valid, draws=4)
            found.append((valid, self.shrinkage, self.root))
        _, self.shrinkage, self.root = min(found, key=lambda one: one[0])

    def log_prob(self, y: Tensor) -> Tensor:
        z = torch.linalg.solve_triangular(self.root, (y.double() - self.mean).T, upper=False)
        logdet = self.root.diagonal().log().sum()
        density: Tensor = -0.5 * (z.square().sum(0) + len(z) * math.log(2 * math.pi)) - logdet
        return density

    def sample(self, n: int) -> Tensor:
        noise = torch.randn(n, len(self.mean), dtype=self.root.dtype)
        y: Tensor = self.mean + noise @ self.root.T
        return y.float()
