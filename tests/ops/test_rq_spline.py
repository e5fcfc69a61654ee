"""rq_spline: all parametrisations, both formulas and directions, at and beyond the bounds, bins of minimum width."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowkernels import testing, use_backend
from flowkernels.ops import rq_spline
from flowkernels.ops.rq_spline.autograd import backward_op, forward_op
from flowkernels.transforms import LRSpline, RQSpline, Spline, identity_parameters, spline_of_numbers

SPLINES = [RQSpline(style, bins) for style, bins in itertools.product(("nflows", "zuko"), (2, 3, 8, 64))]
SPLINES.append(RQSpline("nflows", 10, bound=1.5, min_width=0.05, min_height=0.02, min_slope=0.1, logit_scale=0.3))
SPLINES.append(RQSpline("zuko", 5, bound=2.0, min_slope=1e-2))
SPLINES.append(RQSpline("pyro", 6, min_slope=0.2))
SPLINES += [LRSpline(2), LRSpline(8), LRSpline(64)]
SPLINES.append(LRSpline(10, bound=1.5, min_width=0.05, min_height=0.02, min_slope=0.1, min_lambda=0.2))
MAKE: dict[str, Callable[[int], Spline]] = {
    "nflows": lambda bins: RQSpline("nflows", bins),
    "zuko": lambda bins: RQSpline("zuko", bins),
    "pyro": lambda bins: RQSpline("pyro", bins),
    "linear": LRSpline,
}
every_spline = pytest.mark.parametrize("spline", SPLINES, ids=str)
every_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def inputs(
    shape: tuple[int, ...],
    spline: Spline,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    spread: float = 1.0,
) -> list[Tensor]:
    """x, of which a fair part lies outside the bounds, parameters, and a running log-det."""
    running = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        testing.random_tensor(shape, dtype, layout=layout, spread=0.7 * spline.bound),
        testing.random_tensor((*shape, spline.params_per_feature), dtype, layout=layout, seed=1, spread=spread),
        testing.random_tensor(shape[:-1], running, layout=layout, seed=2),
    ]


def bound(spline: Spline, inverse: bool = False) -> testing.Call:
    def call(x: Tensor, parameters: Tensor, logdet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rq_spline(x, parameters, spline=spline, inverse=inverse, logdet=logdet)

    return call


# ---- values and gradients ----------------------------------------------------------------------


@every_direction
@every_spline
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_values_and_gradients(spline: Spline, inverse: bool, dtype: torch.dtype) -> None:
    # Errors have a heavy tail: a narrow bin or a steep slope magnifies roundings. It takes some thousand elements until
    # plain PyTorch has met its own worst, and the rule compares the worst ones.
    x, theta, running = inputs((129, 31), spline, dtype)
    # Next to a knot rounding decides about the bin, and a slope of the other bin gets a gradient of exactly 0 or not.
    knots = spline.knots(theta.double())[1 if inverse else 0]
    near = ((x.double()[..., None] - knots).abs() < 1e-5 * spline.bound).any(-1)
    x = torch.where(near, torch.full_like(x, 2 * spline.bound), x)
    testing.check_against_reference(bound(spline, inverse), [x, theta, running])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", testing.SHAPES.values(), ids=testing.SHAPES)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str) -> None:
    for spline in (RQSpline("nflows", 4), RQSpline("zuko", 2), LRSpline(3)):
        testing.check_against_reference(bound(spline), inputs(shape, spline, torch.float32, layout))
        testing.check_against_reference(bound(spline, True), inputs(shape, spline, torch.float64, layout)[:2])


def test_parameters_may_broadcast() -> None:
    spline = RQSpline(bins=4)
    x, _, _ = inputs((6, 5), spline)
    for shape in ((11,), (5, 11), (6, 1, 11)):
        theta = testing.random_tensor(shape, torch.float64)
        testing.check_against_reference(bound(spline), [x, theta])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 20),
    features=st.integers(1, 20),
    bins=st.integers(2, 64),
    make=st.sampled_from(list(MAKE.values())),
    inverse=st.booleans(),
    layout=st.sampled_from(testing.LAYOUTS),
)
def test_any_shape(rows: int, features: int, bins: int, make: Any, inverse: bool, layout: str) -> None:
    """Every element is read from and written to its place; how exactly is judged above, where there are enough of
    them."""
    spline = make(bins)
    x, theta, running = (t.requires_grad_() for t in inputs((rows, features), spline, torch.float64, layout))

    def run() -> list[Tensor]:
        y, logdet = bound(spline, inverse)(x, theta, running)
        return [y, logdet, *torch.autograd.grad((y * y).sum() + logdet.sum(), (x, theta, running))]

    with testing.poisoned():
        ours = run()
    with use_backend("reference"):
        expected = run()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@every_direction
@pytest.mark.parametrize("spline", [RQSpline("nflows", 3), RQSpline("zuko", 4), LRSpline(3)], ids=str)
def test_finite_differences(spline: Spline, inverse: bool) -> None:
    testing.check_gradients(bound(spline, inverse), inputs((3, 2), spline), second=True)


# ---- the laws of a flow ------------------------------------------------------------------------


@every_spline
def test_laws(spline: Spline) -> None:
    x, theta, _ = inputs((6, 5), spline)
    testing.check_flow_laws(lambda t: bound(spline)(t, theta), lambda t: bound(spline, True)(t, theta), x)


def edges(spline: Spline) -> Tensor:
    """(1, n) values at, next to and beyond the bounds."""
    b = spline.bound
    near = [math.nextafter(side, to) for side in (-b, b) for to in (-9e9, 9e9)]
    return torch.tensor([[-b, b, *near, -1.5 * b, 1.5 * b, -1e6, 1e6, 0.0, -0.0]], dtype=torch.float64)


@every_direction
@every_spline
def test_at_and_beyond_the_bounds(spline: Spline, inverse: bool, backend: str) -> None:
    x = edges(spline)
    theta = testing.random_tensor((*x.shape, spline.params_per_feature), torch.float64)
    y, logdet = bound(spline, inverse)(x, theta)
    back, logdet_back = bound(spline, not inverse)(y, theta)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-9, atol=1e-9)
    outside = x.abs() > spline.bound
    assert torch.equal(y[outside], x[outside])
    assert (y[~outside].abs() <= math.nextafter(spline.bound, math.inf)).all()
    torch.testing.assert_close(y[0, :2], x[0, :2], rtol=1e-14, atol=0)


@every_direction
@every_spline
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_beyond_the_bounds(spline: Spline, inverse: bool, dtype: torch.dtype, backend: str) -> None:
    b = spline.bound
    x = torch.tensor([[2 * b, -2 * b, math.inf, -math.inf, math.nan]], dtype=dtype).requires_grad_()
    theta = testing.random_tensor((1, 5, spline.params_per_feature), dtype).requires_grad_()
    y, logdet = bound(spline, inverse)(x, theta)
    grad_x, grad_theta = torch.autograd.grad((y.sum() + logdet.sum()), (x, theta))
    assert torch.equal(grad_x, torch.ones_like(x))
    assert torch.equal(grad_theta, torch.zeros_like(theta))
    assert torch.equal(logdet, torch.zeros_like(logdet))


@every_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("style", MAKE)
def test_extreme_parameters_stay_finite(style: str, dtype: torch.dtype, inverse: bool, backend: str) -> None:
    """Bins of minimum width and height, steep and flat slopes next to each other: discriminants that nflows
    rejects."""
    spline = MAKE[style](8)
    size = torch.tensor([0.0, 5.0, 30.0, 1e3, 1e4], dtype=dtype)
    theta = testing.random_tensor((5, 64, spline.params_per_feature), dtype).sign() * size[:, None, None]
    x = torch.linspace(-spline.bound, spline.bound, 64, dtype=dtype).expand(5, 64)
    x = x.clone().requires_grad_()
    theta.requires_grad_()
    y, logdet = bound(spline, inverse)(x, theta)
    assert y.isfinite().all()
    assert logdet.isfinite().all()
    assert (y.abs() <= spline.bound).all()
    for grad in torch.autograd.grad(y.sum() + logdet.sum(), (x, theta)):
        assert not grad.isnan().any()


@pytest.mark.parametrize("style", MAKE)
def test_bins_of_minimum_width(style: str) -> None:
    """One bin takes all the width, another all the height; the laws hold inside the smallest bin and at its knots."""
    spline = MAKE[style](6)
    theta = torch.zeros(spline.params_per_feature, dtype=torch.float64)
    theta[0] = theta[6 + 5] = 60.0
    xs, ys, _ = spline.knots(theta)
    middle = (xs[1:] + xs[:-1]) / 2
    x = torch.cat([xs[1:-1], middle])[None]
    both = (lambda t: bound(spline)(t, theta)), (lambda t: bound(spline, True)(t, theta))
    testing.check_flow_laws(*both, middle[None])
    testing.check_inverse(*both, x)
    testing.check_inverse(*reversed(both), torch.cat([ys[1:-1], (ys[1:] + ys[:-1]) / 2])[None])


@pytest.mark.parametrize("style", MAKE)
def test_it_is_increasing_and_meets_its_knots(style: str) -> None:
    spline = MAKE[style](8)
    theta = testing.random_tensor((spline.params_per_feature,), torch.float64, spread=2.0)
    xs, ys, slopes = spline.knots(theta)
    y, _ = bound(spline)(xs[None], theta)
    torch.testing.assert_close(y[0], ys, rtol=1e-12, atol=1e-12)
    grid = torch.linspace(-1.3 * spline.bound, 1.3 * spline.bound, 4001, dtype=torch.float64)[:, None]
    out, _ = bound(spline)(grid, theta)
    assert (out.diff(dim=0) > 0).all()
    at_knots = bound(spline)(xs[:, None], theta)[1]
    torch.testing.assert_close(at_knots.exp(), slopes, rtol=1e-11, atol=1e-11)


def test_the_pieces_of_a_linear_rational_bin_meet() -> None:
    """From both sides of lambda the value and the slope are the same, and each piece is a ratio of linear functions."""
    spline = LRSpline(5)
    theta = testing.random_tensor((spline.params_per_feature,), torch.float64, spread=1.5)
    xs, _, slopes = spline.knots(theta)
    at = spline.lambdas(theta)
    assert ((at > 0.025) & (at < 0.975)).all()
    assert slopes[0] == slopes[-1] == 1 - 1e-3
    middle = xs[:-1] + at * xs.diff()
    step = 1e-9
    (below, log_below), (above, log_above) = (bound(spline)((middle + h)[:, None], theta) for h in (-step, step))
    torch.testing.assert_close(above, below, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_above, log_below, rtol=0, atol=1e-6)
    for start, end in ((xs[:-1], middle), (middle, xs[1:])):
        # The cross-ratio of four points is what a ratio of linear functions leaves as it is.
        points = start[:, None] + (end - start)[:, None] * torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
        images = bound(spline)(points, theta)[0]
        torch.testing.assert_close(_cross_ratio(images), _cross_ratio(points), rtol=1e-8, atol=0)


def _cross_ratio(p: Tensor) -> Tensor:
    a, b, c, d = p.unbind(-1)
    return (a - c) * (b - d) / ((a - d) * (b - c))


@pytest.mark.parametrize("style", MAKE)
def test_training_starts_near_the_identity(style: str) -> None:
    spline = MAKE[style](6)
    x = torch.linspace(-spline.bound, spline.bound, 101, dtype=torch.float64)[:, None]
    y, _ = bound(spline)(x, identity_parameters(spline).double())
    torch.testing.assert_close(y, x, rtol=0, atol=2e-7 if spline.end_slope == 1 else 1e-3)


# ---- how PyTorch may call it -------------------------------------------------------------------


@every_direction
@pytest.mark.parametrize("spline", [RQSpline("zuko", 3), LRSpline(3)], ids=str)
def test_opcheck(spline: Spline, inverse: bool) -> None:
    x, theta, running = inputs((5, 4), spline)
    options = (spline.bins, spline.code, spline.numbers, inverse)
    testing.check_opcheck(forward_op, (x, theta, running, *options))
    testing.check_opcheck(backward_op, (x, running, x, theta, *options))


@every_direction
@pytest.mark.parametrize("spline", [RQSpline("nflows", 4), LRSpline(4)], ids=str)
def test_compile(spline: Spline, inverse: bool) -> None:
    testing.check_compile(bound(spline, inverse), inputs((7, 5), spline, torch.float32))


@every_direction
def test_vmap(inverse: bool) -> None:
    x = testing.random_tensor((3, 4, 2), torch.float64)
    for spline in (RQSpline("nflows", 3), LRSpline(3)):
        theta = testing.random_tensor((4, 2, spline.params_per_feature), torch.float64)
        testing.check_vmap(bound(spline, inverse), [x, theta], [0, None])


def test_determinism_and_threads() -> None:
    spline = RQSpline("nflows", 8)
    given = inputs((700, 33), spline, torch.float32)
    testing.check_deterministic(bound(spline), given)
    testing.check_threads(bound(spline, True), given)


def test_one_row_gives_the_bits_it_gives_among_others() -> None:
    spline = RQSpline("zuko", 5)
    x, theta, _ = inputs((37, 3), spline, torch.float32)
    y, logdet = bound(spline)(x, theta)
    for i in (0, 5, 36):
        one = bound(spline)(x[i : i + 1], theta[i : i + 1])
        testing.assert_same_bits(one, (y[i : i + 1], logdet[i : i + 1]))


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parameters": torch.zeros(4, 3, 22)}, ValueError, r"parameters must have 23 numbers.*bins=8.*\(4, 3, 22\)"),
        ({"spline": LRSpline(5)}, ValueError, r"parameters must have 19 numbers.*4 bins - 1 with bins=5"),
        ({"parameters": torch.zeros(4, 2, 23)}, ValueError, r"parameters must broadcast to \(4, 3, 23\)"),
        ({"parameters": torch.zeros(4, 3, 23).double()}, TypeError, "parameters has dtype torch.float64"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x must be float64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"spline": "nflows"}, TypeError, "spline must be an RQSpline or an LRSpline, got str"),
        ({"logdet": torch.zeros(3)}, ValueError, r"logdet must have shape \(4,\)"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(4, 3),
        "parameters": torch.zeros(4, 3, 23),
        "spline": RQSpline(),
    } | change
    with pytest.raises(error, match=message):
        rq_spline(arguments.pop("x"), arguments.pop("parameters"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"style": "linear"}, ValueError, "style must be one of nflows, zuko, pyro, got 'linear'"),
        ({"bins": 1}, ValueError, "bins must be 2 to 64, got 1"),
        ({"bins": 65}, ValueError, "bins must be 2 to 64, got 65"),
        ({"bins": 8.0}, TypeError, "bins must be an int, got float"),
        ({"bound": 0.0}, ValueError, "bound must be positive"),
        ({"min_width": 0.2}, ValueError, "min_width must be below 1 / bins = 0.125"),
        ({"min_slope": 1.0}, ValueError, "min_slope must be below 1"),
        ({"style": "zuko", "min_width": 1e-3}, ValueError, "style 'zuko' has no parameter 'min_width'"),
        ({"style": "pyro", "logit_scale": 2.0}, ValueError, "style 'pyro' has no parameter 'logit_scale'"),
    ],
)
def test_bad_splines(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RQSpline(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logit_scale": 1.0}, "LRSpline has no parameter 'logit_scale'; its parameters: bound, .*, min_lambda"),
        ({"bins": 1}, "bins must be 2 to 64, got 1"),
        ({"min_lambda": 0.5}, "min_lambda must be below 0.5"),
        ({"min_lambda": 0.0}, "min_lambda must be positive"),
        ({"min_height": 0.2}, "min_height must be below 1 / bins = 0.125"),
    ],
)
def test_bad_linear_rational_splines(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LRSpline(**arguments)


@pytest.mark.parametrize("style", MAKE)
def test_a_spline_is_a_value(style: str) -> None:
    spline = MAKE[style](5)
    assert pickle.loads(pickle.dumps(spline)) == spline == copy.deepcopy(spline) == eval(repr(spline))
    assert len({spline, MAKE[style](5), MAKE[style](6), RQSpline("nflows", 7)}) == 3
    assert len(spline.parameter_names) == len(set(spline.parameter_names)) == spline.params_per_feature
    assert repr(spline_of_numbers(spline.bins, spline.code, spline.numbers)) == repr(spline)


# ---- peers -------------------------------------------------------------------------------------


@pytest.mark.peers
@every_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parity_with_nflows(inverse: bool, dtype: torch.dtype) -> None:
    splines = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    x, theta, _ = inputs((64, 9), RQSpline(), torch.float64)
    spline = RQSpline("nflows", 8, bound=3.0, logit_scale=1 / math.sqrt(64))

    def peer(t: torch.dtype) -> tuple[Tensor, Tensor]:
        w, h, d = theta.to(t).split([8, 8, 7], -1)
        y, ld = splines.unconstrained_rational_quadratic_spline(
            x.to(t), w / math.sqrt(64), h / math.sqrt(64), d, inverse=inverse, tail_bound=3.0
        )
        return y, ld.sum(-1)

    ours = bound(spline, inverse)(x.to(dtype), theta.to(dtype))
    exact = peer(torch.float64)
    if dtype == torch.float64:
        # nflows moves its last knot by 1e-6 when it looks for the bin, never the values.
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    else:
        testing.assert_as_close_as_plain(ours, peer(dtype), exact, magnitude=[torch.tensor(3.0), torch.tensor(9.0)])


@pytest.mark.peers
@every_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parity_with_zuko(inverse: bool, dtype: torch.dtype) -> None:
    transforms = pytest.importorskip("zuko.transforms")
    x, theta, _ = inputs((64, 9), RQSpline("zuko"), torch.float64)

    def peer(t: torch.dtype) -> tuple[Tensor, Tensor]:
        transform = transforms.MonotonicRQSTransform(*theta.to(t).split([8, 8, 7], -1))
        if not inverse:
            y, ld = transform.call_and_ladj(x.to(t))
            return y, ld.sum(-1)
        y = transform.inv(x.to(t))
        return y, -transform.call_and_ladj(y)[1].sum(-1)

    ours = bound(RQSpline("zuko"), inverse)(x.to(dtype), theta.to(dtype))
    exact = peer(torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    else:
        testing.assert_as_close_as_plain(ours, peer(dtype), exact, magnitude=[torch.tensor(5.0), torch.tensor(9.0)])


@pytest.mark.peers
@every_direction
def test_parity_with_normflows(inverse: bool) -> None:
    splines = pytest.importorskip("normflows.utils.splines")
    x, theta, _ = inputs((64, 9), RQSpline(), torch.float64)
    w, h, d = theta.split([8, 8, 7], -1)
    y, ld = splines.unconstrained_rational_quadratic_spline(x, w, h, d, inverse=inverse, tail_bound=3.0)
    ours = bound(RQSpline(), inverse)(x, theta)
    torch.testing.assert_close(ours, (y, ld.sum(-1)), rtol=1e-10, atol=1e-10)


@pytest.mark.peers
@every_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spline", [RQSpline("pyro"), LRSpline()], ids=str)
def test_parity_with_pyro(spline: Spline, inverse: bool, dtype: torch.dtype) -> None:
    splines = pytest.importorskip("pyro.distributions.transforms.spline")
    x, theta, _ = inputs((64, 9), spline, torch.float64)

    def peer(t: torch.dtype) -> tuple[Tensor, Tensor]:
        k, rest = spline.bins, theta.to(t)
        w, h, d, u = rest.split([k, k, k - 1, rest.shape[-1] - 3 * k + 1], -1)
        lambdas = torch.sigmoid(u) if isinstance(spline, LRSpline) else None
        shares = torch.softmax(w, -1), torch.softmax(h, -1), torch.nn.functional.softplus(d), lambdas
        y, ld = splines._monotonic_rational_spline(x.to(t), *shares, inverse=inverse, bound=spline.bound)
        return y, ld.sum(-1)

    ours = bound(spline, inverse)(x.to(dtype), theta.to(dtype))
    exact = peer(torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    else:
        testing.assert_as_close_as_plain(ours, peer(dtype), exact, magnitude=[torch.tensor(3.0), torch.tensor(9.0)])
