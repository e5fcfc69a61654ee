"""What the demonstrations of models with discrete latents share: an ELBO in nats and bits/dim, and one picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkernels.demo.common import LEVELS, PIXELS, Curve, Digits, Objective, Options, bits_per_dim
from flowkernels.demo.report import pyplot, save_numbers, show_digits
from flowkernels.models.discrete_vae import binomial_log_likelihood


def without_latents(digits: Digits) -> float:
    """Bits per dimension of the model that the latents have to beat: every pixel a binomial with its own mean."""
    mean = (digits.train.mean(0) / (LEVELS - 1)).clamp(1e-3, 1 - 1e-3)
    nats = binomial_log_likelihood(digits.test, mean.logit().expand_as(digits.test), LEVELS - 1)
    return -float(nats.mean()) / (PIXELS * math.log(2))


def tell(
    options: Options,
    name: str,
    title: str,
    digits: Digits,
    objective: Objective,
    curve: Curve,
    pictures: dict[str, Tensor],
    more: dict[str, float],
) -> None:
    """Prints the test ELBO, and writes it and a picture of digits, reconstructions, samples and the curve."""
    bits, error = bits_per_dim(objective, digits.test)
    nats = -bits * PIXELS * math.log(2)
    baseline = without_latents(digits)
    print(f"\n{title}, {len(curve.train)} epochs in {curve.seconds:.1f} s")
    print(f"  test ELBO          {nats:.2f} nats per image, {bits:.4f} +- {error:.4f} bits/dim")
    print(f"  without latents    {baseline:.4f} bits/dim")
    for label, value in more.items():
        print(f"  {label:<18} {value:.4g}")

    plt = pyplot()
    figure, axes = plt.subplots(1, len(pictures) + 1, figsize=(3.2 * len(pictures) + 4, 3.2), layout="constrained")
    for at, (label, levels) in zip(axes, pictures.items(), strict=False):
        show_digits(at, levels, label)
    axes[-1].plot(curve.train, label="training")
    axes[-1].plot(curve.valid, label="validation")
    axes[-1].axhline(baseline, color="gray", linestyle=":", label="without latents")
    axes[-1].axhline(bits, color="black", linestyle=":", label="test, in the end")
    axes[-1].set_ylim(top=1.1 * max(baseline, min(curve.valid)))
    axes[-1].set_xlabel("epoch")
    axes[-1].set_ylabel("bits/dim, negative ELBO")
    axes[-1].legend()
    figure.suptitle(f"{title}: {nats:.1f} nats, {bits:.3f} bits/dim")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / f"{name}.png", dpi=120)
    plt.close(figure)
    numbers = {"elbo_nats": nats, "bits_per_dim": bits, "standard_error": error, "without_latents": baseline, **more}
    save_numbers(options.out / f"{name}.json", {"model": name, "epochs": len(curve.train), **numbers})
    print(f"  picture            {options.out / f'{name}.png'}")


def start_from_mean(bias: Tensor, digits: Digits) -> None:
    """The output layer's bias begins where the pixels are on average."""
    with torch.no_grad():
        bias.copy_((digits.train.mean(0) / (LEVELS - 1)).clamp(0.01, 0.99).logit())
