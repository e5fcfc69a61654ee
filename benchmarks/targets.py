"""What was to be reached, beside what was: design section 9, on two cores of a current server processor, float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """``figure(ours) / figure(than)`` at most `bound`, or ``figure(than) / figure(ours)`` at least `bound`.

    Attributes:
        row: the row of the table. case: the id of the case, or of the first case if it begins with that.
        than: the name of the variant to compare with. at_most: which of the two ratios it is.
        figure: ``p50`` (seconds) or ``peak_bytes``. name: our variant, if it is another than ``flowkernels``.
    """

    row: str
    case: str
    than: str
    bound: float
    at_most: bool = False
    figure: str = "p50"
    name: str = "flowkernels"

    @property
    def wording(self) -> str:
        what = " memory" if self.figure == "peak_bytes" else ""
        if self.at_most:
            return f"≤ {self.bound:g}×{what} {self.than}"
        return f"≥ {self.bound:g}× {self.than}"

    def evaluate(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """``reached`` is the ratio, None where the run did not have it; ``met`` is None then too."""
        reached = None
        for record in records:
            if record["status"] != "ok" or not (record["id"] + " ").startswith(self.case + " "):
                continue
            figures = {v["name"]: v.get(self.figure) for v in record["variants"]}
            ours, than = figures.get(self.name), figures.get(self.than)
            if ours and than:
                reached = ours / than if self.at_most else than / ours
                break
        met = None if reached is None else (reached <= self.bound if self.at_most else reached >= self.bound)
        return {
            "row": self.row,
            "case": self.case,
            "target": self.wording,
            "bound": self.bound,
            "reached": reached,
            "met": met,
        }


_BIG = "maf / sampling / D=784 H=1024 B=100 transforms=1 layers=2"
_MIDDLE = "maf / sampling / D=63 H=512 B=1000 transforms=1 layers=2"
_ONE = "maf / sampling / D=43 H=512 B=1 transforms=1 layers=2"
_DENSITY = "maf / log_prob / D=63 H=512 B=1024 transforms=5 layers=2"
_STEP = "maf / training step / D=63 H=512 B=1024 transforms=5 layers=2"
_SMALL = "D=5 H=50 B=1 transforms=5 layers=2"
_GRADIENT = "maf / sampling+gradient / D=784 H=1024 B=100 transforms=1 layers=2"

TARGETS = (
    Target("MAF sampling, D=784 H=1024 B=100", _BIG, "dense pass", 0.8, at_most=True),
    Target("MAF sampling, D=784 H=1024 B=100", _BIG, "nflows", 1500),
    Target("MAF sampling, D=784 H=1024 B=100", _BIG, "zuko", 1500),
    Target("MAF sampling, D=63 H=512 B=1000", _MIDDLE, "dense pass", 0.7, at_most=True),
    Target("MAF sampling, D=63 H=512 B=1000", _MIDDLE, "nflows", 150),
    Target("MAF sampling, D=63 H=512 B=1000", _MIDDLE, "zuko", 150),
    Target("MAF sampling, D=43 H=512 B=1", _ONE, "nflows", 60),
    Target("MAF sampling, D=43 H=512 B=1", _ONE, "zuko", 120),
    Target("MAF log_prob, 5 transforms, D=63 H=512 B=1024", _DENSITY, "without masks", 0.7, at_most=True),
    Target("MAF log_prob, 5 transforms, D=63 H=512 B=1024", _DENSITY, "zuko", 1.6),
    Target("MAF log_prob, 5 transforms, D=63 H=512 B=1024", _DENSITY, "nflows", 2.5),
    Target("MAF training step, 5 transforms, D=63 H=512 B=1024", _STEP, "without masks", 1.0, at_most=True),
    Target("MAF training step, 5 transforms, D=63 H=512 B=1024", _STEP, "zuko", 1.3),
    Target("MAF training step, 5 transforms, D=63 H=512 B=1024", _STEP, "nflows", 1.7),
    Target("small MAF, D=5 H=50, 5 transforms, B=1, log_prob", f"maf / log_prob / {_SMALL}", "nflows", 5),
    Target("small MAF, D=5 H=50, 5 transforms, B=1, sampling", f"maf / sampling / {_SMALL}", "nflows", 5),
    Target(
        "gradient of a sample, D=784 H=1024 B=100",
        _GRADIENT,
        "flowkernels density",
        3.0,
        at_most=True,
        figure="peak_bytes",
    ),
    Target(
        "spline MAF sampling, D=200 H=128, 5 transforms, B=64",
        "autoregressive_spline / sampling / D=200 H=128 B=64 transforms=5",
        "zuko",
        100,
    ),
    Target(
        "affine coupling, 65536×256, forward",
        "affine_coupling / forward / N=65536 D=256 memory=fresh",
        "torch.compile",
        2.5,
    ),
    Target(
        "affine coupling, 65536×256, forward", "affine_coupling / forward / N=65536 D=256 memory=fresh", "PyTorch", 6
    ),
    Target(
        "affine coupling, 65536×256, forward+backward",
        "affine_coupling / forward+backward / N=65536 D=256 memory=fresh",
        "torch.compile",
        2,
    ),
    Target(
        "affine coupling, 65536×256, forward+backward",
        "affine_coupling / forward+backward / N=65536 D=256 memory=fresh",
        "PyTorch",
        0.6,
        at_most=True,
        figure="peak_bytes",
    ),
    Target(
        "rational-quadratic spline K=8, 4096×64, forward",
        "rq_spline / forward / style=nflows K=8 N=4096 D=64",
        "nflows",
        8,
    ),
    Target(
        "rational-quadratic spline K=8, 4096×64, forward",
        "rq_spline / forward / style=zuko K=8 N=4096 D=64",
        "zuko",
        2,
    ),
    Target(
        "rational-quadratic spline K=8, 4096×64, inverse",
        "rq_spline / inverse / style=nflows K=8 N=4096 D=64",
        "nflows",
        8,
    ),
    Target(
        "rational-quadratic spline K=8, 4096×64, inverse",
        "rq_spline / inverse / style=zuko K=8 N=4096 D=64",
        "zuko",
        2,
    ),
    Target(
        "mixture of logistics K=8, 4096×64, forward",
        "logistic_mixture / forward / K=8 N=4096 D=64",
        "PyTorch",
        4,
    ),
    Target(
        "mixture of logistics K=8, 4096×64, inverse",
        "logistic_mixture / inverse / K=8 N=4096 D=64",
        "PyTorch",
        20,
    ),
    Target("dequantize, 65536×256", "dequantize / noise drawn / N=65536 D=256", "PyTorch", 5),
    Target("Gumbel-softmax, 65536×256", "gumbel_softmax / forward / N=65536 D=256", "PyTorch", 10),
    Target("Gumbel-softmax, 65536×256", "gumbel_softmax / forward / N=65536 D=256", "torch.compile", 3.5),
    Target("Gumbel-softmax, hard, 65536×256", "gumbel_softmax / forward, hard / N=65536 D=256", "PyTorch", 10),
    Target("Gumbel-argmax, 65536×256", "gumbel_argmax / samples / N=65536 D=256 k=1", "PyTorch", 8),
    Target("nearest code, 65536×64 of 1024", "vector_quantize / search / N=65536 K=1024 D=64", "PyTorch", 3),
    Target(
        "nearest code, 65536×64 of 1024",
        "vector_quantize / search / N=65536 K=1024 D=64",
        "PyTorch",
        1 / 20,
        at_most=True,
        figure="peak_bytes",
    ),
    *(
        Target(f"accelerated {library} MAF, {size}, {what}", f"accelerate / {library} {what} / {size}", library, bound)
        for library in ("nflows", "zuko")
        for size, what, bound in (
            ("D=784 H=1024 B=100 transforms=1", "sampling", 1000),
            ("D=43 H=512 B=1000 transforms=5", "sampling", 100),
            ("D=43 H=512 B=1000 transforms=5", "log_prob", 1.3),
            ("D=43 H=512 B=1000 transforms=5", "training step", 1.2),
            ("D=5 H=50 B=1 transforms=5", "sampling", 8),
            ("D=5 H=50 B=100 transforms=5", "training step", 1),
        )
    ),
)


def evaluate(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    records = list(records)
    return [target.evaluate(records) for target in TARGETS]
