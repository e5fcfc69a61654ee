"""NICE: additive couplings on the pixels of the digits, and one scale per pixel."""

from __future__ import annotations

from flowkernels.demo import density
from flowkernels.demo.common import PIXELS, Options
from flowkernels.models import NICE


def build(quick: bool) -> NICE:
    return NICE(PIXELS, (32,) if quick else (256, 256), 4 if quick else 6, mask="alternating")


def run(options: Options) -> None:
    density.run(density.Demo("nice", build, training={"epochs": 80, "lr": 2e-3, "weight_decay": 1e-2}), options)
