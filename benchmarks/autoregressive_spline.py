"""Autoregressive neural spline flow: sampling and density, beside zuko's of the same architecture."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import OURS, PEER, PLAIN, Case, Options, Problem, Variant, peer
from flowkernels import use_backend
from flowkernels.models import NSF
from flowkernels.transforms import RQSpline


def _zuko(flow: NSF, hidden: int, transforms: int) -> Any:
    """zuko's flow of the same size, with weights of its own: its hidden units have other masks."""
    zuko: Any = peer("zuko")
    return zuko.flows.NSF(flow.features, bins=8, transforms=transforms, hidden_features=(hidden, hidden))()


def _problem(what: str, features: int, hidden: int, batch: int, transforms: int, options: Options) -> Problem:
    torch.manual_seed(0)
    flow = NSF(features, (hidden, hidden), transforms, spline=RQSpline("zuko", 8)).eval()
    values = torch.randn(batch, features, generator=torch.Generator().manual_seed(1))
    exact = NSF(features, (hidden, hidden), transforms, spline=RQSpline("zuko", 8)).double().eval()
    exact.load_state_dict(flow.state_dict())

    def run(model: NSF, v: Tensor) -> tuple[Tensor, Tensor]:
        return model.inverse(v) if what == "sampling" else model.transform(v)

    def plain() -> tuple[Tensor, Tensor]:
        with use_backend("reference"):
            return run(flow, values)

    def truth() -> tuple[Tensor, Tensor]:
        with use_backend("reference"):
            return run(exact, values.double())

    variants = [Variant("flowkernels", OURS, lambda: run(flow, values)), Variant("PyTorch", PLAIN, plain)]
    if options.wants(PEER, "zuko") and peer("zuko") is not None:
        zuko = _zuko(flow, hidden, transforms).transform
        theirs = zuko.inv if what == "sampling" else zuko
        back = zuko if what == "sampling" else zuko.inv
        # Of its own weights there is one truth that needs no other library: its other direction leads back.
        variants.append(
            Variant("zuko", PEER, lambda: theirs(values), truth=lambda: [values.double()], result=lambda y: [back(y)])
        )
    return Problem(variants, truth, least=1.0)


def cases(quick: bool) -> list[Case]:
    found = []
    for features, hidden, batch, transforms in [(8, 16, 10, 2)] if quick else [(200, 128, 64, 5)]:
        size: dict[str, int | str] = {"D": features, "H": hidden, "B": batch, "transforms": transforms}
        for what in ("sampling", "log_prob"):
            arguments = (what, features, hidden, batch, transforms)
            found.append(Case("autoregressive_spline", what, size, partial(_problem, *arguments)))
    return found
