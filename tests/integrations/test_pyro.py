"""Accelerated Pyro transforms give Pyro's numbers, and cache what Pyro caches."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import flowkernels as fk
from flowkernels.integrations import describe
from tests.integrations.harness import (
    assert_close_as_peer,
    assert_same,
    assert_same_error,
    counting,
    life,
    outcome,
    randomise,
)

pytest.importorskip("pyro")
import pyro.distributions as dist
from pyro.distributions import transforms
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Pyro's inverse starts from zeros of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(model: Any, inputs: Any) -> Any:
    x, z, *context = inputs
    t = model.condition(*context) if context else model
    y = t(x)
    up = t.log_abs_det_jacobian(x, y)
    w = t.inv(z)
    return y, up, w, t.log_abs_det_jacobian(w, z), t.log_abs_det_jacobian(x, y)  # the last is no longer cached


def accelerated(model: nn.Module) -> bool:
    return any(entry.what.startswith("accelerated") for entry in describe(model))


def transform(
    seed: int = 0, features: int = 5, hidden: tuple[int, ...] = (16, 12), context: int = 0, **keywords: Any
) -> Any:
    torch.manual_seed(seed)
    nonlinearity = keywords.pop("nonlinearity", nn.ReLU())
    if context:
        net = ConditionalAutoRegressiveNN(features, context, list(hidden), nonlinearity=nonlinearity)
        made = transforms.ConditionalAffineAutoregressive(net, **keywords)
    else:
        net = AutoRegressiveNN(features, list(hidden), nonlinearity=nonlinearity)
        made = transforms.AffineAutoregressive(net, **keywords)
    # The same order in every copy that a test makes: Pyro draws it at random and keeps it in a buffer.
    randomise(made, seed)
    return made


def spline(
    seed: int = 0,
    features: int = 5,
    hidden: tuple[int, ...] = (16, 12),
    context: int = 0,
    order: str = "linear",
    count_bins: int = 4,
    bound: float = 2.0,
    nonlinearity: Any = None,
) -> Any:
    torch.manual_seed(seed)
    dims = [count_bins, count_bins, count_bins - 1] + [count_bins] * (order == "linear")
    keywords: dict[str, Any] = {"param_dims": dims, "nonlinearity": nonlinearity or nn.ReLU()}
    options: dict[str, Any] = {"count_bins": count_bins, "bound": bound, "order": order}
    if context:
        net = ConditionalAutoRegressiveNN(features, context, list(hidden), **keywords)
        made = transforms.ConditionalSplineAutoregressive(features, net, **options)
    else:
        net = AutoRegressiveNN(features, list(hidden), **keywords)
        made = transforms.SplineAutoregressive(features, net, **options)
    randomise(made, seed)
    return made


every_order = pytest.mark.parametrize("order", ["linear", "quadratic"])


@pytest.mark.parametrize("seed", range(16))
def test_random_configurations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random(seed)
    features = r.choice([2, 3, 7, 12])
    keywords = {
        "features": features,
        "hidden": tuple(r.choice([features, 17, 30]) for _ in range(r.choice([1, 2, 3]))),
        "context": r.choice([0, 0, 1, 4]),
        "stable": seed % 2 == 0,
        "nonlinearity": r.choice([nn.ReLU(), nn.Tanh(), nn.ELU(), nn.SiLU()]),
        **({"sigmoid_bias": 1.0} if seed % 4 == 0 else {"log_scale_min_clip": -0.3, "log_scale_max_clip": 0.2}),
    }
    check(transform(seed, **keywords), r, keywords, monkeypatch)


@every_order
@pytest.mark.parametrize("seed", range(8))
def test_random_splines(order: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random(seed)
    features = r.choice([2, 3, 7, 12])
    keywords = {
        "features": features,
        "hidden": tuple(r.choice([features, 17, 30]) for _ in range(r.choice([1, 2, 3]))),
        "context": r.choice([0, 0, 1, 4]),
        "order": order,
        "count_bins": r.choice([2, 5, 8, features]),
        "bound": r.choice([1.0, 3.0]),  # a third of all values, or next to none, lie outside
        "nonlinearity": r.choice([nn.ReLU(), nn.Tanh(), nn.ELU(), nn.SiLU()]),
    }
    check(spline(seed, **keywords), r, keywords, monkeypatch)


def check(peer: Any, r: random.Random, keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    features = keywords["features"]
    fast = fk.accelerate(copy.deepcopy(peer))
    assert accelerated(fast)
    batch = r.choice([(), (3,), (2, 3)])
    inputs = [torch.randn(*batch, features), torch.randn(*batch, features)]
    if keywords["context"]:
        inputs.append(torch.randn(*r.choice([(), batch]), keywords["context"]))
    with counting(monkeypatch) as counts:
        got = outcome(fast, both, inputs)
    assert counts == {"forward": 2, "inverse": 1}
    assert_same(got, outcome(peer, both, inputs), str(keywords))
    torch.set_default_dtype(torch.float32)
    x = torch.randn(64, features)
    c = [torch.randn(64, keywords["context"])] if keywords["context"] else []
    with torch.no_grad():
        t = peer.condition(c[0].double()) if c else peer
        y = t(x.double()).float()
    assert_close_as_peer(peer.float(), fast.float(), _default_dtype_of_input(both), [x, y, *c])


def _default_dtype_of_input(call: Any) -> Any:
    def run(model: Any, inputs: Any) -> Any:
        torch.set_default_dtype(inputs[0].dtype)
        return call(model, inputs)

    return run


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("context", [0, 3])
def test_life(stable: bool, context: int) -> None:
    inputs = [torch.randn(6, 5), torch.randn(6, 5)] + ([torch.randn(6, context)] if context else [])
    life(lambda: transform(stable=stable, context=context), both, inputs, accelerated)


@every_order
@pytest.mark.parametrize("context", [0, 3])
def test_life_of_a_spline(order: str, context: int) -> None:
    inputs = [torch.randn(6, 5), torch.randn(6, 5)] + ([torch.randn(6, context)] if context else [])
    life(lambda: spline(order=order, context=context), both, inputs, accelerated)


MADE = {
    "plain": lambda seed: transform(seed),
    "stable": lambda seed: transform(seed, stable=True),
    "linear": lambda seed: spline(seed),
    "quadratic": lambda seed: spline(seed, order="quadratic"),
}


@pytest.mark.parametrize("kind", MADE)
def test_distribution(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = nn.ModuleList([MADE[kind](seed) for seed in range(3)])
    fast_parts = fk.accelerate(copy.deepcopy(parts))
    base = dist.Normal(torch.zeros(5), torch.ones(5)).to_event(1)
    x = torch.randn(4, 5)

    def use(m: Any, inputs: Any) -> Any:
        flow = dist.TransformedDistribution(base, list(m))
        torch.manual_seed(1)
        sample = flow.rsample((4,))
        return sample, flow.log_prob(sample), flow.log_prob(*inputs)

    with counting(monkeypatch) as counts:
        got = outcome(fast_parts, use, [x])
    assert counts == {"forward": 3, "inverse": 3}, "the density of one's own samples comes from the cache"
    assert_same(got, outcome(parts, use, [x]))


@pytest.mark.parametrize("make", [transform, spline])
def test_conditional_distribution(make: Any) -> None:
    peer = make(context=3)
    fast = fk.accelerate(copy.deepcopy(peer))
    base = dist.Normal(torch.zeros(5), torch.ones(5)).to_event(1)
    c = torch.randn(3)

    def use(m: Any, inputs: Any) -> Any:
        flow = dist.ConditionalTransformedDistribution(base, [m]).condition(*inputs)
        torch.manual_seed(1)
        sample = flow.rsample((4,))
        return sample, flow.log_prob(sample), flow.log_prob(sample.detach().clone())

    assert_same(outcome(fast, use, [c]), outcome(peer, use, [c]))


def test_left_and_odd_input() -> None:
    net = AutoRegressiveNN(5, [16], skip_connections=True)
    peer = transforms.AffineAutoregressive(net)
    assert describe(peer)[0].what == "left: skip connections from input to output"
    peer = transforms.AffineAutoregressive(AutoRegressiveNN(5, [16], nonlinearity=nn.Softsign()))
    assert describe(peer)[0].what == "left: no kernel for the activation Softsign"
    peer = transform()
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(4, 5)
    for args in [(x[:, :3],), (x.float(),), ("x",), (), (x, x)]:
        assert_same_error(peer, fast, lambda m, args=args: [m(*args)])
    assert_same_error(peer, fast, lambda m: [m.inv(x[:, :3])])
    peer = transform(context=3)
    fast = fk.accelerate(copy.deepcopy(peer))
    for c in (torch.randn(2), torch.randn(3, 3), torch.randn(4, 3).float(), None, "c"):
        assert_same_error(peer, fast, lambda m, c=c: [m.condition(c)(x)])
        assert_same_error(peer, fast, lambda m, c=c: [m.condition(c).inv(x)])


def test_splines_beyond_the_bounds() -> None:
    """Values at, next to and beyond the bounds, one by one and among others; Pyro's gradients there are finite too."""
    b = 2.0
    values = torch.tensor([-b, b, -b - 1e-9, b + 1e-9, -9.0, 9.0, 50.0, 0.0])
    x = values[torch.randint(len(values), (40, 5), generator=torch.Generator().manual_seed(0))]
    for order in ("linear", "quadratic"):
        peer = spline(order=order, bound=b)
        fast = fk.accelerate(copy.deepcopy(peer))
        for call in (lambda m, given: [m(*given)], lambda m, given: [m.inv(*given)]):
            got = outcome(fast, call, [x])
            assert_same(got, outcome(peer, call, [x]), order)
            assert all(t.isfinite().all() for t in got)


def test_splines_left_and_odd_input() -> None:
    def reason(module: nn.Module) -> str:
        return str(describe(module)[0].what)

    def made(dims: list[int], features: int = 5, **options: Any) -> Any:
        return transforms.SplineAutoregressive(features, AutoRegressiveNN(5, [16], param_dims=dims), **options)

    assert reason(made([4, 4, 3, 4], count_bins=4)).startswith("can be accelerated: call (one pass) by maf_forward")
    assert reason(made([4, 4, 3], count_bins=4)) == "left: param_dims are [4, 4, 3], not [4, 4, 3, 4]"
    assert "not [4, 4, 3]" in reason(made([4, 4, 3, 4], count_bins=4, order="quadratic"))
    assert "no kernel for a spline with order 'cubic'" in reason(made([4, 4, 3], count_bins=4, order="cubic"))
    assert "bins must be 2 to 64, got 65" in reason(made([65, 65, 64, 65], count_bins=65))
    assert "input_dim is 4, but its network has 5 features" in reason(made([4, 4, 3, 4], features=4, count_bins=4))
    skip = AutoRegressiveNN(5, [16], param_dims=[4, 4, 3, 4], skip_connections=True)
    assert "skip connections" in reason(transforms.SplineAutoregressive(5, skip, count_bins=4))

    class Own(transforms.SplineAutoregressive):  # type: ignore[misc]
        def _inverse(self, y: Any) -> Any:
            return super()._inverse(y)

    assert "Own has its own _inverse" in reason(Own(5, AutoRegressiveNN(5, [16], param_dims=[4, 4, 3, 4]), 4))

    x = torch.randn(4, 5)
    for order in ("linear", "quadratic"):
        peer = spline(order=order)
        fast = fk.accelerate(copy.deepcopy(peer))
        for args in [(x[:, :3],), (x.float(),), ("x",), (), (x, x)]:
            assert_same_error(peer, fast, lambda m, args=args: [m(*args)])
        assert_same_error(peer, fast, lambda m: [m.inv(x[:, :3])])
        peer = spline(order=order, context=3)
        fast = fk.accelerate(copy.deepcopy(peer))
        for c in (torch.randn(2), torch.randn(3, 3), torch.randn(4, 3).float(), None, "c"):
            assert_same_error(peer, fast, lambda m, c=c: [m.condition(c)(x)])
            assert_same_error(peer, fast, lambda m, c=c: [m.condition(c).inv(x)])


@every_order
def test_a_spline_that_is_changed_later(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bound is read again; with a hook inside the network, or another spline than the network's, Pyro runs."""
    peer = spline(order=order)
    fast = fk.accelerate(copy.deepcopy(peer))
    x = [torch.randn(6, 5), torch.randn(6, 5)]
    for m in (peer, fast):
        m.spline.bound = 1.0
    with counting(monkeypatch) as counts:
        assert_same(outcome(fast, both, x), outcome(peer, both, x))
    assert counts == {"forward": 2, "inverse": 1}
    handle = fast.arn.layers[0].register_forward_hook(lambda *_: None)
    with counting(monkeypatch) as counts:
        assert_same(outcome(fast, both, x), outcome(peer, both, x))
    assert counts == {"forward": 0, "inverse": 0}
    handle.remove()

    peer = spline(order=order, context=3)
    fast = fk.accelerate(copy.deepcopy(peer))
    c = torch.randn(3)
    given = [m.condition(c) for m in (fast, peer)]
    for t in given:
        t.spline.bound = 0.5
    with counting(monkeypatch) as counts:
        assert_same([given[0](x[0])], [given[1](x[0])])
    assert counts == {"forward": 0, "inverse": 0}
