"""A VQ-VAE on the digits: 16 codes per image, a codebook that follows by moving averages, a prior of the codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkernels.demo.common import LEVELS, PIXELS, SIDE, Digits, Options, fit, fixed_noise, load_digits, to_bits
from flowkernels.demo.latent import tell
from flowkernels.models import VQVAE, CategoricalMADE

CODES = 32
CELLS = PIXELS // 4


class Bound:
    """The ELBO, in training less the quantizer's own loss; images as rows."""

    def __init__(self, model: VQVAE) -> None:
        self.model = model

    def __call__(self, levels: Tensor) -> Tensor:
        images = levels.reshape(-1, 1, SIDE, SIDE)
        if self.model.training:  # without a prior
            return -self.model.loss(images) - CELLS * math.log(CODES)
        return self.model.elbo(images)


def run(options: Options) -> None:
    digits = load_digits()
    epochs = options.epochs or (2 if options.quick else 100)
    with fixed_noise(options.seed):
        model = VQVAE(codes=CODES, code_features=8, hidden_channels=48, levels=LEVELS - 1, revive=0.5)
        prior = CategoricalMADE(CELLS, CODES, hidden_features=(256,))
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
    with torch.no_grad():
        codes = Digits(*(model.encode(part.reshape(-1, 1, SIDE, SIDE)).flatten(1) for part in digits))
    independent = model.sample(80, (SIDE, SIDE), seed=options.seed)
    fitted = fit(
        prior,
        prior.log_prob,
        codes,
        label="prior",
        epochs=epochs,
        batch=64,
        lr=2e-3,
        weight_decay=0.1,
        seed=options.seed,
    )
    model.prior = prior
    pictures = {
        "digits": digits.test,
        "reconstructions": model.reconstruct(digits.test.reshape(-1, 1, SIDE, SIDE)).flatten(1),
        "samples": model.sample(80, (SIDE, SIDE), seed=options.seed).flatten(1),
        "independent codes": independent.flatten(1),
    }
    more = {
        "codes in use": float(model.quantizer.perplexity()),
        "bits/dim of codes": to_bits(float(prior.log_prob(codes.test).detach().mean())),
        "if uniform": to_bits(-CELLS * math.log(CODES)),
    }
    curve.seconds += fitted.seconds
    tell(options, "vqvae", f"VQ-VAE, {CELLS} codes of {CODES}", digits, objective, curve, pictures, more)
