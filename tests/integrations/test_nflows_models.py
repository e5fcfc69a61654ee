"""nflows flows as `fk.models.MAF` and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowkernels.integrations.nflows import from_nflows, to_nflows
from flowkernels.models import MAF
from tests.integrations.harness import assert_same, randomise

pytest.importorskip("nflows")
from nflows import transforms
from nflows.distributions import StandardNormal
from nflows.flows import Flow

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def flow(features: int, permutations: bool, **keywords: Any) -> Any:
    torch.manual_seed(0)
    chain: list[nn.Module] = []
    for i in range(3):
        inner = [transforms.MaskedAffineAutoregressiveTransform(features, 12, **keywords)]
        if permutations:
            inner.append(transforms.RandomPermutation(features) if i else transforms.ReversePermutation(features))
        chain.append(transforms.CompositeTransform(inner))
    made = Flow(transforms.CompositeTransform(chain), StandardNormal([features]))
    randomise(made)
    return made


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("permutations", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"num_blocks": 1, "activation": torch.tanh},
        {"use_residual_blocks": False, "num_blocks": 0},
        {"use_residual_blocks": False, "random_mask": True, "activation": F.elu},
    ],
)
def test_there_and_back(features: int, permutations: bool, keywords: dict[str, Any]) -> None:
    peer = flow(features, permutations, **keywords)
    model = from_nflows(peer)
    assert isinstance(model, MAF)
    x = torch.randn(6, features)
    assert_same([model.log_prob(x)], [peer.log_prob(x)])
    z, z_peer = model.transform(x)[0], peer.transform_to_noise(x)
    assert_same([z.sort(1).values], [z_peer.sort(1).values])  # the same noise at other places
    assert_same([model.inverse(z)[0]], [x])
    again = to_nflows(model)
    assert_same([again.log_prob(x), again.transform_to_noise(x)], [peer.log_prob(x), z])
    assert_same([again._transform.inverse(z)[0]], [x])
    third = from_nflows(again)
    assert_same(list(third.parameters()), list(model.parameters()))


def test_any_maf() -> None:
    torch.manual_seed(0)
    for keywords in ({"order": "random"}, {"order": "alternating", "degrees": "random"}, {"residual": True}):
        model = MAF(4, (9, 9), 3, activation="silu", **keywords)  # type: ignore[arg-type]
        randomise(model)
        x = torch.randn(5, 4)
        peer = to_nflows(model)
        assert_same([peer.log_prob(x), peer.transform_to_noise(x)], [model.log_prob(x), model.transform(x)[0]])


def test_parameters_are_copied() -> None:
    peer = flow(3, False)
    model = from_nflows(peer)
    x = torch.randn(2, 3)
    before = model.log_prob(x)
    randomise(peer, seed=5)
    assert_same([model.log_prob(x)], [before])


def test_what_cannot_be_converted() -> None:
    bad: Any
    for bad in (nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match="flow must be an nflows Flow, got"):
            from_nflows(bad)
        with pytest.raises(TypeError, match=r"model must be a flowkernels\.models\.MAF, got"):
            to_nflows(bad)
    base = StandardNormal([3])
    maf = transforms.MaskedAffineAutoregressiveTransform
    for transform, reason in [
        (transforms.LULinear(3), "flow has a LULinear"),
        (maf(3, 8, context_features=2), "flow has a context"),
        (maf(3, 8, activation=torch.sin), "no kernel for the activation sin"),
        (transforms.ReversePermutation(3), "no autoregressive transform"),
    ]:
        with pytest.raises(ValueError, match=reason):
            from_nflows(Flow(transform, base))
    with pytest.raises(ValueError, match="no embedding network, got StandardNormal and Linear"):
        from_nflows(Flow(maf(3, 8), base, nn.Linear(2, 2)))
    for model, reason in [
        (MAF(3, (8,), context_features=2), "model has a context"),
        (MAF(3, (8,), law="exp"), "model has the transform law="),
        (MAF(3, (8, 9)), "model has hidden layers of widths"),
    ]:
        with pytest.raises(ValueError, match=reason):
            to_nflows(model)
