"""Couplings and splines of every library: the same numbers from the elementwise operators."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import flowkernels as fk
from flowkernels.integrations import describe
from tests.integrations.harness import assert_close_as_peer, assert_same, assert_same_error, life, outcome, randomise

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def accelerated(model: nn.Module) -> bool:
    return any(entry.what.startswith("accelerated") for entry in describe(model))


class Net(nn.Module):
    """A conditioner for vectors or images that takes a context or none."""

    def __init__(self, inputs: int, outputs: int, images: bool = False, context: int = 0) -> None:
        super().__init__()
        self.hidden_features = 16
        make = (lambda a, b: nn.Conv2d(a, b, 1)) if images else nn.Linear
        self.context = nn.Linear(context, 16) if context else None
        self.first, self.last = make(inputs, 16), make(16, outputs)

    def forward(self, x: Any, context: Any = None) -> Any:
        h = self.first(x)
        if self.context is not None and context is not None:
            h = h + self.context(context)
        return self.last(torch.tanh(h))


def nflows_call(m: Any, inputs: Any) -> Any:
    x, z, *context = inputs
    return (*m(x, *context), *m.inverse(z, *context))


def zuko_call(m: Any, inputs: Any) -> Any:
    x, z, *context = inputs
    t = m(*context)
    y = t(x)
    return (y, t.log_abs_det_jacobian(x, y), *t.call_and_ladj(x), t.inv(z), *t.inv.call_and_ladj(z))


def normflows_call(m: Any, inputs: Any) -> Any:
    x, z = inputs
    return (*m(x), *m.inverse(z))


def pyro_call(m: Any, inputs: Any) -> Any:
    x, z, *context = inputs
    t = m.condition(*context) if context else m
    y = t(x)
    up = t.log_abs_det_jacobian(x, y)
    w = t.inv(z)
    return y, up, w, t.log_abs_det_jacobian(w, z), t.log_abs_det_jacobian(x, y)


Case = tuple[Callable[[], Any], Callable[..., Any], list[tuple[int, ...]]]


def nflows_affine(images: bool = False, context: int = 0) -> Case:
    t = pytest.importorskip("nflows.transforms")
    shapes: list[tuple[int, ...]] = [(6, 5, 2, 3)] * 2 if images else [(6, 5)] * 2

    def make() -> Any:
        return t.AffineCouplingTransform(torch.tensor([1, 0, 1, 0, 1]), lambda a, b: Net(a, b, images, context))

    return make, nflows_call, shapes + ([(6, context)] if context else [])


def nflows_spline(kind: str, images: bool = False) -> Case:
    t = pytest.importorskip("nflows.transforms")
    shapes: list[tuple[int, ...]] = [(6, 5, 2, 3)] * 2 if images else [(6, 5)] * 2
    options: dict[str, Any] = {"num_bins": 6, "tails": "linear", "tail_bound": 1.5}

    def make() -> Any:
        if "autoregressive" in kind:
            # No kernel has the sine: then only the spline is replaced.
            act = {"activation": torch.sin} if "elements" in kind else {}
            return t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(5, 16, **options, **act)
        if kind == "both":
            options["apply_unconditional_transform"] = True
        return t.PiecewiseRationalQuadraticCouplingTransform(
            torch.tensor([1, 0, 1, 0, 0]), lambda a, b: Net(a, b, images), **options
        )

    return make, nflows_call, shapes


def zuko_coupling(spline: bool, context: int = 0) -> Case:
    zuko = pytest.importorskip("zuko")
    options: dict[str, Any] = {"hidden_features": (16,), "mask": torch.tensor([1, 0, 1, 0, 0])}
    if spline:
        options |= {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(6,), (6,), (5,)]}

    def make() -> Any:
        return zuko.flows.coupling.GeneralCouplingTransform(5, context, **options)

    return make, zuko_call, [(6, 5)] * 2 + ([(6, context)] if context else [])


def zuko_spline(context: int = 0, **options: Any) -> Case:
    zuko = pytest.importorskip("zuko")

    def make() -> Any:
        torch.manual_seed(0)
        return zuko.flows.NSF(
            5, context, bins=6, hidden_features=(16, 16), transforms=1, **options
        ).transform.transforms[0]

    return make, zuko_call, [(2, 3, 5)] * 2 + ([(2, 3, context)] if context else [])


def normflows_coupling(scale_map: str, images: bool = False) -> Case:
    nf = pytest.importorskip("normflows")

    def make() -> Any:
        return nf.flows.AffineCouplingBlock(Net(3, 4 if not images else 6, images), scale_map=scale_map)

    return make, normflows_call, [(6, 6, 2, 2)] * 2 if images else [(6, 5)] * 2


def normflows_spline(kind: str) -> Case:
    nf = pytest.importorskip("normflows")

    def make() -> Any:
        if kind == "coupling":  # the half that stays goes through splines of its own
            return nf.flows.CoupledRationalQuadraticSpline(5, 1, 16, num_bins=6, tail_bound=1.5)
        act = {"activation": nn.Softsign} if "elements" in kind else {}
        return nf.flows.AutoregressiveRationalQuadraticSpline(5, 1, 16, num_bins=6, tail_bound=1.5, **act)

    return make, normflows_call, [(6, 5)] * 2


def pyro_coupling(context: int = 0) -> Case:
    t = pytest.importorskip("pyro.distributions.transforms")

    def make() -> Any:
        if context:
            return t.conditional_affine_coupling(5, context, hidden_dims=[16], log_scale_min_clip=-0.2)
        return t.affine_coupling(5, hidden_dims=[16], log_scale_max_clip=0.1)

    return make, pyro_call, [(6, 5)] * 2 + ([(6, context)] if context else [])


CASES: dict[str, Callable[[], Case]] = {
    "nflows": nflows_affine,
    "nflows context": lambda: nflows_affine(context=3),
    "nflows images": lambda: nflows_affine(images=True),
    "nflows spline": lambda: nflows_spline("coupling"),
    "nflows spline images": lambda: nflows_spline("coupling", images=True),
    "nflows spline both halves": lambda: nflows_spline("both"),
    "nflows spline autoregressive": lambda: nflows_spline("autoregressive"),
    "nflows spline autoregressive elements": lambda: nflows_spline("autoregressive elements"),
    "zuko": lambda: zuko_coupling(False),
    "zuko context": lambda: zuko_coupling(False, 3),
    "zuko spline": lambda: zuko_coupling(True),
    "zuko spline context": lambda: zuko_coupling(True, 3),
    "zuko spline autoregressive": zuko_spline,
    "zuko spline autoregressive context": lambda: zuko_spline(2, slope=0.01),
    "zuko spline autoregressive elements": lambda: zuko_spline(2, activation=nn.Softsign),
    "zuko spline passes": lambda: zuko_spline(passes=2),
    "normflows exp": lambda: normflows_coupling("exp"),
    "normflows sigmoid": lambda: normflows_coupling("sigmoid"),
    "normflows sigmoid_inv": lambda: normflows_coupling("sigmoid_inv"),
    "normflows images": lambda: normflows_coupling("sigmoid", images=True),
    "normflows spline": lambda: normflows_spline("coupling"),
    "normflows spline autoregressive": lambda: normflows_spline("autoregressive"),
    "normflows spline autoregressive elements": lambda: normflows_spline("autoregressive elements"),
    "pyro": pyro_coupling,
    "pyro context": lambda: pyro_coupling(3),
}


@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name: str) -> None:
    make, call, shapes = CASES[name]()
    torch.manual_seed(1)
    inputs = [torch.randn(s) for s in shapes]
    life(lambda: _randomised(make()), call, inputs, accelerated)
    peer = _randomised(make())
    fast = fk.accelerate(copy.deepcopy(peer))
    assert_same(outcome(fast, call, inputs), outcome(peer, call, inputs))
    empty = [torch.randn(0, *s[1:]) for s in shapes]
    if name in ("nflows", "nflows context", "normflows exp"):  # the others refuse an empty batch
        assert_same(outcome(fast, call, empty), outcome(peer, call, empty))
    inputs = [torch.randn(64, *s[1:]).float() for s in shapes]
    if "pyro" not in name:
        assert_close_as_peer(peer.float(), fast.float(), call, inputs)


def _randomised(model: Any) -> Any:
    torch.manual_seed(0)
    randomise(model)
    return model


def test_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case reaches an operator, and goes without one under forward-mode derivatives."""
    from flowkernels.integrations import _common, _nsf, nflows, normflows, pyro, zuko

    calls: list[str] = []
    for module in (_common, _nsf, nflows, normflows, pyro, zuko):
        for name in ("affine_coupling", "rq_spline", "run_chain"):
            if hasattr(module, name):
                real = getattr(module, name)
                monkeypatch.setattr(
                    module, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1]
                )
    for name, case in CASES.items():
        make, call, shapes = case()
        fast = fk.accelerate(_randomised(make()))
        calls.clear()
        call(fast, [torch.randn(s) for s in shapes])
        assert calls, name
        whole = ("spline autoregressive" in name and "elements" not in name) or "passes" in name
        assert ("run_chain" in calls) == whole, name
        calls.clear()
        x, *others = [torch.randn(s) for s in shapes]
        torch.func.jvp(lambda v, others=others, call=call, fast=fast: call(fast, [v, *others])[0], (x,), (x,))
        assert not calls, name


def test_glow_block() -> None:
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)
    peer = nf.flows.GlowBlock(4, 8, init_zeros=False)
    x = torch.randn(3, 4, 2, 2)
    peer(x)  # ActNorm's first batch
    fast = fk.accelerate(copy.deepcopy(peer))
    assert sum(e.what.startswith("accelerated") for e in describe(fast)) == 1
    assert_same(outcome(fast, normflows_call, [x, x]), outcome(peer, normflows_call, [x, x]))


def test_what_stays() -> None:
    t = pytest.importorskip("nflows.transforms")
    additive = t.AdditiveCouplingTransform(torch.tensor([1, 0]), Net)
    assert describe(additive)[0].what == "left: its only operation is an addition: nothing to fuse"
    box = t.PiecewiseRationalQuadraticCouplingTransform(torch.tensor([1, 0]), Net, tails=None)
    assert describe(box)[0].what == "left: tails are None, not linear"
    nf = pytest.importorskip("normflows")
    circular = nf.flows.CircularAutoregressiveRationalQuadraticSpline(3, 1, 8, [0])
    assert "tails are ['circular', 'linear', 'linear']" in str(describe(circular))
    assert "nothing to fuse" in describe(nf.flows.AffineCoupling(Net(1, 1), scale=False))[0].what
    p = pytest.importorskip("pyro.distributions.transforms")
    assert describe(p.affine_coupling((4, 2), dim=-2))[0].what == "left: it splits along dimension -2, not the last one"


def test_nflows_warning_and_odd_input() -> None:
    t = pytest.importorskip("nflows.transforms")

    class Unscaled(Net):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            del self.hidden_features

    options = {"num_bins": 4, "tails": "linear"}
    peer = t.PiecewiseRationalQuadraticCouplingTransform(torch.tensor([1, 0, 1]), Unscaled, **options)
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match="Inputs to the softmax are not scaled down"):
        got = fast(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(got, peer(x))
    make, _, _ = nflows_affine()
    peer = make()
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(4, 5)
    for bad in (x[:, :3], x[0], x[:, :, None], x.float(), x.long(), "x", None):
        for name in ("forward", "inverse"):
            assert_same_error(peer, fast, lambda m, name=name, bad=bad: getattr(m, name)(bad))
