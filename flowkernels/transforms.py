"""Elementwise transforms with options of their own: what a coupling or an autoregressive layer does to a feature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkernels.scales import NAMES as LAW_NAMES
from flowkernels.scales import ScaleLaw, as_law

__all__ = ["LRSpline", "LogisticMixture", "RQSpline", "Spline"]

_COMMON = {"bound": 3.0, "min_width": 1e-3, "min_height": 1e-3, "min_slope": 1e-3}
_DEFAULTS: dict[str, dict[str, float]] = {
    "nflows": {**_COMMON, "logit_scale": 1.0},
    "zuko": {"bound": 5.0, "min_slope": 1e-3},
    "pyro": _COMMON,
    "linear": {**_COMMON, "min_lambda": 0.025},
}

_CODES = tuple(_DEFAULTS)  # csrc/common/rq_spline.h: SplineStyle
STYLES = ("nflows", "zuko", "pyro")
MAX_BINS = 64  # csrc/common/rq_spline.h: kMaxBins


@dataclass(frozen=True)
class Spline:
    """A monotonic rational spline on [-bound, bound], the identity outside of it: an `RQSpline` or an `LRSpline`."""

    style: str
    bins: int
    parameters: tuple[tuple[str, float], ...]

    def __init__(self, style: str, bins: int, parameters: Mapping[str, float]) -> None:
        if isinstance(bins, bool) or not isinstance(bins, int):
            raise TypeError(f"bins must be an int, got {type(bins).__name__}")
        if not 2 <= bins <= MAX_BINS:
            raise ValueError(f"bins must be 2 to {MAX_BINS}, got {bins}")
        unknown = sorted(set(parameters) - set(_DEFAULTS[style]))
        if unknown:
            allowed = ", ".join(_DEFAULTS[style])
            name = "LRSpline" if style == "linear" else f"style {style!r}"
            raise ValueError(f"{name} has no parameter {unknown[0]!r}; its parameters: {allowed}")
        values = {key: float(parameters.get(key, default)) for key, default in _DEFAULTS[style].items()}
        for key, value in values.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{key} must be positive and finite, got {value}")
        for key in ("min_width", "min_height"):
            if values.get(key, 0.0) * bins >= 1:
                raise ValueError(f"{key} must be below 1 / bins = {1 / bins:g}, got {values[key]:g}")
        if values["min_slope"] >= 1:
            raise ValueError(f"min_slope must be below 1, the slope at the ends, got {values['min_slope']:g}")
        if values.get("min_lambda", 0.0) >= 0.5:
            raise ValueError(f"min_lambda must be below 0.5, the middle of a bin, got {values['min_lambda']:g}")
        object.__setattr__(self, "style", style)
        object.__setattr__(self, "bins", bins)
        object.__setattr__(self, "parameters", tuple(values.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.style, self.bins, self.parameters)

    def __repr__(self) -> str:
        style = [] if self.style == "linear" else [repr(self.style)]
        inside = [*style, f"bins={self.bins}"] + [f"{key}={value:g}" for key, value in self.parameters]
        return f"{type(self).__name__}({', '.join(inside)})"

    @property
    def params_per_feature(self) -> int:
        return (4 if self.style == "linear" else 3) * self.bins - 1

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """For `flowkernels.plan.Plan`: the parameters of one feature in their order."""
        inner = range(1, self.bins)
        return (
            *(f"width_{k}" for k in range(self.bins)),
            *(f"height_{k}" for k in range(self.bins)),
            *(f"slope_{k}" for k in inner),
            *(f"lambda_{k}" for k in range(self.bins) if self.style == "linear"),
        )

    @property
    def bound(self) -> float:
        return dict(self.parameters)["bound"]

    @property
    def end_slope(self) -> float:
        """The slope at both ends."""
        return 1.0 - dict(self.parameters)["min_slope"] if self.style in ("pyro", "linear") else 1.0

    @property
    def code(self) -> int:
        """The style's number in csrc/common/rq_spline.h."""
        return _CODES.index(self.style)

    @property
    def numbers(self) -> list[float]:
        """The five numbers of csrc/common/rq_spline.h: bound, min_width, min_height, then min_slope and logit_scale
        or min_lambda, or zuko's two limits."""
        p = dict(self.parameters)
        if self.style == "zuko":
            return [p["bound"], 0.0, 0.0, 1 / abs(math.log(p["min_slope"])), 2 / abs(math.log(p["min_slope"]))]
        return [*p.values(), 0.0][:5]

    def knots(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """((..., K + 1) x, (..., K + 1) y, (..., K + 1) slope) of the knots, in plain PyTorch: the truth for every
        backend."""
        p, k = dict(self.parameters), self.bins
        widths, heights, slopes = parameters[..., : 3 * k - 1].split([k, k, k - 1], dim=-1)
        if self.style == "zuko":
            limit = math.log(p["min_slope"])
            widths = widths / (1 + (2 * widths / limit).abs())
            heights = heights / (1 + (2 * heights / limit).abs())
            slopes = (slopes / (1 + (slopes / limit).abs())).exp()
        else:
            scale = p.get("logit_scale", 1.0)
            widths, heights = widths * scale, heights * scale
            slopes = p["min_slope"] + F.softplus(slopes)
        x = self._edges(widths, p.get("min_width", 0.0))
        y = self._edges(heights, p.get("min_height", 0.0))
        return x, y, F.pad(slopes, (1, 1), value=self.end_slope)

    def _edges(self, logits: Tensor, least: float) -> Tensor:
        fractions = least + (1 - least * self.bins) * torch.softmax(logits, dim=-1)
        inner = self.bound * (2 * fractions.cumsum(-1)[..., :-1] - 1)
        ends = torch.full_like(inner[..., :1], self.bound)
        return torch.cat([-ends, inner, ends], dim=-1)


class RQSpline(Spline):
    """A monotonic rational-quadratic spline on [-bound, bound], the identity outside of it.

    A feature has 3 bins - 1 parameters: `bins` widths, `bins` heights and the slopes at the bins - 1 inner knots,
    in this order, all unconstrained. How they become bins, and the slope at both ends, is the style; where that slope
    is 1, the spline meets the identity smoothly:

    | style    | widths, heights (fractions of the interval) | slopes                             | ends          |
    |----------|---------------------------------------------|------------------------------------|---------------|
    | `nflows` | min + (1 - bins min) softmax(logit_scale u) | min_slope + softplus(u)            | 1             |
    | `zuko`   | softmax(u / (1 + |2 u / log min_slope|))    | exp(u / (1 + |u / log min_slope|)) | 1             |
    | `pyro`   | min + (1 - bins min) softmax(u)             | min_slope + softplus(u)            | 1 - min_slope |

    Args:
        style: ``"nflows"`` (bound 3, min_width, min_height and min_slope 1e-3, logit_scale 1; nflows' coupling
            layers divide their logits by the square root of the network's width: that is logit_scale),
            ``"zuko"`` (bound 5, min_slope 1e-3) or ``"pyro"`` (bound 3, min_width, min_height and min_slope 1e-3).
        bins: 2 to 64.

    Raises:
        ValueError: an unknown style or parameter, bins out of range, a bound or minimum that is not positive,
            minima that leave no room for `bins` bins.

    Source: Durkan et al. 2019 (Neural Spline Flows), arXiv:1906.04032.
    """

    def __init__(self, style: str = "nflows", bins: int = 8, **parameters: float) -> None:
        if style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
        super().__init__(style, bins, parameters)


class LRSpline(Spline):
    """A monotonic linear-rational spline on [-bound, bound], the identity outside of it.

    A feature has 4 bins - 1 parameters: `bins` widths, `bins` heights, the slopes at the bins - 1 inner knots and
    `bins` lambdas, in this order, all unconstrained. Widths, heights and slopes are read as by `RQSpline` in the style
    `pyro`, so the slope at both ends is 1 - min_slope; ``lambda = min_lambda + (1 - 2 min_lambda) sigmoid(u)``.

    Every bin consists of two pieces that meet, with the same slope, at the fraction lambda of its width. With theta and
    eta running from 0 to 1 over width and height, s = height / width, d0 and d1 the slopes at the knots and
    q = lambda sqrt(d0) + (1 - lambda) sqrt(d1)::

        eta   = lambda d0 theta / (s (lambda - theta) + sqrt(d0) q theta)    for theta <= lambda
        dy/dx = (s lambda sqrt(d0) / (s (lambda - theta) + sqrt(d0) q theta))^2

    and from the other end alike. The inverse is of the same kind: no root, no discriminant.

    Args:
        bins: 2 to 64.
        parameters: bound 3, min_width, min_height and min_slope 1e-3, min_lambda 0.025, unless given.

    Raises:
        ValueError: an unknown parameter, bins out of range, a bound or minimum that is not positive, minima that leave
            no room for `bins` bins, a min_lambda of 0.5 or more.

    Source: Dolatabadi et al. 2020 (Linear Rational Splines), arXiv:2001.05168.
    """

    def __init__(self, bins: int = 8, **parameters: float) -> None:
        super().__init__("linear", bins, parameters)

    def lambdas(self, parameters: Tensor) -> Tensor:
        """(..., K) where in its bin each pair of pieces meets, in plain PyTorch."""
        least = dict(self.parameters)["min_lambda"]
        return least + (1 - 2 * least) * torch.sigmoid(parameters[..., 3 * self.bins - 1 :])


def _rebuild(style: str, bins: int, parameters: tuple[tuple[str, float], ...]) -> Spline:
    return LRSpline(bins, **dict(parameters)) if style == "linear" else RQSpline(style, bins, **dict(parameters))


def spline_of_numbers(bins: int, code: int, numbers: list[float]) -> Spline:
    """The spline whose `bins`, `code` and `numbers` these are: how the reference reads an operator's arguments."""
    style = _CODES[code]
    if style == "zuko":
        return RQSpline("zuko", bins, bound=numbers[0], min_slope=math.exp(-1 / numbers[3]))
    return _rebuild(style, bins, tuple(zip(_DEFAULTS[style], numbers, strict=False)))


@dataclass(frozen=True)
class LogisticMixture:
    """Flow++'s elementwise transform: distribution function of a mixture of logistics, logit, affine.

    A feature has 3 components + 2 parameters, see `flowkernels.ops.logistic_mixture`.

    Args:
        components: 1 to 64. law: scale law of the affine part. min_log_scale: smaller logarithms of scales are
        raised to it.

    Source: Ho et al. 2019 (Flow++), arXiv:1902.00275.
    """

    components: int = 8
    law: str | ScaleLaw = "tanh"
    min_log_scale: float = -7.0

    def __post_init__(self) -> None:
        if isinstance(self.components, bool) or not isinstance(self.components, int):
            raise TypeError(f"components must be an int, got {type(self.components).__name__}")
        if not 1 <= self.components <= 64:
            raise ValueError(f"components must be 1 to 64, got {self.components}")
        object.__setattr__(self, "law", as_law(self.law))

    @property
    def params_per_feature(self) -> int:
        return 3 * self.components + 2

    @property
    def parameter_names(self) -> tuple[str, ...]:
        kinds = ("logit", "mean", "log_scale")
        return ("shift", "scale", *(f"{kind}_{k}" for kind in kinds for k in range(self.components)))


Transform = ScaleLaw | Spline | LogisticMixture


def as_transform(transform: str | Transform) -> Transform:
    """A transform as it is, or the affine transform with the scale law of that name."""
    return transform if isinstance(transform, (Spline, LogisticMixture)) else as_law(transform)


def params_per_feature(transform: Transform) -> int:
    """How many parameters a feature has: 1 (the shift) for the unit law, 2 (shift, scale) for the other laws."""
    if isinstance(transform, ScaleLaw):
        return 1 if transform.name == "unit" else 2
    return transform.params_per_feature


def code_and_numbers(transform: ScaleLaw | Spline) -> tuple[int, list[float]]:
    """How the autoregressive operators are told of their transform, with six numbers: scale laws count from 0,
    then come the splines."""
    if isinstance(transform, ScaleLaw):
        return transform.code, [*transform.numbers, 0.0, 0.0, 0.0]
    return len(LAW_NAMES) + transform.code, [*transform.numbers, float(transform.bins)]


def identity_parameters(transform: Transform) -> Tensor:
    """(P,) parameters from which training may start: the identity, or something close to it where it is not
    reached: by a mixture, and by a spline whose slope at the ends is not 1."""
    theta = torch.zeros(params_per_feature(transform))
    if isinstance(transform, Spline) and transform.style != "zuko":
        k, least = transform.bins, dict(transform.parameters)["min_slope"]
        theta[2 * k : 3 * k - 1] = math.log(math.expm1(1 - least))  # softplus of it is 1 - min_slope
    if isinstance(transform, LogisticMixture):
        k = transform.components
        theta[2 + k : 2 + 2 * k] = torch.linspace(-1.0, 1.0, k) if k > 1 else 0.0
    return theta
