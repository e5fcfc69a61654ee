"""Accelerated normflows MAFs give normflows' numbers, in normflows' own direction."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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

nf = pytest.importorskip("normflows")

pytestmark = pytest.mark.peers

MAF = nf.flows.MaskedAffineAutoregressive


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(model: Any, inputs: Any) -> Any:
    (x,) = inputs
    return (*model(x), *model.inverse(x))


def there_and_back(model: Any, inputs: Any) -> Any:
    z, x = inputs
    return (*model(z), *model.inverse(x))


def accelerated(model: nn.Module) -> bool:
    return any(entry.what.startswith("accelerated") for entry in describe(model))


def transform(seed: int = 0, **keywords: Any) -> Any:
    torch.manual_seed(seed)
    made = MAF(**{"features": 5, "hidden_features": 16, **keywords})
    randomise(made, seed)
    return made


@pytest.mark.parametrize("seed", range(12))
def test_random_configurations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random(seed)
    residual = r.random() < 0.5
    keywords = {
        "features": r.choice([1, 2, 3, 7, 12]),
        "hidden_features": r.choice([1, 3, 17, 40]),
        "num_blocks": r.choice([0, 1, 2, 3]),
        "use_residual_blocks": residual,
        "random_mask": not residual and r.random() < 0.5,
        "activation": r.choice([F.relu, torch.tanh, F.elu, nn.SiLU()]),
    }
    peer = transform(seed, **keywords)
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(r.choice([0, 1, 5]), keywords["features"])
    with counting(monkeypatch) as counts:
        got = outcome(fast, both, [x])
    assert counts == {"forward": 1, "inverse": 1}
    assert_same(got, outcome(peer, both, [x]), str(keywords))
    z = torch.randn(64, keywords["features"])
    with torch.no_grad():
        x = peer(z)[0]
    assert_close_as_peer(peer.float(), fast.float(), there_and_back, [z.float(), x.float()])


@pytest.mark.parametrize("residual", [False, True])
def test_life(residual: bool) -> None:
    life(lambda: transform(use_residual_blocks=residual), both, [torch.randn(6, 5)], accelerated)


def test_permuted_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """MADE can permute its input degrees; its sampler still ends where ours does."""
    peer = transform()
    peer.autoregressive_net = nf.nets.made.MADE(5, 16, output_multiplier=2, permute_mask=True)
    randomise(peer)
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(4, 5)
    with counting(monkeypatch) as counts:
        assert_same(outcome(fast, both, [x]), outcome(peer, both, [x]))
    assert counts == {"forward": 1, "inverse": 1}


def test_flow() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [MAF(4, 12, num_blocks=1), nf.flows.LULinearPermute(4)]
    peer = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), layers)
    fast = fk.accelerate(copy.deepcopy(peer))
    assert sum(e.what.startswith("accelerated") for e in describe(fast)) == 3
    x = torch.randn(6, 4)
    log_prob = lambda m, inputs: [m.log_prob(*inputs), m.forward_kld(*inputs), *m.forward_and_log_det(*inputs)]  # noqa: E731
    assert_same(outcome(fast, log_prob, [x]), outcome(peer, log_prob, [x]))

    def sample(m: Any, inputs: Any) -> Any:
        torch.manual_seed(3)
        return m.sample(5)

    assert_same(outcome(fast, sample, []), outcome(peer, sample, []))


def test_context_and_odd_input() -> None:
    """A network with a context has gates, which no kernel has: normflows' own path."""
    x, c = torch.randn(4, 5), torch.randn(4, 2)
    for keywords in ({"context_features": 2}, {}, {"use_residual_blocks": False}):
        peer = transform(**keywords)
        fast = fk.accelerate(copy.deepcopy(peer))
        for name in ("forward", "inverse"):
            for args in [(x, c), (x,), (x[:, :3],), (x.float(),), (x[None],), (x[:0],), ("x",), ()]:
                assert_same_error(peer, fast, lambda m, name=name, args=args: getattr(m, name)(*args))


def test_left() -> None:
    for keywords, reason in [
        ({"use_batch_norm": True}, "left: batch norm inside the network"),
        ({"context_features": 2}, "left: its context goes through gates"),
        ({"activation": torch.sin}, "left: no kernel for the activation sin"),
    ]:
        peer = transform(**keywords)
        assert describe(peer)[0].what == reason
        assert type(fk.accelerate(peer)) is MAF
    peer = transform()
    peer.autoregressive_net.preprocessing = nn.Tanh()
    assert describe(peer)[0].what == "left: MADE.preprocessing is a Tanh, not a Identity"
