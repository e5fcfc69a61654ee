"""A discrete VAE on the digits."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from flowkernels.demo.digits import LEVELS, bits_per_dim, load_digits, save_picture
from flowkernels.models import DiscreteVAE


def train(
    epochs: int, *, estimator: str = "gumbel", seed: int = 0, progress: bool = True
) -> tuple[DiscreteVAE, list[float]]:
    """A trained model and the test ELBO in nats after every epoch, always that of hard samples."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    train_x, test_x = load_digits()
    model = DiscreteVAE(64, latents=16, categories=8, hidden_features=(256,), levels=LEVELS)
    # The decoder starts from the mean image.
    mean = (train_x.mean(0) / LEVELS).clamp(0.01, 0.99)
    with torch.no_grad():
        model.decoder[-1].bias.copy_(mean.logit())  # type: ignore[operator, union-attr]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    curve = []
    bar = tqdm(range(epochs), desc=f"discrete VAE, {estimator}", disable=not progress)
    for epoch in bar:
        tau = max(0.5, math.exp(-2 * epoch / epochs))
        options = (
            {"baseline": "leave_one_out", "samples": 4} if estimator == "score_function" else {"tau": tau}
        )
        for batch in train_x[torch.randperm(len(train_x))].split(64):
            loss = -model.elbo(batch, estimator=estimator, **options).mean()  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            elbo = model.elbo(test_x, estimator="score_function", samples=4)
        curve.append(float(elbo.mean()))
        bar.set_postfix(elbo=f"{curve[-1]:.2f} nats", bits=f"{bits_per_dim(elbo):.3f}/dim")
    return model, curve


def run(out_dir: str | Path, quick: bool = False) -> None:
    """Trains, prints ELBO in nats and bits/dim, and draws reconstructions and samples into out_dir/dvae.png."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    model, curve = train(3 if quick else 100)
    _, test_x = load_digits()
    elbo = model.elbo(test_x, estimator="score_function", samples=16).detach()
    print(f"test ELBO {float(elbo.mean()):.2f} nats, {bits_per_dim(elbo):.3f} bits/dim")
    rows = {
        "digits": test_x[:16],
        "reconstructions": model.reconstruct(test_x[:16]),
        "samples": model.sample(16, seed=0),
    }
    path = out / "dvae.png"
    save_picture(str(path), rows, curve, f"Discrete VAE, 8^16 latents: {curve[-1]:.1f} nats")
    print(f"picture: {path}")
