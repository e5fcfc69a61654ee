"""Our own coupling layers with a peer's conditioner and weights give the peer's outputs and log-dets.

`test_couplings` is about peers' layers that run on our operators; here the layers are `flowkernels.nn`'s.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowkernels.nn import ActNorm, CouplingTransform, Invertible1x1
from flowkernels.nn.masks import channel_mask
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import RQSpline
from tests.integrations.harness import TOLERANCE, randomise

pytestmark = pytest.mark.peers

Both = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> (z, logdet)
# The peer's layer, then for a layer of any dtype: its density and sampling direction, and ours.
Pair = tuple[nn.Module, Callable[[Any], tuple[Both, Both]], Callable[[Any], nn.Module], tuple[int, ...]]
FEATURES = 5
MASK = torch.tensor([True, False, True, False, False])


class Parameters(nn.Module):
    """A peer's conditioner and its order of parameters, (N, len a) -> (N, len b, P)."""

    def __init__(self, net: Callable[..., Tensor], order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.order = net, order

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.order(self.net(x) if context is None else self.net(x, context))


def halves(theta: Tensor) -> Tensor:
    """First all shifts, then all scales."""
    return torch.stack(theta.flatten(1).chunk(2, -1), -1)


class Mlp(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(x)
        return y


def nflows_affine() -> Pair:
    t: Any = pytest.importorskip("nflows.transforms")
    peer = t.AffineCouplingTransform(MASK.int(), Mlp)
    law = ScaleLaw("sigmoid", offset=2.0, floor=1e-3)
    ours = lambda m: CouplingTransform(MASK, Parameters(m.transform_net, halves), law)  # noqa: E731
    return peer, lambda m: (m, m.inverse), ours, (FEATURES,)


def nflows_spline() -> Pair:
    t: Any = pytest.importorskip("nflows.transforms")
    nets: Any = pytest.importorskip("nflows.nn.nets")
    peer = t.PiecewiseRationalQuadraticCouplingTransform(
        MASK.int(), lambda a, b: nets.ResidualNet(a, b, 16), num_bins=6, tails="linear", tail_bound=1.5
    )
    spline = RQSpline("nflows", 6, bound=1.5, logit_scale=1 / math.sqrt(16))
    ours = lambda m: CouplingTransform(  # noqa: E731
        MASK, Parameters(m.transform_net, lambda p: p.unflatten(1, (-1, 17))), spline
    )
    return peer, lambda m: (m, m.inverse), ours, (FEATURES,)


def zuko_coupling(spline: bool) -> Pair:
    zuko: Any = pytest.importorskip("zuko")
    # Its mask is True for what stays.
    options: dict[str, Any] = {"mask": ~MASK, "hidden_features": (16,)}
    if spline:
        options |= {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(6,), (6,), (5,)]}
    peer = zuko.flows.coupling.GeneralCouplingTransform(FEATURES, **options)
    law: Any = RQSpline("zuko", 6) if spline else "softclip"
    count = 17 if spline else 2
    ours = lambda m: CouplingTransform(  # noqa: E731
        MASK, Parameters(m.hyper, lambda p: p.unflatten(1, (-1, count))), law
    )
    return peer, lambda m: (m().call_and_ladj, m().inv.call_and_ladj), ours, (FEATURES,)


def normflows_affine(scale_map: str) -> Pair:
    nf: Any = pytest.importorskip("normflows")
    peer = nf.flows.AffineCouplingBlock(Mlp(3, 4), scale_map=scale_map)
    # The last two features are transformed; the density direction is its inverse.
    mask = torch.tensor([False] * 3 + [True] * 2)
    law = ScaleLaw("exp") if scale_map == "exp" else ScaleLaw("sigmoid", offset=2.0, floor=0.0)

    def ours(m: Any) -> nn.Module:
        net = Parameters(m.flows[1].param_map, lambda p: p.unflatten(1, (-1, 2)))
        layer = CouplingTransform(mask, net, law)
        if scale_map != "sigmoid":
            return Flipped(layer)
        # Sampling divides by the sigmoid, so a density is (z - t) sigmoid: the form with the shift first.
        net.order = lambda p: p.unflatten(1, (-1, 2)) * torch.tensor([-1.0, 1.0], dtype=p.dtype)
        return CouplingTransform(mask, net, law, form="shift_scale")

    return peer, lambda m: (m.inverse, m), ours, (FEATURES,)


class Flipped(nn.Module):
    """Another direction is the one of densities."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.layer.inverse(x)
        return result

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.layer(z)
        return result


class Chain(nn.Module):
    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total: Any = 0.0
        for layer in self.layers:
            x, logdet = layer(x)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        total: Any = 0.0
        for layer in reversed(self.layers):
            z, logdet = layer.inverse(z)
            total = total + logdet
        return z, total


def normflows_spline() -> Pair:
    """A spline of one half given the other, then one of the other half with parameters of its own."""
    nf: Any = pytest.importorskip("normflows")
    peer = nf.flows.CoupledRationalQuadraticSpline(FEATURES, 1, 16, num_bins=6, tail_bound=1.5)

    def ours(m: Any) -> nn.Module:
        inner = m.prqct
        mask = torch.zeros(FEATURES, dtype=torch.bool)
        mask[inner.transform_features] = True
        spline = RQSpline("nflows", 6, bound=1.5, logit_scale=1 / math.sqrt(16))
        given = CouplingTransform(mask, Parameters(inner.transform_net, lambda p: p.unflatten(1, (-1, 17))), spline)
        own = inner.unconditional_transform
        theta = [own.unnormalized_widths, own.unnormalized_heights, own.unnormalized_derivatives]
        fixed = lambda x: torch.cat(theta, -1).expand(x.shape[0], -1, -1)  # noqa: E731
        alone = CouplingTransform(~mask, Parameters(fixed, lambda p: p), RQSpline("nflows", 6, bound=1.5))
        return Chain([given, alone])

    return peer, lambda m: (m.inverse, m), ours, (FEATURES,)


def normflows_glow() -> Pair:
    """ActNorm, 1x1 convolution and affine coupling, in the direction of a density."""
    nf: Any = pytest.importorskip("normflows")
    channels, height, width = shape = (4, 2, 3)
    peer = nf.flows.GlowBlock(channels, 8, init_zeros=False)

    def ours(m: Any) -> nn.Module:
        coupling, convolution, norm = m.flows
        norm.data_dep_init_done = torch.tensor(1.0)
        actnorm = ActNorm(channels, height * width, data_init=False).to(norm.s.dtype)
        mixing = Invertible1x1(channels, height * width).to(norm.s.dtype)
        with torch.no_grad():
            actnorm.shift.copy_(-norm.t.flatten())
            actnorm.log_scale.copy_(-norm.s.flatten())
            mixing.permutation.copy_(convolution.P.argmax(1))
            mixing.sign.copy_(convolution.sign_S)
            for to, value in (
                (mixing.lower, convolution.L),
                (mixing.upper, convolution.U),
                (mixing.log_diagonal, convolution.log_S),
            ):
                to.copy_(value)
        net = coupling.flows[1].param_map
        image = lambda x: net(x.unflatten(1, (-1, height, width)))  # noqa: E731
        sign = torch.tensor([-1.0, 1.0], dtype=norm.s.dtype)
        # (N, 2 channels, H, W), shift and scale of a channel after one another -> (N, channels * H * W, 2)
        order = lambda p: p.unflatten(1, (-1, 2)).movedim(2, -1).flatten(1, 3) * sign  # noqa: E731
        law = ScaleLaw("sigmoid", offset=2.0, floor=0.0)
        mask = channel_mask(channels, height, width)
        affine = CouplingTransform(mask, Parameters(image, order), law, form="shift_scale")
        return Chain([actnorm, mixing, affine])

    def flat(call: Any) -> Both:
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            z, logdet = call(x.unflatten(1, shape))
            return z.flatten(1), logdet

        return run

    return peer, lambda m: (flat(m.inverse), flat(m)), ours, (24,)


def freia(kind: str, activation: str) -> Pair:
    """Two-sided: the first half given the second, then the second given the first.

    FrEIA's log-scale is ``clamp f(u)``, our laws' ``bound f(u / bound)``: the scale parameter is clamp times u, and
    half of that for its sigmoid, ``2 sigmoid(u) - 1 = tanh(u / 2)``.
    """
    modules: Any = pytest.importorskip("FrEIA.modules")
    clamp = 1.5
    options: dict[str, Any] = {} if kind == "NICE" else {"clamp": clamp, "clamp_activation": activation}
    peer = getattr(modules, f"{kind}CouplingBlock")([(FEATURES,)], subnet_constructor=Mlp, **options)
    first = torch.arange(FEATURES) < peer.split_len1
    law = ScaleLaw("atan" if activation == "ATAN" else "tanh", bound=clamp)
    factor = clamp / 2 if activation == "SIGMOID" else clamp

    def side(m: Any, which: str, mask: Tensor) -> nn.Module:
        if kind == "NICE":
            net = m.F if which == "2" else m.G
            return CouplingTransform(mask, Parameters(net, lambda p: p[..., None]), "unit")
        if kind == "RNVP":
            s, t = getattr(m, f"subnet_s{which}"), getattr(m, f"subnet_t{which}")
            return CouplingTransform(
                mask, Parameters(lambda x: torch.stack([t(x), factor * s(x)], -1), lambda p: p), law
            )
        joint = getattr(m, f"subnet{which}")
        scale = lambda p: torch.stack([p.chunk(2, -1)[1], factor * p.chunk(2, -1)[0]], -1)  # noqa: E731
        return CouplingTransform(mask, Parameters(joint, scale), law)

    def both(m: Any) -> tuple[Both, Both]:
        def run(rev: bool) -> Both:
            def call(x: Tensor) -> tuple[Tensor, Tensor]:
                (y,), logdet = m([x], rev=rev)
                return y, logdet if isinstance(logdet, Tensor) else x.new_full((x.shape[0],), logdet)

            return call

        return run(False), run(True)

    return peer, both, lambda m: Chain([side(m, "2", first), side(m, "1", ~first)]), (FEATURES,)


CASES: dict[str, Callable[[], Pair]] = {
    "nflows affine": nflows_affine,
    "nflows spline": nflows_spline,
    "zuko affine": lambda: zuko_coupling(False),
    "zuko spline": lambda: zuko_coupling(True),
    "normflows exp": lambda: normflows_affine("exp"),
    "normflows sigmoid": lambda: normflows_affine("sigmoid"),
    "normflows sigmoid_inv": lambda: normflows_affine("sigmoid_inv"),
    "normflows spline": normflows_spline,
    "normflows Glow block": normflows_glow,
    "FrEIA NICE": lambda: freia("NICE", "ATAN"),
    **{
        f"FrEIA {kind}, {activation}": lambda kind=kind, activation=activation: freia(kind, activation)  # type: ignore[misc]
        for kind in ("RNVP", "GLOW")
        for activation in ("ATAN", "TANH", "SIGMOID")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_logdets_are_the_peers(name: str, backend: str) -> None:
    peer, directions, build, event = CASES[name]()
    randomise(peer)
    double = copy.deepcopy(peer).double()
    x = torch.randn(64, *event, dtype=torch.float64)
    with torch.no_grad():
        ours: Any = build(double)
        theirs = directions(double)
        truths = [direction(x) for direction in theirs]
        for got, expected in zip((ours(x), ours.inverse(x)), truths, strict=True):
            assert (got[0] - x).abs().max() > 0.1  # it does something
            for a, b in zip(got, expected, strict=True):
                assert a.shape == b.shape
                assert (a - b).abs().max() <= TOLERANCE * b.abs().max().clamp_min(1.0)

        single: Any = build(peer.float())
        plain = [direction(x.float()) for direction in directions(peer)]
        exact_peer = copy.deepcopy(peer).double()
        exact = [direction(x.float().double()) for direction in directions(exact_peer)]
        for got, theirs32, truth in zip((single(x.float()), single.inverse(x.float())), plain, exact, strict=True):
            for a, b, t in zip(got, theirs32, truth, strict=True):
                assert a.dtype == b.dtype == torch.float32
                # Both are sums of roundings that happen to differ: their root mean squares are compared.
                error, allowed = (a - t).square().mean().sqrt(), 2 * (b - t).square().mean().sqrt()
                assert error <= allowed + torch.finfo(torch.float32).eps * t.square().mean().sqrt()
