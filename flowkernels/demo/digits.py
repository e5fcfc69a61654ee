"""The handwritten digits as latent-variable models take them: 16 binomial trials for each pixel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkernels.demo import common

LEVELS = 16
SIDE = 8


def load_digits() -> tuple[Tensor, Tensor]:
    """(training images (1527, 64), test images (270, 64)), float32; the test images are those of every demo."""
    digits = common.load_digits()
    return torch.cat([digits.train, digits.valid]), digits.test


def bits_per_dim(elbo: Tensor) -> float:
    """Mean ELBO in nats of an image as bits per pixel, to be minimised."""
    return float(-elbo.mean() / (SIDE * SIDE * math.log(2)))


def save_picture(path: str, rows: dict[str, Tensor], curve: list[float], title: str) -> None:
    """Rows of images, each under its name, and the ELBO over the epochs, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(images) for images in rows.values())
    figure = plt.figure(figsize=(columns * 0.7 + 0.5, len(rows) * 0.9 + 2.2))
    grid = figure.add_gridspec(len(rows) + 1, columns, height_ratios=[1] * len(rows) + [2.2])
    for r, (name, images) in enumerate(rows.items()):
        for c in range(columns):
            axes = figure.add_subplot(grid[r, c])
            axes.imshow(images[c].reshape(SIDE, SIDE), cmap="gray_r", vmin=0, vmax=LEVELS)
            axes.set_xticks([])
            axes.set_yticks([])
            if c == 0:
                axes.set_title(name, loc="left", fontsize=8)
    axes = figure.add_subplot(grid[len(rows), :])
    axes.plot(curve)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test ELBO, nats")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
