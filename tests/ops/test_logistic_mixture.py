"""logistic_mixture: both directions, narrow components, components far apart, both tails."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowkernels import testing
from flowkernels.ops import logistic_mixture
from flowkernels.ops.logistic_mixture.autograd import backward_op, forward_op
from flowkernels.scales import NAMES

every_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def inputs(
    shape: tuple[int, ...], components: int, dtype: torch.dtype = torch.float64, layout: str = "contiguous"
) -> list[Tensor]:
    """x, parameters, and a running log-det. The scales keep every component's share above float's smallest number,
    below
    which the kernels' exponential is 0."""
    running = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        testing.random_tensor(shape, dtype, layout=layout, spread=1.5),
        testing.random_tensor((*shape, 3 * components + 2), dtype, layout=layout, seed=1, spread=0.5),
        testing.random_tensor(shape[:-1], running, layout=layout, seed=2),
    ]


def bound(inverse: bool = False, **options: Any) -> testing.Call:
    def call(x: Tensor, parameters: Tensor, logdet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return logistic_mixture(x, parameters, inverse=inverse, logdet=logdet, **options)

    return call


@every_direction
@pytest.mark.parametrize("components", [1, 2, 8, 64])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_values_and_gradients(components: int, inverse: bool, dtype: torch.dtype) -> None:
    testing.check_against_reference(bound(inverse), inputs((9, 5), components, dtype))


@every_direction
@pytest.mark.parametrize("law", NAMES)
def test_laws_of_scale(law: str, inverse: bool) -> None:
    testing.check_against_reference(bound(inverse, law=law), inputs((9, 5), 3, torch.float32))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", testing.SHAPES.values(), ids=testing.SHAPES)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str) -> None:
    testing.check_against_reference(bound(), inputs(shape, 2, torch.float32, layout))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 9), features=st.integers(1, 9), components=st.integers(1, 12), inverse=st.booleans())
def test_any_shape(rows: int, features: int, components: int, inverse: bool) -> None:
    testing.check_against_reference(bound(inverse), inputs((rows, features), components))


@every_direction
def test_finite_differences(inverse: bool) -> None:
    testing.check_gradients(bound(inverse), inputs((2, 2), 2), second=True)


def test_laws() -> None:
    x, theta, _ = inputs((4, 5), 4)
    testing.check_flow_laws(lambda t: bound()(t, theta), lambda t: bound(True)(t, theta), x)


def narrow(gap: float) -> Tensor:
    """Two components of scale e^-7, `gap` apart, and the smallest allowed scale asked to be smaller still."""
    return torch.tensor([0.3, -0.2, 0.5, -0.5, -gap / 2, gap / 2, -7.0, -9.0], dtype=torch.float64)


@pytest.mark.parametrize("gap", [0.0, 1e-3, 0.02])
def test_laws_with_narrow_components(gap: float) -> None:
    theta = narrow(gap)
    x = torch.linspace(-0.02, 0.02, 7, dtype=torch.float64)[None]
    testing.check_flow_laws(lambda t: bound()(t, theta), lambda t: bound(True)(t, theta), x)


@pytest.mark.parametrize("gap", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_components_far_apart(gap: float, dtype: torch.dtype, backend: str) -> None:
    """Between them the transform is flat beyond all precision; every value still has an inverse that maps back to
    it."""
    theta = narrow(gap).to(dtype)
    y = torch.linspace(-30, 30, 121, dtype=dtype)[:, None]
    x, _ = bound(True)(y, theta)
    assert x.isfinite().all()
    assert (x.diff(dim=0) >= 0).all()
    again, _ = bound()(x, theta)
    # One rounding of x moves y by the slope times it: e^7 roundings near a component.
    allowed = 4 * torch.finfo(dtype).eps * (1 + x.abs()) * 1100 + 64 * torch.finfo(dtype).eps * (1 + y.abs())
    assert ((again - y).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tails_are_exact(dtype: torch.dtype, backend: str) -> None:
    """Far out the logit of the mixture is the logit of its widest component plus the logarithm of its weight."""
    theta = torch.tensor([0.0, 0.0, 0.0, 0.0, -1.0, 1.0, 0.0, -1.0], dtype=dtype)
    x = torch.tensor([[1e4, -1e4, 1e6, -1e6]], dtype=dtype)
    y, _ = bound(law="exp")(x, theta)
    expected = x.double() + 1.0 + math.log(2.0) * x.double().sign()
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    back, _ = bound(True, law="exp")(y, theta)
    torch.testing.assert_close(back, x, rtol=4 * torch.finfo(dtype).eps, atol=0)


@every_direction
def test_extremes_are_never_nan(inverse: bool, backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[-1e30, -800.0, 0.0, 800.0, 1e30]], dtype=dtype).requires_grad_()
        theta = testing.random_tensor((1, 5, 11), dtype).requires_grad_()
        y, logdet = bound(inverse)(x, theta)
        assert not y.isnan().any()
        assert not logdet.isnan().any()


def test_a_scale_below_the_least_gets_no_gradient(backend: str) -> None:
    theta = narrow(0.01).requires_grad_()
    y, logdet = bound()(torch.tensor([[0.001]], dtype=torch.float64), theta)
    (grad,) = torch.autograd.grad(y.sum() + logdet.sum(), theta)
    assert grad[7] == 0
    assert grad[6] != 0


# ---- how PyTorch may call it -------------------------------------------------------------------


@every_direction
def test_opcheck(inverse: bool) -> None:
    x, theta, running = inputs((5, 4), 2)
    options = (-7.0, 3, [2.0, 0.0, 0.0], inverse)
    testing.check_opcheck(forward_op, (x, theta, running, *options))
    testing.check_opcheck(backward_op, (x, running, x, theta, *options))


@every_direction
def test_compile(inverse: bool) -> None:
    testing.check_compile(bound(inverse), inputs((7, 5), 3, torch.float32))


@every_direction
def test_vmap(inverse: bool) -> None:
    x = testing.random_tensor((3, 4, 2), torch.float64)
    theta = testing.random_tensor((4, 2, 8), torch.float64)
    testing.check_vmap(bound(inverse), [x, theta], [0, None])


def test_determinism_and_threads() -> None:
    given = inputs((300, 17), 4, torch.float32)
    testing.check_deterministic(bound(), given)
    testing.check_threads(bound(True), given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parameters": torch.zeros(4, 3, 9)}, ValueError, r"parameters must have 3 K \+ 2 numbers.*\(4, 3, 9\)"),
        ({"parameters": torch.zeros(4, 3, 3 * 65 + 2)}, ValueError, "K = 1 to 64"),
        ({"parameters": torch.zeros(4, 2, 8)}, ValueError, r"parameters must broadcast to \(4, 3, 8\)"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x must be float64"),
        ({"law": "cubic"}, ValueError, "law must be one of"),
        ({"logdet": torch.zeros(3)}, ValueError, r"logdet must have shape \(4,\)"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(4, 3), "parameters": torch.zeros(4, 3, 8)} | change
    with pytest.raises(error, match=message):
        logistic_mixture(arguments.pop("x"), arguments.pop("parameters"), **arguments)
