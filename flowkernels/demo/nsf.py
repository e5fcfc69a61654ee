"""An autoregressive neural spline flow: rational-quadratic splines, sampled by the same sweep as a MAF."""

from __future__ import annotations

from typing import Any

from flowkernels.demo import density
from flowkernels.demo.common import PIXELS, Options
from flowkernels.models import NSF
from flowkernels.transforms import RQSpline

TRANSFORMS = 3
TRAINING: dict[str, Any] = {"epochs": 60, "lr": 2e-3, "weight_decay": 1.0}


def build(quick: bool) -> NSF:
    # The logit of a black pixel is near -5: the bound has to hold it.
    spline = RQSpline("nflows", 4 if quick else 8, bound=6.0)
    return NSF(PIXELS, (32 if quick else 128,) * 2, TRANSFORMS, spline=spline, activation="tanh")


def run(options: Options) -> None:
    density.run(
        density.Demo(
            "nsf",
            build,
            naive=f"{PIXELS} passes through each of {TRANSFORMS} networks, plain PyTorch",
            training=TRAINING,
        ),
        options,
    )
