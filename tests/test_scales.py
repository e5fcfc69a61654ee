"""The scale laws in plain PyTorch, the truth of every backend, held against their formulas."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowkernels import testing
from flowkernels.scales import FORMS, NAMES, ScaleLaw, as_law, law_of_numbers

FORMULAS: dict[str, tuple[ScaleLaw, Callable[[Tensor], Tensor]]] = {
    "exp": (ScaleLaw("exp", gain=0.5), lambda u: (0.5 * u).exp()),
    "softplus": (ScaleLaw("softplus", offset=0.3, floor=1e-2), lambda u: F.softplus(u + 0.3) + 1e-2),
    "softplus0": (ScaleLaw("softplus", floor=0.0), F.softplus),
    "sigmoid": (ScaleLaw("sigmoid"), lambda u: torch.sigmoid(u + 2) + 1e-3),
    "sigmoid0": (ScaleLaw("sigmoid", floor=0.0), lambda u: torch.sigmoid(u + 2)),
    "tanh": (ScaleLaw("tanh", bound=1.5), lambda u: (1.5 * torch.tanh(u / 1.5)).exp()),
    "atan": (ScaleLaw("atan"), lambda u: (2 * 0.636 * torch.atan(u / 2)).exp()),
    "softclip": (ScaleLaw("softclip"), lambda u: (u / (1 + (u / math.log(1e-3)).abs())).exp()),
    "clip": (ScaleLaw("clip", pass_gradient=0.0), lambda u: u.clamp(-5, 3).exp()),
    "unit": (ScaleLaw("unit"), torch.ones_like),
}
U = torch.linspace(-12, 12, 97, dtype=torch.float64)
every_law = pytest.mark.parametrize(("law", "formula"), FORMULAS.values(), ids=FORMULAS)


@every_law
def test_sigma_and_its_logarithm(law: ScaleLaw, formula: Callable[[Tensor], Tensor]) -> None:
    sigma, log_sigma = law(U)
    torch.testing.assert_close(sigma, formula(U), rtol=1e-14, atol=0)
    torch.testing.assert_close(log_sigma, formula(U).log(), rtol=1e-10, atol=1e-14)


@every_law
def test_slope_is_the_derivative_of_log_sigma(law: ScaleLaw, formula: Callable[[Tensor], Tensor]) -> None:
    u = U[(U - 3).abs() > 1e-9].requires_grad_()
    log_sigma = law(u)[1]
    expected = torch.zeros_like(u)
    if log_sigma.requires_grad:
        (expected,) = torch.autograd.grad(log_sigma.sum(), u)
    torch.testing.assert_close(law.slope(u.detach()), expected, rtol=1e-10, atol=1e-12)


@every_law
def test_second_derivatives(law: ScaleLaw, formula: Callable[[Tensor], Tensor]) -> None:
    # Times and plus u, so that the unit law depends on it too.
    testing.check_gradients(lambda u: (law(u)[0] * u, law(u)[1] + u), [U[::13]], second=True)


def test_log_sigma_does_not_come_from_a_rounded_sigma() -> None:
    u = torch.tensor([-200.0, -1000.0], dtype=torch.float32)
    assert ScaleLaw("exp")(u)[1].tolist() == [-200.0, -1000.0]
    assert ScaleLaw("softplus", floor=0.0)(u)[1].tolist() == [-200.0, -1000.0]
    assert ScaleLaw("sigmoid", floor=0.0)(u)[1].tolist() == [-198.0, -998.0]


def test_passed_gradient_of_the_clip_law() -> None:
    u = torch.tensor([-9.0, 0.0, 9.0, math.inf, -math.inf], dtype=torch.float64, requires_grad=True)
    _, s = ScaleLaw("clip")(u)
    assert s.tolist() == [-5.0, 0.0, 3.0, 3.0, -5.0]
    assert torch.autograd.grad(s[:3].sum(), u)[0].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    stopped = ScaleLaw("clip", pass_gradient=0.0)
    assert stopped.slope(u).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_laws_are_values(name: str) -> None:
    law = ScaleLaw(name)
    assert law == as_law(name) == as_law(law) == copy.deepcopy(law) == pickle.loads(pickle.dumps(law))
    assert hash(law) == hash(ScaleLaw(name))
    assert repr(law).startswith(f"ScaleLaw('{name}'")
    assert NAMES[law.code] == name
    assert len(law.numbers) == 3
    assert law_of_numbers(law.code, law.numbers) == law
    assert pickle.loads(pickle.dumps(law)).numbers == law.numbers
    with pytest.raises(AttributeError):
        law.name = "exp"  # type: ignore[misc]


def test_forms() -> None:
    assert FORMS == ("scale_shift", "shift_scale", "gate")


@given(st.floats(-30, 30), st.sampled_from(NAMES))
def test_sigma_is_positive_and_agrees_with_its_logarithm(u: float, name: str) -> None:
    sigma, log_sigma = ScaleLaw(name)(torch.tensor(u, dtype=torch.float64))
    assert float(sigma) > 0
    assert math.isclose(math.log(float(sigma)), float(log_sigma), rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "law must be one of exp, .* got 'log'", lambda: ScaleLaw("log")),
        (
            ValueError,
            "law 'exp' has no parameter 'floor'; its parameters: gain",
            lambda: ScaleLaw("exp", floor=1),
        ),
        (
            ValueError,
            "law 'unit' has no parameter 'gain'; its parameters: none",
            lambda: ScaleLaw("unit", gain=1),
        ),
        (ValueError, "law 'exp': gain must be finite, got nan", lambda: ScaleLaw("exp", gain=math.nan)),
        (ValueError, "law 'softplus': floor must be >= 0, got -1", lambda: ScaleLaw("softplus", floor=-1)),
        (ValueError, "law 'tanh': bound must be > 0, got 0", lambda: ScaleLaw("tanh", bound=0)),
        (ValueError, r"bound must be inside \(0, 1\), got 1\.0", lambda: ScaleLaw("softclip", bound=1)),
        (ValueError, "lo must be < hi, got lo=3.*hi=3", lambda: ScaleLaw("clip", lo=3)),
        (TypeError, "law must be a name or a ScaleLaw, got NoneType", lambda: as_law(None)),  # type: ignore[arg-type]
    ],
)
def test_bad_laws(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()
