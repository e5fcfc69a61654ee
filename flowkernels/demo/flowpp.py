"""Flow++: mixture-of-logistics couplings; as a study, uniform beside variational dequantization."""

from __future__ import annotations

from typing import Any

from flowkernels.demo import common, density, report
from flowkernels.demo.common import LEVELS, PIXELS, SIDE, Options
from flowkernels.models import DequantizedFlow, Flow, FlowPP, RealNVP, VariationalNoise

STUDIES = ("dequantization",)
TRAINING: dict[str, Any] = {"epochs": 40, "lr": 3e-3, "weight_decay": 1e-2}


def build(quick: bool, attention: int = 0) -> FlowPP:
    hidden = 8 if quick else 32
    return FlowPP(
        (1, SIDE, SIDE), hidden, 1, couplings=1 if quick else 3, components=2 if quick else 8, attention=attention
    )


def dequantized(flow: Flow, learned: bool, quick: bool) -> DequantizedFlow:
    """A flow over grey levels, with uniform noise or with noise from a small conditional flow."""
    noise = None
    if learned:
        noise = VariationalNoise(RealNVP(PIXELS, (16 if quick else 64,), 4, context_features=PIXELS), LEVELS)
    return DequantizedFlow(flow, LEVELS, noise=noise, margin=0.01)  # as every other demonstration


def run(options: Options) -> None:
    if options.study == "dequantization":
        return _study(options)
    density.run(
        density.Demo("flowpp", build, naive="200 bisections of each mixture, plain PyTorch", training=TRAINING), options
    )


def _study(options: Options) -> None:
    """The same flow on the same digits with uniform and with learned noise, with and without attention."""
    digits = common.load_digits()
    epochs = options.epochs or (2 if options.quick else 40)
    rows = []
    for attention in (0, 2):
        for learned in (False, True):
            with common.fixed_noise(options.seed):
                model = dequantized(build(options.quick, attention), learned, options.quick)
            name = f"{'variational' if learned else 'uniform'} noise, {'attention' if attention else 'no attention'}"
            training = {**TRAINING, "epochs": epochs, "seed": options.seed}
            curve = common.fit(model, model.bound, digits, label=name, **training)
            bits, error = common.bits_per_dim(model.bound, digits.test)
            size = sum(p.numel() for p in model.parameters())
            epoch = report.seconds(curve.seconds / len(curve.train))
            rows.append([name, f"{bits:.3f} +- {error:.3f}", f"{size:,}", epoch])
    print(report.table(["Flow++", "test bits/dim", "parameters", "an epoch"], rows))
