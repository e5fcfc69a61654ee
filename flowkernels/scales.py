"""The named scale laws: sigma > 0 as a function of an unconstrained number u.

| name       | sigma(u)                                              | parameters (defaults)      | used by
|
|------------|-------------------------------------------------------|----------------------------|---------------------|
| `exp`      | exp(gain u)                                           | gain 1                     | MAF, IAF,
RealNVP   | | `softplus` | softplus(u + offset) + floor                          | offset 0, floor 1e-3
| nflows' MAF         | | `sigmoid`  | sigmoid(u + offset) + floor                           | offset 2, floor
1e-3       | nflows' coupling    | | `tanh`     | exp(bound tanh(u / bound))                            |
bound 2                    | FrEIA               | | `atan`     | exp(bound 0.636 atan(u / bound))
| bound 2                    | FrEIA               | | `softclip` | exp(u / (1 + \\|u / log bound\\|))
| bound 1e-3                 | zuko                | | `clip`     | exp(clamp(u, lo, hi)), gradient passed or
stopped     | -5, 3, passed              | Pyro                | | `unit`     | 1
|                            | NICE                |

One table for every backend: `ScaleLaw.code` and `ScaleLaw.numbers` are what the kernels get.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_DEFAULTS: dict[str, dict[str, float]] = {
    "exp": {"gain": 1.0},
    "softplus": {"offset": 0.0, "floor": 1e-3},
    "sigmoid": {"offset": 2.0, "floor": 1e-3},
    "tanh": {"bound": 2.0},
    "atan": {"bound": 2.0},
    "softclip": {"bound": 1e-3},
    "clip": {"lo": -5.0, "hi": 3.0, "pass_gradient": 1.0},
    "unit": {},
}

NAMES = tuple(_DEFAULTS)
FORMS = ("scale_shift", "shift_scale", "gate")

_ATAN_FACTOR = 0.636  # FrEIA's rounding of 2/pi


@dataclass(frozen=True)
class ScaleLaw:
    """A scale law with its parameters, e.g. ``ScaleLaw("softplus", floor=1e-2)``. Hashable and comparable.

    Raises:
        ValueError: an unknown name or parameter, a negative floor, a bound that is not positive (for
            ``softclip``: not inside (0, 1)), ``lo >= hi``.
    """

    name: str
    parameters: tuple[tuple[str, float], ...]
    code: int = field(compare=False, repr=False)  # the law's number in csrc/common/scales.h
    numbers: list[float] = field(compare=False, repr=False)  # what csrc/common/scales.h calls a, b, c

    def __init__(self, name: str, **parameters: float) -> None:
        if name not in _DEFAULTS:
            raise ValueError(f"law must be one of {', '.join(NAMES)}, got {name!r}")
        unknown = sorted(set(parameters) - set(_DEFAULTS[name]))
        if unknown:
            allowed = ", ".join(_DEFAULTS[name]) or "none"
            raise ValueError(f"law {name!r} has no parameter {unknown[0]!r}; its parameters: {allowed}")
        values = {key: float(parameters.get(key, default)) for key, default in _DEFAULTS[name].items()}
        for key, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"law {name!r}: {key} must be finite, got {value}")
        if values.get("floor", 0.0) < 0:
            raise ValueError(f"law {name!r}: floor must be >= 0, got {values['floor']}")
        if name in ("tanh", "atan") and values["bound"] <= 0:
            raise ValueError(f"law {name!r}: bound must be > 0, got {values['bound']}")
        if name == "softclip" and not 0 < values["bound"] < 1:
            raise ValueError(f"law 'softclip': bound must be inside (0, 1), got {values['bound']}")
        if name == "clip" and values["lo"] >= values["hi"]:
            raise ValueError(f"law 'clip': lo must be < hi, got lo={values['lo']}, hi={values['hi']}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parameters", tuple(values.items()))
        object.__setattr__(self, "code", NAMES.index(name))
        numbers = list(values.values()) + [0.0] * (3 - len(values))
        if name == "softclip":
            numbers[2] = 1.0 / abs(math.log(numbers[0]))
        object.__setattr__(self, "numbers", numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.name, self.parameters)

    def __repr__(self) -> str:
        inside = ", ".join([repr(self.name)] + [f"{key}={value:g}" for key, value in self.parameters])
        return f"ScaleLaw({inside})"

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma, log sigma) in plain PyTorch: the truth for every backend; log sigma is worked out from u."""
        p = dict(self.parameters)
        if self.name == "softplus":
            v = u + p["offset"]
            sigma = F.softplus(v) + p["floor"]
            return sigma, sigma.log() if p["floor"] > 0 else _log_softplus(v)
        if self.name == "sigmoid":
            v = u + p["offset"]
            sigma = torch.sigmoid(v) + p["floor"]
            return sigma, sigma.log() if p["floor"] > 0 else F.logsigmoid(v)
        if self.name == "unit":
            return torch.ones_like(u), torch.zeros_like(u)
        if self.name == "exp":
            s = p["gain"] * u
        elif self.name == "tanh":
            s = p["bound"] * torch.tanh(u / p["bound"])
        elif self.name == "atan":
            s = p["bound"] * _ATAN_FACTOR * torch.atan(u / p["bound"])
        elif self.name == "softclip":
            s = u / (1 + (u / math.log(p["bound"])).abs())
        else:
            s = u.clamp(p["lo"], p["hi"])
            if p["pass_gradient"]:
                # Adds nothing but the derivative 1; an infinity would add infinity - infinity.
                v = torch.where(u.isfinite(), u, 0.0)
                s = s.detach() + (v - v.detach())
        return s.exp(), s

    def slope(self, u: Tensor) -> Tensor:
        """d log sigma / du."""
        p = dict(self.parameters)
        if self.name == "exp":
            return torch.full_like(u, p["gain"])
        if self.name == "unit":
            return torch.zeros_like(u)
        if self.name == "softplus":
            v = u + p["offset"]
            if p["floor"] > 0:
                return torch.sigmoid(v) / (F.softplus(v) + p["floor"])
            return (F.logsigmoid(v) - _log_softplus(v)).exp()
        if self.name == "sigmoid":
            v = u + p["offset"]
            complement = torch.sigmoid(-v)
            return torch.sigmoid(v) * complement / (torch.sigmoid(v) + p["floor"]) if p["floor"] > 0 else complement
        if self.name == "tanh":
            return 1 - torch.tanh(u / p["bound"]) ** 2
        if self.name == "atan":
            return _ATAN_FACTOR / (1 + (u / p["bound"]) ** 2)
        if self.name == "softclip":
            return (1 + (u / math.log(p["bound"])).abs()) ** -2
        inside = (u >= p["lo"]) & (u <= p["hi"])
        return torch.where(inside, 1.0, p["pass_gradient"]).to(u)


def _rebuild(name: str, parameters: tuple[tuple[str, float], ...]) -> ScaleLaw:
    return ScaleLaw(name, **dict(parameters))


def _log_softplus(v: Tensor) -> Tensor:
    # log log(1 + e^v) -> v for v -> -inf; below -37 that is exact in float64, and the other branch must not
    # see it.
    low = v < -37
    return torch.where(low, v, F.softplus(torch.where(low, torch.zeros_like(v), v)).log())


def as_law(law: str | ScaleLaw) -> ScaleLaw:
    """A ScaleLaw as it is, or the law of that name with its default parameters."""
    if isinstance(law, ScaleLaw):
        return law
    if not isinstance(law, str):
        raise TypeError(f"law must be a name or a ScaleLaw, got {type(law).__name__}")
    return _DEFAULT_LAWS.get(law) or ScaleLaw(law)


_DEFAULT_LAWS = {name: ScaleLaw(name) for name in NAMES}


def law_of_numbers(code: int, numbers: list[float]) -> ScaleLaw:
    """The law whose `code` and `numbers` these are: how the reference reads an operator's arguments."""
    name = NAMES[code]
    return ScaleLaw(name, **dict(zip(_DEFAULTS[name], numbers, strict=False)))
