"""Accelerated zuko transforms give zuko's numbers."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import partial
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

zuko = pytest.importorskip("zuko")

pytestmark = pytest.mark.peers

MaskedAutoregressiveTransform = zuko.flows.autoregressive.MaskedAutoregressiveTransform
MonotonicAffineTransform = zuko.transforms.MonotonicAffineTransform


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(model: Any, inputs: Any) -> Any:
    x, z, *context = inputs
    t = model(*context)
    return (*t.call_and_ladj(x), t.inv(z))


def every_way(model: Any, inputs: Any) -> Any:
    x, *context = inputs
    t = model(*context)
    y = t(x)
    return (y, t.log_abs_det_jacobian(x, y), *t.call_and_ladj(x), t.inv(x), *t.inv.call_and_ladj(x), t.inv.inv(x))


def accelerated(model: nn.Module) -> bool:
    return any(entry.what.startswith("accelerated") for entry in describe(model))


def transform(seed: int = 0, **keywords: Any) -> Any:
    torch.manual_seed(seed)
    made = MaskedAutoregressiveTransform(**{"features": 5, "hidden_features": (16, 16), **keywords})
    randomise(made, seed)
    return made


def draw_adjacency(r: random.Random, features: int, context: int) -> torch.Tensor:
    order = torch.tensor(r.sample(range(features), features))
    graph = (order[:, None] > order) & (torch.rand(features, features) < 0.6)
    graph |= torch.eye(features, dtype=torch.bool)
    if not context or r.random() < 0.5:
        return graph
    return torch.cat([graph, torch.rand(features, context) < 0.7], dim=1)


@pytest.mark.parametrize("seed", range(24))
def test_random_configurations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    features, context = r.choice([2, 3, 5, 8, 13, 20]), r.choice([0, 0, 1, 4])
    width = r.choice([features + 1, 17, 40])
    keywords: dict[str, Any] = {
        "features": features,
        "context": context,
        "hidden_features": r.choice([(), (width,), (width, width), (width, 9, width)]),
        "activation": r.choice([None, nn.ELU, nn.Tanh, nn.SiLU, partial(nn.ReLU, inplace=True)]),
        "residual": r.random() < 0.4,
    }
    kind = seed % 4
    if kind == 0:
        keywords["order"] = torch.tensor(r.sample(range(features), features))
    elif kind == 1:
        keywords["passes"] = r.choice([2, 3])
    elif kind == 2:
        keywords["adjacency"] = draw_adjacency(r, features, context)
    else:
        keywords["univariate"] = partial(MonotonicAffineTransform, slope=0.1)
    try:
        peer = transform(seed, **keywords)
    except (ValueError, UnboundLocalError) as error:  # a graph without edges; residual without hidden layers
        pytest.skip(str(error))
    fast = fk.accelerate(copy.deepcopy(peer))
    assert accelerated(fast), describe(fast)
    batch = r.choice([(), (5,), (2, 3)])  # zuko refuses an empty one
    inputs = [torch.randn(*batch, features)]
    if context:
        inputs.append(torch.randn(*r.choice([(), batch]), context))
    with counting(monkeypatch) as counts:
        got = outcome(fast, every_way, inputs)
    assert counts == {"forward": 4, "inverse": 2}
    assert_same(got, outcome(peer, every_way, inputs), str(keywords))

    x, c = torch.randn(64, features), [torch.randn(64, context)] if context else []
    with torch.no_grad():
        z = peer(*c)(x)
    inputs = [t.float() for t in (x, z, *c)]
    assert_close_as_peer(peer.float(), fast.float(), both, inputs)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_life(context: int, residual: bool) -> None:
    inputs = [torch.randn(6, 5), torch.randn(6, 5)] + ([torch.randn(6, context)] if context else [])
    life(lambda: transform(context=context, residual=residual), both, inputs, accelerated)


@pytest.mark.parametrize("context", [0, 2])
def test_flow(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    peer = zuko.flows.MAF(6, context, transforms=3, hidden_features=(20, 20), randperm=True)
    fast = fk.accelerate(copy.deepcopy(peer))
    assert sum(e.what.startswith("accelerated") for e in describe(fast)) == 4  # and their composition
    x, c = torch.randn(7, 6), [torch.randn(7, context)] if context else []

    def use(m: Any, inputs: Any) -> Any:
        y, *c = inputs
        flow = m(*c)
        torch.manual_seed(1)
        sample = flow.rsample((4,))
        return flow.log_prob(y), sample, *flow.rsample_and_log_prob((2,)), flow.log_prob(sample)

    with counting(monkeypatch) as counts:
        got = outcome(fast, use, [x, *c])
    assert counts == {"forward": 6, "inverse": 6}, "sample and log-det come from one sweep"
    assert_same(got, outcome(peer, use, [x, *c]))
    one = use(fast, [x[0], *(t[0] for t in c)])
    assert_same([t.detach() for t in one], [t.detach() for t in use(peer, [x[0], *(t[0] for t in c)])])
    assert repr(fast(*c)) == repr(peer(*c))
    flow = fast(*c)
    assert isinstance(flow.transform.transforms[0], zuko.transforms.AutoregressiveTransform)
    expected = torch.distributions.TransformedDistribution(peer.base(), [peer(*c).transform.inv])
    got_ = torch.distributions.TransformedDistribution(fast.base(), [fast(*c).transform.inv])
    if not context:
        assert_same([got_.log_prob(x)], [expected.log_prob(x)])


def test_left_and_why() -> None:
    slow = transform(adjacency=torch.tril(torch.ones(5, 5)).bool())
    slow.passes = 2
    for peer, reason in [
        (slow, "left: its inverse stops after 2 of 5 passes: it is not exact"),
        (transform(activation=nn.Softsign), "left: no kernel for the activation Softsign"),
        (transform(univariate=zuko.transforms.AdditiveTransform, shapes=[()]), None),
        (transform(univariate=lambda *phi: MonotonicAffineTransform(*phi)), None),
    ]:
        assert describe(peer)[0].what == (reason or describe(peer)[0].what)
        assert describe(peer)[0].what.startswith("left: ")
        fast = fk.accelerate(copy.deepcopy(peer))
        assert not accelerated(fast)
        x = torch.randn(3, 5)
        assert_same([fast()(x), fast().inv(x)], [peer()(x), peer().inv(x)])
    assert all(e.what.startswith("left: ") for e in describe(zuko.flows.MAF(1)))


def test_hooks_and_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fk.accelerate(transform())
    x = torch.randn(4, 5)
    with counting(monkeypatch) as counts:
        calls = []
        given = fast()
        handle = fast.hyper[2].register_forward_hook(lambda m, a, y: calls.append(1))
        hooked = [fast().inv(x), given.inv(x)]
        assert len(calls) == 10
        handle.remove()
        assert counts == {"forward": 0, "inverse": 0}
        assert_same([fast().inv(x), given.inv(x)], hooked)
        assert counts["inverse"] == 2
        fast.hyper[1] = nn.Tanh()
        changed = [fast()(x), given(x)]
        assert counts["forward"] == 2
        fast.hyper[1] = nn.Softsign()
        left = fast()(x)
        assert counts["forward"] == 2
    peer = fk.deaccelerate(fast)
    assert_same([left], [peer()(x)])
    peer.hyper[1] = nn.Tanh()
    assert_same(changed, [peer()(x)] * 2)


def test_odd_input() -> None:
    peer = transform(context=2)
    fast = fk.accelerate(copy.deepcopy(peer))
    x, c = torch.randn(4, 5), torch.randn(4, 2)
    for a, b in [(x[:, :4], c), (x, c[:3]), (x, c[:1]), (x[0], c), (x.float(), c), (x, c.float()), (x.long(), c)]:
        for call in (
            lambda m, a=a, b=b: [m(b)(a)],
            lambda m, a=a, b=b: [m(b).inv(a)],
            lambda m, a=a, b=b: m(b).call_and_ladj(a),
            lambda m, a=a, b=b: m(b).inv.call_and_ladj(a),
        ):
            assert_same_error(peer, fast, call)
    assert_same_error(peer, fast, lambda m: [m()(x)])
    assert_same_error(peer, fast, lambda m: m(c, c))
    assert_same_error(peer, fast, lambda m: [m(c)("x")])
    assert_same_error(fk.deaccelerate(transform()), fk.accelerate(transform()), lambda m: [m(c)(x)])


@pytest.mark.slow
def test_compile() -> None:
    peer = transform(context=2)
    fast = fk.accelerate(copy.deepcopy(peer))
    x, c = torch.randn(4, 5), torch.randn(4, 2)

    def density(m: Any, inputs: Any) -> Any:
        return m(inputs[1]).call_and_ladj(inputs[0])

    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: fast(b).call_and_ladj(a), backend="aot_eager")
    assert_same(outcome(fast, lambda m, i: compiled(*i), [x, c]), outcome(peer, density, [x, c]))
