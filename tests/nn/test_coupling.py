"""Coupling layers, ActNorm, the invertible 1x1 convolution and the layers that move features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels import testing
from flowkernels.nn import MLP, ActNorm, ConvNet, CouplingTransform, FactorOut, Invertible1x1, Permutation, Squeeze
from flowkernels.nn.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask
from flowkernels.transforms import LogisticMixture, LRSpline, RQSpline, identity_parameters, params_per_feature

TRANSFORMS = ["exp", "unit", "tanh", RQSpline("nflows", 4), RQSpline("zuko", 3), LRSpline(3), LogisticMixture(3)]
SHAPE = (2, 4, 4)
IMAGE_MASKS = {
    "checkerboard": checkerboard_mask(4, 4, 0, channels=2),
    "other_squares": checkerboard_mask(4, 4, 1, channels=2),
    "channel": channel_mask(2, 4, 4),
    "first_channel": channel_mask(2, 4, 4, first=True),
}


def coupling(mask: Tensor, transform: Any, context: int = 0) -> CouplingTransform:
    torch.manual_seed(0)
    chosen = int(mask.sum())
    per = params_per_feature(fk.transforms.as_transform(transform))
    net = MLP(len(mask) - chosen, chosen, per, (16,), context_features=context)
    return CouplingTransform(mask, net, transform).double()


def check_layer(layer: nn.Module, x: Tensor, context: Tensor | None = None) -> None:
    layer.eval()
    inverse: Any = layer.inverse
    testing.check_flow_laws(lambda t: layer(t, context), lambda t: inverse(t, context), x)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize(
    "mask", [half_mask(5), half_mask(5, first=True), alternating_mask(5)], ids=["b", "a", "alternating"]
)
def test_laws(mask: Tensor, transform: Any, backend: str) -> None:
    check_layer(coupling(mask, transform), testing.random_tensor((4, 5), torch.float64))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_laws_with_context(transform: Any) -> None:
    context = testing.random_tensor((4, 3), torch.float64, seed=1)
    layer = coupling(half_mask(6), transform, context=3)
    x = testing.random_tensor((4, 6), torch.float64)
    check_layer(layer, x, context)
    assert not torch.equal(layer(x, context)[0], layer(x, 2 * context)[0])


@pytest.mark.parametrize("attention", [0, 2])
@pytest.mark.parametrize("transform", ["tanh", RQSpline(bins=3), LogisticMixture(2)], ids=str)
@pytest.mark.parametrize("mask", IMAGE_MASKS.values(), ids=IMAGE_MASKS)
def test_laws_on_images(mask: Tensor, transform: Any, attention: int) -> None:
    torch.manual_seed(0)
    per = params_per_feature(fk.transforms.as_transform(transform))
    net = ConvNet(SHAPE, mask, per, 8, 1, context_features=2, attention=attention)
    layer = CouplingTransform(mask, net, transform).double()
    context = testing.random_tensor((2, 2), torch.float64, seed=2)
    check_layer(layer, testing.random_tensor((2, 32), torch.float64), context)


@pytest.mark.parametrize("mask", IMAGE_MASKS.values(), ids=IMAGE_MASKS)
def test_what_is_kept_is_kept_and_what_is_seen_is_not_transformed(mask: Tensor) -> None:
    torch.manual_seed(0)
    layer = CouplingTransform(mask, ConvNet(SHAPE, mask, 2, 8, 1), "tanh").double()
    x = testing.random_tensor((1, 32), torch.float64)
    z, _ = layer(x)
    assert torch.equal(z[:, ~mask], x[:, ~mask])
    jacobian = torch.autograd.functional.jacobian(lambda t: layer(t)[0], x)[0, :, 0]
    among = jacobian[mask][:, mask]
    assert torch.equal(among, among.diagonal().diag())


@pytest.mark.parametrize(
    "transform", [t for t in TRANSFORMS if not isinstance(t, (LogisticMixture, LRSpline))], ids=str
)
def test_it_starts_as_the_identity(transform: Any) -> None:
    layer = coupling(half_mask(6), transform).start_at_identity()
    x = testing.random_tensor((9, 6), torch.float64)
    z, logdet = layer(x)
    torch.testing.assert_close(z, x, rtol=1e-6, atol=1e-6)  # the starting parameters are stored in float32
    torch.testing.assert_close(logdet, torch.zeros_like(logdet), rtol=0, atol=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_gradients_reach_every_parameter(transform: Any) -> None:
    layer = coupling(half_mask(6), transform, context=2)
    z, logdet = layer(testing.random_tensor((9, 6), torch.float64), testing.random_tensor((9, 2), torch.float64))
    (z.square().sum() + logdet.sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(4, dtype=torch.bool), "mask selects nothing"),
        (torch.ones(4, dtype=torch.bool), "mask selects everything"),
        (torch.zeros(4), r"mask must be \(D,\) booleans"),
    ],
)
def test_bad_masks(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CouplingTransform(mask, MLP(2, 2, 2))


def test_identity_parameters_have_the_right_width() -> None:
    for transform in TRANSFORMS:
        spec = fk.transforms.as_transform(transform)
        assert identity_parameters(spec).shape == (params_per_feature(spec),)


# ---- ActNorm -----------------------------------------------------------------------------------


def test_actnorm_normalises_its_first_batch() -> None:
    layer = ActNorm(3, 4).double()
    x = testing.random_tensor((50, 12), torch.float64, spread=3.0) + 2.0
    z, _ = layer(x)
    channels = z.reshape(50, 3, 4).transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(channels.var(1, unbiased=False), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)
    before = layer.shift.clone()
    layer(x + 5)
    assert torch.equal(layer.shift, before)  # only the first batch counts
    check_layer(layer, testing.random_tensor((3, 12), torch.float64))


def test_actnorm_leaves_padding_out() -> None:
    x = testing.random_tensor((20, 12), torch.float64)
    mask = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    padded = torch.where(mask[:, None].expand(20, 3, 4).reshape(20, 12), x, 1e3)
    a, b = ActNorm(3, 4).double(), ActNorm(3, 4).double()
    z, logdet = a(padded, mask=mask)
    kept = mask[:, None].expand(20, 3, 4).reshape(20, 12)
    assert torch.equal(z[~kept], padded[~kept])
    torch.testing.assert_close(logdet, mask.sum(1) * a.log_scale.sum())
    b.initialise(x, mask)
    torch.testing.assert_close(a.shift, b.shift)
    back, minus = a.inverse(z, mask=mask)
    torch.testing.assert_close(back, padded, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(minus, -logdet)
    rows = torch.arange(20) < 12
    c = ActNorm(3, 4).double()
    c.initialise(x, rows)
    d = ActNorm(3, 4).double()
    d.initialise(x[:12])
    torch.testing.assert_close(c.log_scale, d.log_scale)


def test_actnorm_refuses_a_batch_of_one() -> None:
    with pytest.raises(ValueError, match="x must have at least 2 values per channel to initialise ActNorm from, got 1"):
        ActNorm(5)(torch.zeros(1, 5))
    ActNorm(5, data_init=False)(torch.zeros(1, 5))
    ActNorm(5, 2)(torch.randn(1, 10))  # two pixels are two values
    layer = ActNorm(2)
    with pytest.raises(ValueError, match=r"mask must have shape \(3,\) or \(3, 1\)"):
        layer(torch.zeros(3, 2), mask=torch.ones(2, dtype=torch.bool))


def test_actnorm_is_restored_initialised() -> None:
    layer = ActNorm(2)
    layer(torch.randn(9, 2))
    again = ActNorm(2)
    again.load_state_dict(layer.state_dict())
    again.train()(torch.randn(9, 2) + 3)
    assert torch.equal(again.shift, layer.shift)


# ---- the others --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_invertible_1x1(channels: int) -> None:
    torch.manual_seed(channels)
    layer = Invertible1x1(channels, 3).double()
    weight = layer.weight()
    torch.testing.assert_close(weight @ weight.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    check_layer(layer, testing.random_tensor((3, 3 * channels), torch.float64))
    x = testing.random_tensor((2, channels, 1, 3), torch.float64)
    convolved = torch.nn.functional.conv2d(x, layer.weight()[:, :, None, None])
    torch.testing.assert_close(layer(x.reshape(2, -1))[0], convolved.reshape(2, -1))


def test_permutation_squeeze_and_factor_out() -> None:
    torch.manual_seed(0)
    check_layer(Permutation(torch.randperm(7)), testing.random_tensor((3, 7), torch.float64))
    squeeze = Squeeze((2, 4, 6))
    assert squeeze.shape == (8, 2, 3)
    x = testing.random_tensor((3, 48), torch.float64)
    check_layer(squeeze, x)
    expected = torch.nn.functional.pixel_unshuffle(x.reshape(3, 2, 4, 6), 2)
    assert torch.equal(squeeze(x)[0], expected.reshape(3, -1))
    inner = coupling(half_mask(4), "tanh")
    layer = FactorOut(3, [inner])
    y = testing.random_tensor((3, 7), torch.float64)
    check_layer(layer, y)
    assert torch.equal(layer(y)[0][:, :3], y[:, :3])
    with pytest.raises(ValueError, match=r"permutation must hold each of 0\.\.2 once"):
        Permutation([0, 1, 1])
    with pytest.raises(ValueError, match="shape must have even height and width"):
        Squeeze((1, 3, 4))
