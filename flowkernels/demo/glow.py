"""Glow: ActNorm, invertible 1x1 convolutions and affine couplings at two scales."""

from __future__ import annotations

from typing import Any

from flowkernels.demo import density
from flowkernels.demo.common import SIDE, Options
from flowkernels.models import Glow

TRAINING: dict[str, Any] = {"epochs": 60, "lr": 3e-3, "weight_decay": 1e-2}


def build(quick: bool) -> Glow:
    return Glow((1, SIDE, SIDE), 8 if quick else 32, 1, levels=2, steps=2 if quick else 6)


def run(options: Options) -> None:
    density.run(density.Demo("glow", build, training=TRAINING), options)
