"""A VQ-VAE on the digits."""

from __future__ import annotations

from pathlib import Path

import torch

from flowkernels.demo.digits import LEVELS, SIDE, bits_per_dim, load_digits, save_picture
from flowkernels.models import VQVAE


def train(epochs: int, *, seed: int = 0, progress: bool = True) -> tuple[VQVAE, list[float]]:
    """A trained model and the test ELBO in nats after every epoch."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    train_x, test_x = (x.reshape(-1, 1, SIDE, SIDE) for x in load_digits())
    model = VQVAE(codes=32, code_features=8, hidden_channels=48, levels=LEVELS, revive=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    curve = []
    bar = tqdm(range(epochs), desc="VQ-VAE", disable=not progress)
    for _ in bar:
        model.train()
        for batch in train_x[torch.randperm(len(train_x))].split(64):
            loss = model.loss(batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            elbo = model.elbo(test_x)
        curve.append(float(elbo.mean()))
        bar.set_postfix(
            elbo=f"{curve[-1]:.2f} nats",
            bits=f"{bits_per_dim(elbo):.3f}/dim",
            codes=f"{float(model.quantizer.perplexity()):.1f}",
        )
    return model, curve


def run(out_dir: str | Path, quick: bool = False) -> None:
    """Trains, prints ELBO in nats and bits/dim, and draws reconstructions and samples into out_dir/vqvae.png."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    model, curve = train(2 if quick else 60)
    test_x = load_digits()[1].reshape(-1, 1, SIDE, SIDE)
    with torch.no_grad():
        elbo = model.elbo(test_x)
    used = float(model.quantizer.perplexity())
    print(
        f"test ELBO {float(elbo.mean()):.2f} nats, {bits_per_dim(elbo):.3f} bits/dim; {used:.1f} of 32 codes in use"
    )
    rows = {
        "digits": test_x[:16],
        "reconstructions": model.reconstruct(test_x[:16]),
        "independent codes": model.sample(16, (SIDE, SIDE), seed=0),
    }
    path = out / "vqvae.png"
    save_picture(str(path), rows, curve, f"VQ-VAE, 16 codes of 32: {curve[-1]:.1f} nats")
    print(f"picture: {path}")
