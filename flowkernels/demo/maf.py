"""A masked autoregressive flow of five transforms, the library's main job: ``make demo``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.demo import density
from flowkernels.demo.common import PIXELS, Options
from flowkernels.models import MAF

TRANSFORMS = 5
TRAINING: dict[str, Any] = {"epochs": 100, "lr": 5e-3, "weight_decay": 1.0}


def _hidden(quick: bool) -> int:
    return 32 if quick else 128


def build(quick: bool) -> MAF:
    return MAF(PIXELS, (_hidden(quick),) * 2, TRANSFORMS, activation="tanh")


class Nflows(nn.Module):
    """nflows' MAF of the same architecture, scale law and orders."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        from nflows.distributions.normal import StandardNormal
        from nflows.flows import Flow
        from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation

        layers: list[Any] = []
        for i in range(TRANSFORMS):
            layers += [ReversePermutation(PIXELS)] if i else []
            # One block of one layer after the first: two hidden layers.
            layers += [
                MaskedAffineAutoregressiveTransform(
                    PIXELS, _hidden(quick), num_blocks=1, use_residual_blocks=False, activation=torch.tanh
                )
            ]
        self.flow = Flow(CompositeTransform(layers), StandardNormal([PIXELS]))

    def log_prob(self, y: Tensor) -> Tensor:
        value: Tensor = self.flow.log_prob(y)
        return value

    def sample(self, n: int) -> Tensor:
        y: Tensor = self.flow.sample(n)
        return y


class Zuko(nn.Module):
    """zuko's MAF of the same widths and orders, with zuko's own scale law."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        from zuko.flows import MAF as ZukoMAF

        self.flow = ZukoMAF(PIXELS, transforms=TRANSFORMS, hidden_features=(_hidden(quick),) * 2, activation=nn.Tanh)

    def log_prob(self, y: Tensor) -> Tensor:
        value: Tensor = self.flow().log_prob(y)
        return value

    def sample(self, n: int) -> Tensor:
        y: Tensor = self.flow().sample((n,))
        return y


def run(options: Options) -> None:
    density.run(
        density.Demo(
            "maf",
            build,
            peers={"nflows": Nflows, "zuko": Zuko},
            naive=f"{PIXELS} passes through each of {TRANSFORMS} networks, plain PyTorch",
            training=TRAINING,
        ),
        options,
    )
