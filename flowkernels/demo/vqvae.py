"""A VQ-VAE on the digits: 16 codes per image, a codebook that follows by moving averages."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkernels.demo.common import LEVELS, SIDE, Options, fit, fixed_noise, load_digits
from flowkernels.demo.latent import tell
from flowkernels.models import VQVAE

CODES = 32


class Bound:
    """What training maximises (with the quantizer's own loss), and the ELBO elsewhere; images as rows."""

    def __init__(self, model: VQVAE) -> None:
        self.model = model

    def __call__(self, levels: Tensor) -> Tensor:
        images = levels.reshape(-1, 1, SIDE, SIDE)
        return -self.model.loss(images) if self.model.training else self.model.elbo(images)


def run(options: Options) -> None:
    digits = load_digits()
    epochs = options.epochs or (2 if options.quick else 100)
    with fixed_noise(options.seed):
        model = VQVAE(codes=CODES, code_features=8, hidden_channels=48, levels=LEVELS - 1, revive=0.5)
    objective = Bound(model)
    # No average of the parameters: the codebook belongs to the encoder as it is.
    curve = fit(
        model,
        objective,
        digits,
        label="VQ-VAE",
        epochs=epochs,
        batch=64,
        lr=2e-3,
        average=0.0,
        seed=options.seed,
    )
    with fixed_noise(options.seed), torch.no_grad():
        images = digits.test.reshape(-1, 1, SIDE, SIDE)
        pictures = {
            "digits": digits.test,
            "reconstructions": model.reconstruct(images).flatten(1),
            "independent codes": model.sample(80, (SIDE, SIDE)).flatten(1),
        }
    used = {"codes in use": float(model.quantizer.perplexity())}
    tell(options, "vqvae", f"VQ-VAE, 16 codes of {CODES}", digits, objective, curve, pictures, used)
