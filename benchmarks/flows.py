"""Every flow of the demonstrations on the digits: one split, one seed, one budget, one table.

    python -m benchmarks.flows --json benchmarks/results/flows.json     trains, writes the results, prints the table
    python -m benchmarks.flows --report benchmarks/results/flows.json   no run: fills the README from these results

Each flow is trained twice, with uniform noise and with variational noise from a small conditional flow.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.report import filled, markdown, relative
from flowkernels.demo import common, flowpp, report

FLOWS = {"nice": "NICE", "realnvp": "RealNVP", "glow": "Glow", "maf": "MAF", "nsf": "NSF", "flowpp": "Flow++"}
# Test bits/dim of CIFAR-10: Ho et al. 2019 (Flow++), arXiv:1902.00275, table 1.
CIFAR = {"RealNVP": 3.49, "Glow": 3.35, "Flow++": 3.08}
EPOCHS, SAMPLES = 60, 1000


def measure(name: str, learned: bool, digits: common.Digits, epochs: int, seed: int, quick: bool) -> dict[str, Any]:
    """Fits one flow and says how good it is, how large, and how fast."""
    module = importlib.import_module(f"flowkernels.demo.{name}")
    noise = "variational" if learned else "uniform"
    with common.fixed_noise(seed):
        model = flowpp.dequantized(module.build(quick), learned, quick)
    # One budget for all; no fit ends early, so that the time of an epoch is that of all of them.
    training = {**module.TRAINING, "epochs": epochs, "patience": epochs, "seed": seed}
    label = f"{FLOWS[name]}, {noise} noise"
    curve = common.fit(model, model.bound, digits, label=label, **training)
    bits, error = common.bits_per_dim(model.bound, digits.test)
    return {
        "flow": FLOWS[name],
        "noise": noise,
        "test_bits_per_dim": bits,
        "standard_error": error,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epoch_seconds": curve.seconds / epochs,
        "sampling_seconds": report.best_time(lambda: model.sample(SAMPLES, seed=seed), repeats=3),
        "best_epoch": curve.best + 1,
        "train_curve": curve.train,
        "valid_curve": curve.valid,
    }


def run(epochs: int, seed: int, quick: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    digits, dequantizer = common.load_digits(), common.Dequantizer()
    gaussian = common.Gaussian(digits, dequantizer)
    bits, error = common.bits_per_dim(dequantizer.bound(gaussian.log_prob), digits.test)
    document = {
        **machine.describe(),
        "epochs": epochs,
        "seed": seed,
        "quick": quick,
        "samples": SAMPLES,
        "images": [len(part) for part in digits],
        "gaussian": {"test_bits_per_dim": bits, "standard_error": error},
        "cifar10_bits_per_dim": CIFAR,
        "results": [measure(name, learned, digits, epochs, seed, quick) for name in FLOWS for learned in (False, True)],
    }
    document["seconds"] = time.perf_counter() - begin
    return document


def rows(document: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table, flows in the order of their bits with uniform noise, the worst first."""
    columns = ("", "uniform noise", "variational noise", "parameters", "an epoch", f"{document['samples']} samples")
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for one in document["results"]:
        found.setdefault(one["flow"], {})[one["noise"]] = one
    gaussian = document["gaussian"]
    size = common.PIXELS + common.PIXELS * (common.PIXELS + 1) // 2
    table: list[tuple[str, ...]] = [("Gaussian, full covariance", _bits(gaussian), "", f"{size:,}", "", "")]
    for flow in sorted(found, key=lambda name: -found[name]["uniform"]["test_bits_per_dim"]):
        uniform, learned = found[flow]["uniform"], found[flow]["variational"]
        table.append(
            (
                flow,
                _bits(uniform),
                _bits(learned),
                f"{uniform['parameters']:,}",
                report.seconds(uniform["epoch_seconds"]),
                report.seconds(uniform["sampling_seconds"]),
            )
        )
    return columns, table


def _bits(one: Mapping[str, Any]) -> str:
    return f"{one['test_bits_per_dim']:.3f} ± {one['standard_error']:.3f}"


def summary(document: Mapping[str, Any], source: Path) -> str:
    """The markdown of the README."""
    train, valid, test = document["images"]
    device = document["device"]
    best = {one["flow"]: one["test_bits_per_dim"] for one in document["results"] if one["noise"] == "uniform"}
    known = [name for name in CIFAR if name in best]
    ours = " < ".join(f"{name} {best[name]:.3f}" for name in sorted(known, key=lambda name: best[name]))
    paper = " < ".join(f"{name} {CIFAR[name]:.2f}" for name in sorted(CIFAR, key=lambda name: CIFAR[name]))
    text = (
        f"Test bits/dim of scikit-learn's 8×8 digits, 17 grey levels ({train} to train, {valid} to validate, {test} to"
        f" test): {document['epochs']} epochs each, seed {document['seed']}, ± the standard error over the test images."
        " Parameters and times are those with uniform noise; an epoch is training and validation. Measured"
        f" {document['date']} at commit `{document['commit']}`{' with changes' * document['changed']} on"
        f" {device['processor']}, {device['threads']} threads, in {document['seconds'] / 60:.0f} minutes:"
        f" [`{relative(source)}`]({relative(source)})."
    )
    order = f"With uniform noise here: {ours}. On CIFAR-10, as published (arXiv:1902.00275): {paper}."
    return "\n\n".join([text, markdown(*rows(document)), order])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flows", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--report", type=Path, metavar="FILE", help="no run: fill the README from these results")
    parser.add_argument("--quick", action="store_true", help="small flows, two epochs, to see that it works")
    parser.add_argument("--epochs", type=int, metavar="N", help=f"for every flow (default {EPOCHS})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, noise and order (default 0)")
    options = parser.parse_args(argv)
    if options.report:
        document = json.loads(options.report.read_text())
        readme = machine.ROOT / "README.md"
        readme.write_text(filled(readme.read_text(), "flows", summary(document, options.report)))
        print(f"filled: {readme}")
        return 0
    epochs = options.epochs or (2 if options.quick else EPOCHS)
    document = run(epochs, options.seed, options.quick)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"results: {options.json}")
    print(f"\n{report.table(*rows(document))}\n\ntest bits/dim; {torch.get_num_threads()} threads, ", end="")
    print(f"{report.seconds(document['seconds'])} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
