"""The demonstration of a flow: fit it to the digits, compare its density, sample it fast and naively, draw it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowkernels._backend import use_backend
from flowkernels._explain import explain
from flowkernels.demo import common, report
from flowkernels.demo.common import LEVELS, PIXELS, Curve, Dequantizer, Digits, Objective, Options
from flowkernels.models import Flow


class Density(Protocol):
    """What is asked of a peer: a module with a density and samples."""

    def log_prob(self, y: Tensor) -> Tensor: ...

    def sample(self, n: int) -> Tensor: ...


@dataclass
class Entry:
    """One row of the table."""

    name: str
    bits: tuple[float, float]
    parameters: int
    curve: Curve | None = None
    sampling: float | None = None


@dataclass
class Demo:
    """What differs from flow to flow.

    Args:
        name: of the flow, which names the files too. build: the flow, for quick runs a smaller one.
        peers: library -> the same architecture there; the first that is installed takes part.
        naive: how the reference samples, in words.
        training: what `common.fit` takes.
    """

    name: str
    build: Callable[[bool], Flow]
    peers: Mapping[str, Callable[[bool], nn.Module]] = field(default_factory=dict)
    naive: str = "plain PyTorch"
    margin: float = 0.01
    training: Mapping[str, Any] = field(default_factory=dict)


def run(demo: Demo, options: Options) -> None:
    """Fits, compares, samples, tells, and writes ``<out>/<name>.png`` and ``<out>/<name>.json``."""
    plt = report.pyplot()  # that it is missing should be known before a minute of training
    digits, dequantizer = common.load_digits(), Dequantizer(demo.margin)
    sizes = [len(part) for part in digits]
    print(
        f"{sum(sizes)} handwritten digits, 8x8 pixels, grey levels 0..16: {sizes[0]} to train, {sizes[1]} to validate, "
    )
    print(f"{sizes[2]} to test; dequantized with uniform noise, logit.")
    training = {**demo.training, "seed": options.seed}
    training["epochs"] = options.epochs or (3 if options.quick else training.get("epochs", 60))

    with common.fixed_noise(options.seed):
        flow = demo.build(options.quick)
    title = f"{demo.name.upper()}, flowkernels"
    ours = _fit(title, flow, flow.log_prob, digits, dequantizer, training)
    entries, missing = [_gaussian(digits, dequantizer)], []
    samples = 100 if options.quick else 1000
    for library, build in demo.peers.items():
        try:
            with common.fixed_noise(options.seed):
                peer: Any = build(options.quick)
        except ImportError:
            missing.append(library)
            continue
        entry = _fit(f"{demo.name.upper()}, {library}", peer, peer.log_prob, digits, dequantizer, training)
        entry.sampling = report.best_time(torch.no_grad()(lambda: peer.sample(samples)), repeats=2)  # noqa: B023
        entries.append(entry)
        break
    entries.append(ours)
    if missing and len(entries) == 2:
        print(f"not installed, so there is no peer to compare with: {', '.join(missing)}")

    drawn = _sample(flow, dequantizer, samples, options.seed)
    ours.sampling = drawn["fused_seconds"]
    print(f"\n{_table(entries, samples)}\n")
    print("Bits/dim: the bound E_u log p(x + u) <= log P(x), averaged over 16 draws of u; +- is the standard error")
    print(f"over the {sizes[2]} test images. Training has the same loop, images, noise and epochs for all.\n")
    print(f"{samples} digits from the same noise, float32, {torch.get_num_threads()} threads:")
    print(f"  fused sampler        {report.seconds(drawn['fused_seconds'])}")
    print(f"  naive loop           {report.seconds(drawn['naive_seconds'])}   ({demo.naive})")
    print(f"  ratio                {drawn['ratio']:.0f}")
    low, high = drawn["range"]
    print(f"  largest difference   {drawn['difference']:.1e} in samples of {low:.1f} .. {high:.1f}")
    print(f"    in float64         {drawn['difference_float64']:.1e}")
    print(f"  grey levels changed  {drawn['changed']} of {samples * PIXELS}\n")
    print(explain(flow))

    picture, numbers = options.out / f"{demo.name}.png", options.out / f"{demo.name}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    _picture(plt, demo, digits, drawn, entries).savefig(picture, dpi=110)
    report.save_numbers(numbers, _numbers(entries, drawn, samples, options))
    print(f"\npicture: {picture}   numbers: {numbers}")


def _fit(
    name: str,
    model: nn.Module,
    log_prob: Callable[[Tensor], Tensor],
    digits: Digits,
    dequantizer: Dequantizer,
    training: Mapping[str, Any],
) -> Entry:
    objective: Objective = dequantizer.bound(log_prob)
    curve = common.fit(model, objective, digits, label=name, **training)
    size = sum(p.numel() for p in model.parameters())
    return Entry(name, common.bits_per_dim(objective, digits.test), size, curve)


def _gaussian(digits: Digits, dequantizer: Dequantizer) -> Entry:
    gaussian = common.Gaussian(digits, dequantizer)
    bits = common.bits_per_dim(dequantizer.bound(gaussian.log_prob), digits.test)
    return Entry("Gaussian, full covariance", bits, PIXELS + PIXELS * (PIXELS + 1) // 2)


@torch.no_grad()
def _sample(flow: Flow, dequantizer: Dequantizer, n: int, seed: int) -> dict[str, Any]:
    """The same noise through the fused sampler and through the reference: images, times, differences."""

    def naive() -> Tensor:
        with use_backend("reference"):
            return flow.sample(n, seed=seed)

    y, slow = flow.sample(n, seed=seed), naive()
    exact = copy.deepcopy(flow).double()
    fused_exact = exact.sample(n, seed=seed)
    with use_backend("reference"):
        naive_exact = exact.sample(n, seed=seed)
    fused_seconds = report.best_time(lambda: flow.sample(n, seed=seed), repeats=10)
    naive_seconds = report.best_time(naive, repeats=2)
    levels = dequantizer.decode(y)
    return {
        "levels": levels,
        "fused_seconds": fused_seconds,
        "naive_seconds": naive_seconds,
        "ratio": naive_seconds / fused_seconds,
        "difference": float((y - slow).abs().max()),
        "difference_float64": float((fused_exact - naive_exact).abs().max()),
        "range": (float(y.min()), float(y.max())),
        "changed": int((levels != dequantizer.decode(slow)).sum()),
    }


def _table(entries: Sequence[Entry], samples: int) -> str:
    rows = [["uniform over grey levels", f"{math.log2(LEVELS):.3f}          ", "0", "", "", ""]]
    for entry in entries:
        curve = entry.curve
        rows.append(
            [
                entry.name,
                f"{entry.bits[0]:.3f} +- {entry.bits[1]:.3f}",
                f"{entry.parameters:,}",
                f"{curve.best + 1} of {len(curve.train)}" if curve else "",
                report.seconds(curve.seconds) if curve else "",
                report.seconds(entry.sampling) if entry.sampling else "",
            ]
        )
    return report.table(["", "test bits/dim", "parameters", "best epoch", "training", f"{samples} samples"], rows)


def _numbers(entries: Sequence[Entry], drawn: Mapping[str, Any], samples: int, options: Options) -> dict[str, Any]:
    models = []
    for entry in entries:
        one: dict[str, Any] = {
            "name": entry.name,
            "test_bits_per_dim": entry.bits[0],
            "standard_error": entry.bits[1],
            "parameters": entry.parameters,
            "sampling_seconds": entry.sampling,
        }
        if entry.curve:
            one["training_seconds"], one["best_epoch"] = entry.curve.seconds, entry.curve.best + 1
            one["train_curve"], one["valid_curve"] = entry.curve.train, entry.curve.valid
        models.append(one)
    sampling = {name: value for name, value in drawn.items() if name != "levels"}
    return {
        "models": models,
        "sampling": {"samples": samples, **sampling},
        "quick": options.quick,
        "seed": options.seed,
    }


def _picture(plt: Any, demo: Demo, digits: Digits, drawn: Mapping[str, Any], entries: Sequence[Entry]) -> Any:
    samples = len(drawn["levels"])
    figure, ((left, right), (curves, times)) = plt.subplots(2, 2, figsize=(11, 9), height_ratios=(1.35, 1))
    report.show_digits(left, digits.test, "digits of the test set")
    report.show_digits(right, drawn["levels"], f"drawn from the {demo.name.upper()}, not selected")
    for entry in entries:
        if entry.curve is None:
            curves.axhline(entry.bits[0], color="0.5", linestyle=":", label=f"{entry.name} (test)")
            continue
        (line,) = curves.plot(
            range(1, len(entry.curve.valid) + 1), entry.curve.valid, label=f"{entry.name} (validation)"
        )
        curves.plot(
            range(1, len(entry.curve.train) + 1), entry.curve.train, color=line.get_color(), alpha=0.4, linewidth=1
        )
    lowest = min(min(e.curve.train) for e in entries if e.curve)
    curves.set(xlabel="epoch", ylabel="bits per dimension", title="training (pale: on the training images)")
    curves.set_ylim(lowest - 0.05, math.log2(LEVELS))
    curves.legend(fontsize=8)
    curves.grid(alpha=0.3)
    curves.xaxis.get_major_locator().set_params(integer=True)

    bars = [("fused sampler", drawn["fused_seconds"]), ("naive loop", drawn["naive_seconds"])]
    bars += [(f"{e.name.split(', ')[1]}, its own", e.sampling) for e in entries[:-1] if e.sampling]
    drawn_bars = times.barh([name for name, _ in bars], [1e3 * value for _, value in bars], color=["C2", "0.6", "0.6"])
    times.bar_label(drawn_bars, [report.seconds(value) for _, value in bars], padding=4)
    times.set_xscale("log")
    shortest, longest = min(value for _, value in bars), max(value for _, value in bars)
    times.set_xlim(2e2 * shortest, 6e3 * longest)
    times.invert_yaxis()
    times.set(xlabel="milliseconds", title=f"drawing {samples} digits: {drawn['ratio']:.0f} times faster than the loop")
    figure.tight_layout()
    return figure
