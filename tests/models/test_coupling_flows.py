"""NICE, RealNVP, Glow, Flow++ and neural spline flows: the laws, the five methods, and RealNVP as a MAF."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowkernels import explain, models, testing
from flowkernels.models import Flow
from flowkernels.nn import MLP, AutoregressiveTransform, CouplingTransform
from flowkernels.nn.masks import half_mask
from flowkernels.transforms import LRSpline, RQSpline, Spline

Make = Callable[[int], Flow]
MODELS: dict[str, Make] = {
    "nice": lambda k: models.NICE(5, (16,), 3, context_features=k),
    "realnvp": lambda k: models.RealNVP(5, (16,), 3, context_features=k),
    "realnvp_alternating": lambda k: models.RealNVP(5, (16,), 2, mask="alternating", actnorm=True, context_features=k),
    "coupling_nsf": lambda k: models.CouplingNSF(5, (16,), 2, spline=RQSpline("zuko", 4), context_features=k),
    "coupling_linear_nsf": lambda k: models.CouplingNSF(5, (16,), 2, spline=LRSpline(4), context_features=k),
    "linear_nsf": lambda k: models.NSF(5, (16, 16), 2, spline=LRSpline(4), context_features=k),
    "nsf": lambda k: models.NSF(5, (16, 16), 2, spline=RQSpline(bins=4), context_features=k),
    "image_realnvp": lambda k: models.ImageRealNVP((1, 4, 4), 8, 1, levels=2, couplings=2, context_features=k),
    "glow": lambda k: models.Glow((1, 4, 4), 8, 1, levels=2, steps=2, context_features=k),
    "flowpp": lambda k: models.FlowPP((1, 4, 4), 8, 1, couplings=2, components=2, context_features=k),
    "flowpp_attention": lambda k: models.FlowPP(
        (1, 4, 4), 8, 1, couplings=1, components=2, attention=2, context_features=k
    ),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def shaken(flow: Flow) -> Flow:
    """In float64, away from the identity that it starts as, ActNorm initialised."""
    flow = flow.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    for module in flow.modules():
        if hasattr(module, "initialised"):
            module.initialised.fill_(True)
    return flow


@every_model
@pytest.mark.parametrize("context_features", [0, 3])
def test_laws(make: Make, context_features: int) -> None:
    torch.manual_seed(0)
    flow = shaken(make(context_features))
    x = testing.random_tensor((2, flow.features), torch.float64)
    context = testing.random_tensor((2, 3), torch.float64, seed=1) if context_features else None
    testing.check_flow_laws(lambda t: flow.transform(t, context), lambda t: flow.inverse(t, context), x)


@every_model
def test_five_methods(make: Make) -> None:
    torch.manual_seed(0)
    flow = shaken(make(2))
    context = testing.random_tensor((3, 2), torch.float64)
    x, log_prob = flow.sample_and_log_prob(4, context, seed=7)
    assert x.shape == (3, 4, flow.features)
    assert log_prob.shape == (3, 4)
    assert torch.equal(flow.sample(4, context, seed=7), x.detach())
    rows = context.repeat_interleave(4, dim=0)
    torch.testing.assert_close(flow.log_prob(x.reshape(12, -1), rows), log_prob.reshape(-1), rtol=1e-8, atol=1e-8)
    assert flow.rsample(2, context).requires_grad
    with pytest.raises(ValueError, match="context is missing"):
        flow.sample(4)


@every_model
def test_training_lowers_the_loss(make: Make) -> None:
    torch.manual_seed(0)
    flow = make(0)
    data = torch.randn(256, flow.features) @ torch.randn(flow.features, flow.features) * 0.5 + 1.0
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    losses = []
    for _ in range(25):
        loss = -flow.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


@every_model
def test_parts_transform_every_feature(make: Make) -> None:
    torch.manual_seed(0)
    flow = shaken(make(0))
    x = testing.random_tensor((1, flow.features), torch.float64)
    z, _ = flow.transform(x)
    # A factored-out feature may pass a scale untouched, but something acts on each.
    assert (z.sort().values != x.sort().values).all()


def test_realnvp_is_a_maf_with_half_the_degrees_empty() -> None:
    """An affine coupling, built as a masked autoregressive network.

    The first half of the features has parameters that depend on nothing and make it the identity; every hidden
    unit has the degree of the last of them, so that it sees exactly the first half, and the second half sees every
    hidden unit.
    """
    torch.manual_seed(0)
    features, half, hidden = 6, 3, 16
    mask = half_mask(features)
    net = MLP(half, features - half, 2, (hidden, hidden))
    coupling = CouplingTransform(mask, net, "exp").double()

    degrees = [[half] * hidden, [half] * hidden]
    maf = AutoregressiveTransform(features, (hidden, hidden), law="exp", degrees=degrees).double()
    layers: Any = maf.conditioner.layers
    given: Any = net.layers
    with torch.no_grad():
        layers[0].weight.zero_()
        layers[0].weight[:, :half] = given[0].weight
        layers[0].bias.copy_(given[0].bias)
        layers[1].weight.copy_(given[1].weight)
        layers[1].bias.copy_(given[1].bias)
        layers[2].weight.zero_()
        layers[2].bias.zero_()  # shift 0 and log-scale 0: the identity
        layers[2].weight[2 * half :] = given[2].weight
        layers[2].bias[2 * half :] = given[2].bias
    x = testing.random_tensor((9, features), torch.float64)
    torch.testing.assert_close(maf(x), coupling(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(maf.inverse(x), coupling.inverse(x), rtol=1e-12, atol=1e-12)
    assert maf.conditioner.plan.steps == 2  # the first half, then all of the second at once


@pytest.mark.parametrize(
    "spline", [RQSpline("nflows", 4), RQSpline("zuko", 4), RQSpline("pyro", 4), LRSpline(4), LRSpline(64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_autoregressive_splines_against_the_reference(spline: Spline, dtype: torch.dtype, direction: str) -> None:
    torch.manual_seed(0)
    layer = AutoregressiveTransform(7, (20, 20), law=spline, context_features=2, order="random").to(dtype)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, context: Tensor, *parameters: Tensor) -> Any:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            _Direction(layer, direction), {f"layer.{k}": v for k, v in given.items()}, (x, context)
        )

    x = testing.random_tensor((37, 7), dtype, spread=2.0)
    context = testing.random_tensor((37, 2), dtype, seed=1)
    testing.check_against_reference(call, [x, context, *(p.detach() for p in layer.parameters())])


class _Direction(nn.Module):
    def __init__(self, layer: nn.Module, direction: str) -> None:
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, x: Tensor, context: Tensor) -> Any:
        return getattr(self.layer, self.direction)(x, context)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.RealNVP(5, (8,), 0), "transforms must be an integer >= 1"),
        (lambda: models.RealNVP(5, (8,), 2, mask="thirds"), "mask must be one of half, alternating"),
        (lambda: models.RealNVP(5, (8,), 3, mask=[half_mask(5)]), "hold one mask for each of 3 transforms, got 1"),
        (lambda: models.RealNVP(1, (8,), 1), "features must be at least 2"),
        (lambda: models.Glow((1, 6, 6), levels=2), "2\\^levels divide height and width"),
        (lambda: models.FlowPP((1, 4, 4), 9, attention=2), "hidden_channels must be a multiple of attention"),
    ],
)
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@every_model
def test_explain_says_what_runs(make: Make) -> None:
    text = explain(make(0))
    assert "both directions" in text or "maf_forward" in text
