"""The demonstrations: that one runs from end to end, and that what they measure is what they say."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the digits come from scikit-learn")
from flowkernels.demo import common, report
from flowkernels.demo.common import LEVELS, PIXELS, Dequantizer, Digits

ROOT = Path(__file__).resolve().parent.parent


def numbers_in(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for one in value.values() for n in numbers_in(one)]
    if isinstance(value, list):
        return [n for one in value for n in numbers_in(one)]
    return [value] if isinstance(value, (int, float)) else []


def test_make_demo_in_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    run = subprocess.run(
        [sys.executable, "-m", "flowkernels", "demo", "--quick", "--epochs", "2", "--out", str(tmp_path / "new")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for words in ("test bits/dim", "Gaussian, full covariance", "fused sampler", "naive loop", "largest difference"):
        assert words in run.stdout
    assert "MAF, flowkernels: 100%" in run.stderr  # the progress bar
    picture = (tmp_path / "new" / "maf.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    found = json.loads((tmp_path / "new" / "maf.json").read_text())
    assert all(math.isfinite(n) for n in numbers_in(found))
    bits = {model["name"]: model["test_bits_per_dim"] for model in found["models"]}
    # No fit is worse than knowing nothing, and none of these 8x8 images can be had for less than one bit a pixel.
    assert 1 < bits["Gaussian, full covariance"] < bits["MAF, flowkernels"] < math.log2(LEVELS)
    assert found["sampling"]["difference_float64"] < 1e-10
    assert found["sampling"]["difference"] < 1e-3
    ours = found["models"][-1]
    assert len(ours["valid_curve"]) == 2
    assert re.search(rf"{ours['test_bits_per_dim']:.3f} \+- {ours['standard_error']:.3f}", run.stdout)


def test_the_digits_are_split_without_overlap() -> None:
    digits, again = common.load_digits(), common.load_digits()
    assert [len(part) for part in digits] == [1257, 270, 270]
    assert all(torch.equal(a, b) for a, b in zip(digits, again, strict=True))
    whole = torch.cat(digits)
    assert len(whole.unique(dim=0)) == 1797
    assert (whole.min(), whole.max()) == (0, LEVELS - 1)


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.05])
def test_dequantization_comes_back_and_its_logdet_is_the_jacobians(margin: float) -> None:
    dequantizer = Dequantizer(margin)
    levels = torch.arange(LEVELS).double().repeat(40, 1)
    y, logdet = dequantizer.encode(levels)
    assert torch.equal(dequantizer.decode(y), levels)
    # y depends on level + u alone, so the slope can be had from the inverse.
    y = y.detach().requires_grad_()
    x = LEVELS * (torch.sigmoid(y) - margin) / (1 - 2 * margin)
    (slope,) = torch.autograd.grad(x.sum(), y)
    torch.testing.assert_close(logdet, -slope.log().sum(-1), rtol=1e-12, atol=1e-10)


def test_the_bound_of_a_uniform_density_is_exact() -> None:
    """A density of y that is uniform over grey levels costs log2(17) bits per pixel, whatever the noise."""
    dequantizer = Dequantizer(0.05)

    def log_prob(y: torch.Tensor) -> torch.Tensor:
        inner = torch.sigmoid(y)
        return (inner.log() + torch.log1p(-inner) - math.log(0.9)).sum(-1)

    levels = torch.randint(LEVELS, (50, PIXELS)).double()
    bits, error = common.bits_per_dim(dequantizer.bound(log_prob), levels)
    assert bits == pytest.approx(math.log2(LEVELS), abs=1e-9)
    assert error == pytest.approx(0, abs=1e-9)


def test_measuring_leaves_the_generator_alone() -> None:
    dequantizer = Dequantizer()
    state = torch.get_rng_state()
    levels = torch.full((3, PIXELS), 5.0)
    first = common.bits_per_dim(dequantizer.bound(lambda y: -y.square().sum(-1)), levels)
    torch.rand(5)
    assert common.bits_per_dim(dequantizer.bound(lambda y: -y.square().sum(-1)), levels) == first
    torch.set_rng_state(state)


def test_the_gaussian_is_the_normal_density() -> None:
    torch.manual_seed(1)
    digits, dequantizer = common.load_digits(), Dequantizer()
    gaussian = common.Gaussian(digits, dequantizer, draws=2)
    y = torch.randn(5, PIXELS).double()
    truth = torch.distributions.MultivariateNormal(gaussian.mean, scale_tril=gaussian.root)
    torch.testing.assert_close(gaussian.log_prob(y), truth.log_prob(y))
    spread = torch.cov(gaussian.sample(20000).double().T) - gaussian.root @ gaussian.root.T
    assert spread.abs().max() < 0.1 * (gaussian.root @ gaussian.root.T).diagonal().max()


class Place(nn.Module):
    """A unit normal density whose mean is to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(PIXELS))

    def objective(self, levels: torch.Tensor) -> torch.Tensor:
        return -0.5 * ((levels - self.mean).square() + math.log(2 * math.pi)).sum(-1)


def normal_images(n: int, seed: int) -> torch.Tensor:
    return 2 + torch.randn(n, PIXELS, generator=torch.Generator().manual_seed(seed))


def test_fit_finds_the_maximum_and_keeps_the_best() -> None:
    pytest.importorskip("tqdm")
    digits, model = Digits(normal_images(400, 0), normal_images(100, 1), normal_images(100, 2)), Place()
    curve = common.fit(
        model, model.objective, digits, label="", epochs=60, batch=50, lr=0.1, weight_decay=0.0, average=0.9
    )
    assert (model.mean - digits.train.mean(0)).abs().max() < 0.05
    assert curve.valid[curve.best] == min(curve.valid)
    # What is kept is what was best, not what came last.
    assert common.bits_per_dim(model.objective, digits.valid, draws=2)[0] == pytest.approx(min(curve.valid), abs=1e-6)


def test_fit_stops_early_when_validation_gets_worse() -> None:
    pytest.importorskip("tqdm")
    far = Digits(normal_images(100, 0), normal_images(100, 1) - 4, normal_images(1, 2))
    model = Place()
    curve = common.fit(model, model.objective, far, label="", epochs=50, lr=0.1, patience=3)
    assert len(curve.valid) == curve.best + 4
    assert common.bits_per_dim(model.objective, far.valid, draws=2)[0] == pytest.approx(min(curve.valid), abs=1e-6)


def test_fit_is_repeatable() -> None:
    pytest.importorskip("tqdm")
    digits = Digits(normal_images(100, 0), normal_images(20, 1), normal_images(1, 2))
    curves = []
    for _ in range(2):
        model = Place()
        curves.append(common.fit(model, model.objective, digits, label="", epochs=3, seed=5).valid)
        torch.rand(3)
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("value", "text"), [(12.345, "12.3 s"), (0.0123, "12.3 ms"), (4.5e-5, "45 us"), (3e-9, "3 ns"), (123.4, "123 s")]
)
def test_times_have_units(value: float, text: str) -> None:
    assert report.seconds(value) == text


def test_tables_are_aligned() -> None:
    told = report.table(["name", "bits"], [["a", "1.25"], ["a longer one", "10.5"]])
    assert told.splitlines() == [
        "  name          bits",
        "  ------------  ----",
        "  a             1.25",
        "  a longer one  10.5",
    ]
