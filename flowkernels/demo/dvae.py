"""A discrete VAE on the digits, trained through the Gumbel-softmax; and the study of the gradient estimators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowkernels.demo import estimators
from flowkernels.demo.common import LEVELS, PIXELS, Options, fit, fixed_noise, load_digits
from flowkernels.demo.latent import start_from_mean, tell
from flowkernels.models import DiscreteVAE

STUDIES = ("estimators",)
LATENTS, CATEGORIES = 16, 8


class Bound:
    """The ELBO: relaxed while training, the temperature falling from 1 to `coldest`; of hard samples elsewhere."""

    def __init__(self, model: DiscreteVAE, steps: int, coldest: float = 0.4) -> None:
        self.model, self.steps, self.coldest, self.count = model, steps, coldest, 0

    def __call__(self, levels: Tensor) -> Tensor:
        if not self.model.training:
            return self.model.elbo(levels, estimator="straight_through")
        tau = self.coldest ** min(1.0, self.count / self.steps)
        self.count += 1
        return self.model.elbo(levels, estimator="gumbel", tau=tau)


def run(options: Options) -> None:
    if options.study == "estimators":
        return estimators.run(options)
    digits = load_digits()
    epochs = options.epochs or (2 if options.quick else 150)
    with fixed_noise(options.seed):
        model = DiscreteVAE(PIXELS, LATENTS, CATEGORIES, hidden_features=(256,), levels=LEVELS - 1)
    last = model.decoder[-1]
    assert isinstance(last, nn.Linear)
    start_from_mean(last.bias, digits)
    objective = Bound(model, epochs * -(-len(digits.train) // 64) // 2)
    curve = fit(model, objective, digits, label="discrete VAE", epochs=epochs, batch=64, lr=2e-3, seed=options.seed)
    with fixed_noise(options.seed), torch.no_grad():
        pictures = {
            "digits": digits.test,
            "reconstructions": model.reconstruct(digits.test),
            "samples": model.sample(80),
        }
    title = f"Discrete VAE, {CATEGORIES}^{LATENTS} latents"
    tell(options, "dvae", title, digits, objective, curve, pictures, {})
