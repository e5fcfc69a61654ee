"""NICE: additive couplings on the pixels of the digits, and one scale per pixel."""

from __future__ import annotations

from typing import Any

from flowkernels.demo import density
from flowkernels.demo.common import PIXELS, Options
from flowkernels.models import NICE

TRAINING: dict[str, Any] = {"epochs": 80, "lr": 2e-3, "weight_decay": 1e-2}


def build(quick: bool) -> NICE:
    return NICE(PIXELS, (32,) if quick else (256, 256), 4 if quick else 6, mask="alternating")


def run(options: Options) -> None:
    density.run(density.Demo("nice", build, training=TRAINING), options)
