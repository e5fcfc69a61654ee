"""MAF: densities, exact sampling, training steps, gradients of samples; and how sampling grows with its sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import peers, plain
from benchmarks.core import (
    COMPILED,
    OURS,
    PEER,
    PLAIN,
    RIVAL,
    YARDSTICK,
    Case,
    Options,
    Problem,
    Variant,
    compiled,
    peer,
)
from flowkernels.models import MAF

# From here on the naive loop takes minutes, and the graphs of its gradient tens of gigabytes.
TOO_MANY_FEATURES = 1000


def _flow(features: int, hidden: int, transforms: int, layers: int = 2) -> MAF:
    torch.manual_seed(0)
    return MAF(features, (hidden,) * layers, transforms)


def _noise(batch: int, features: int) -> Tensor:
    return torch.randn(batch, features, generator=torch.Generator().manual_seed(1))


def _bytes(nets: list[plain.Net], batch: int) -> float:
    """Weights that exist read once, (N, D) in, (N, D) and (N,) out, in float32."""
    return 4.0 * (plain.existing_weights(nets) + batch * (2 * nets[0].features + 1))


def _wants(options: Options, name: str) -> bool:
    return options.wants(PEER, name) and peer(name) is not None


# ---- sampling --------------------------------------------------------------------------------------------------------


def _sampling(
    features: int, hidden: int, transforms: int, batch: int, layers: int, others: bool, options: Options
) -> Problem:
    """z -> x. The noise is given, so that all draw the same samples and can be compared.

    `others` leaves out what would take too long in a sweep over sizes.
    """
    flow = _flow(features, hidden, transforms, layers)
    nets, z = plain.nets_of(flow), _noise(batch, features)
    masked = [net.masked() for net in nets]
    samplers = [plain.Blocked(net) for net in masked]
    # The truth: another algorithm than the one under test is at work in float64, the naive loop checks it in tests/.
    double = [plain.Blocked(net.double().masked()) for net in nets]
    variants = [
        Variant("flowkernels", OURS, lambda: flow.inverse(z)),
        Variant("flowkernels density", YARDSTICK, lambda: flow.transform(z), lambda: _true_density(nets, z)),
        _dense_pass(nets, z),
        Variant("PyTorch, blocked", RIVAL, lambda: plain.sample_blocked(samplers, z)),
    ]
    if others and features < TOO_MANY_FEATURES:
        variants.insert(1, Variant("PyTorch", PLAIN, lambda: plain.sample_naive(nets, z)))
        if not options.quick or features <= 64:
            variants.append(
                Variant("PyTorch, masked once", RIVAL, lambda: plain.sample_naive(masked, z, multiply=False))
            )
        if _wants(options, "nflows"):
            other = peers.nflows_flow(nets)
            variants.append(Variant("nflows", PEER, lambda: other._transform.inverse(z)))
        if _wants(options, "zuko"):
            zuko = peers.zuko_flow(nets)

            def run() -> tuple[Tensor, Tensor]:
                x, ladj = zuko().transform.inv.call_and_ladj(z)
                return x, ladj

            variants.append(
                Variant("zuko", PEER, run, lambda: plain.sample_blocked(double, z.double(), plain.softclip_law))
            )
        if _wants(options, "normflows") and transforms == 1:
            layer, net = peers.normflows_layer(nets[0])
            truth = plain.Blocked(net.double().masked())
            variants.append(
                Variant("normflows", PEER, lambda: layer.inverse(z), lambda: truth(z.double(), plain.sigmoid_law))
            )
    return Problem(
        variants,
        lambda: plain.sample_blocked(double, z.double()),
        flops=2.0 * batch * plain.existing_weights(nets),
        bytes=_bytes(nets, batch),
        least=1.0,
        reference=None if others and features < TOO_MANY_FEATURES else "PyTorch, blocked",
    )


def _true_density(nets: list[plain.Net], x: Tensor) -> tuple[Tensor, Tensor]:
    return plain.density([net.double() for net in nets], x.double())


def _dense_pass(nets: list[plain.Net], x: Tensor) -> Variant:
    """One pass of the same networks without masks, and nothing else: what a density would cost if masks were free."""
    modules = []
    for net in nets:
        layers: list[nn.Module] = []
        for weight, bias in zip(net.weights, net.biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
            layers += [linear, nn.ReLU()]
        modules.append(nn.Sequential(*layers[:-1]))

    def truth() -> list[Tensor]:
        return [net.double().unmasked()(x.double()).flatten(1) for net in nets]

    return Variant("dense pass", YARDSTICK, lambda: [module(x) for module in modules], truth)


# ---- density ---------------------------------------------------------------------------------------------------------


def _log_prob(features: int, hidden: int, transforms: int, batch: int, options: Options) -> Problem:
    flow = _flow(features, hidden, transforms)
    nets, x = plain.nets_of(flow), _noise(batch, features)
    masked, dense = [net.masked() for net in nets], [net.unmasked() for net in nets]
    fused = compiled(lambda x: plain.log_prob(nets, x))
    fused_masked = compiled(lambda x: plain.log_prob(masked, x, multiply=False))
    double = [net.double() for net in nets]
    variants = [
        Variant("flowkernels", OURS, lambda: flow.log_prob(x)),
        Variant("PyTorch", PLAIN, lambda: plain.log_prob(nets, x)),
        Variant("torch.compile", COMPILED, lambda: fused(x)),
        Variant("PyTorch, masked once", RIVAL, lambda: plain.log_prob(masked, x, multiply=False)),
        Variant("torch.compile, masked once", RIVAL, lambda: fused_masked(x)),
        Variant(
            "without masks",
            YARDSTICK,
            lambda: plain.log_prob(dense, x, multiply=False),
            lambda: [plain.log_prob([net.double().unmasked() for net in nets], x.double())],
        ),
    ]
    if _wants(options, "nflows"):
        other = peers.nflows_flow(nets)
        variants.append(Variant("nflows", PEER, lambda: other.log_prob(x)))
    if _wants(options, "zuko"):
        zuko = peers.zuko_flow(nets)
        variants.append(
            Variant(
                "zuko",
                PEER,
                lambda: zuko().log_prob(x),
                lambda: [plain.log_prob(double, x.double(), plain.softclip_law)],
            )
        )
    return Problem(
        variants,
        lambda: [plain.log_prob(double, x.double())],
        flops=2.0 * batch * plain.existing_weights(nets),
        bytes=_bytes(nets, batch),
        least=1.0,
    )


# ---- training --------------------------------------------------------------------------------------------------------


def _training(features: int, hidden: int, transforms: int, batch: int, options: Options) -> Problem:
    """Zero the gradients, minus the mean log-density, its gradient, a step of Adam.

    The learning rate is 0: the optimizer writes the parameters as ever, and they keep their values, so every step gives
    the same loss and the same gradients and can be compared.
    """
    flow = _flow(features, hidden, transforms)
    x = _noise(batch, features)

    def truth(unmasked: bool = False, law: plain.Law = plain.softplus_law) -> list[Tensor]:
        leaves = [(net.unmasked() if unmasked else net).leaves() for net in plain.nets_of(flow)]
        loss = -plain.log_prob(leaves, x.double(), law).mean()
        loss.backward()
        return [loss, *_gradients(leaves)]

    def variant(
        name: str,
        kind: str,
        module: nn.Module,
        log_prob: Callable[[], Tensor],
        gradients: Callable[[], list[Tensor]],
        truth: Callable[[], list[Tensor]] | None = None,
    ) -> Variant:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.0)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = -log_prob().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Variant(name, kind, step, truth, lambda loss: [loss, *gradients()])

    def ours_like(
        name: str, kind: str, make: Callable[[list[plain.Net]], Callable[[Tensor], Tensor]], **more: object
    ) -> Variant:
        module = copy.deepcopy(flow)
        nets = plain.nets_of(module)
        log_prob = make(nets)
        return variant(name, kind, module, lambda: log_prob(x), lambda: _gradients(nets), **more)  # type: ignore[arg-type]

    model = copy.deepcopy(flow)
    variants = [
        variant("flowkernels", OURS, model, lambda: model.log_prob(x), lambda: _gradients(plain.nets_of(model))),
        ours_like("PyTorch", PLAIN, lambda nets: lambda x: plain.log_prob(nets, x)),
        ours_like("torch.compile", COMPILED, lambda nets: compiled(lambda x: plain.log_prob(nets, x))),
        ours_like(
            "without masks",
            YARDSTICK,
            lambda nets: partial(plain.log_prob, [net.unmasked() for net in nets], multiply=False),
            truth=partial(truth, unmasked=True),
        ),
    ]
    nets = plain.nets_of(flow)
    if _wants(options, "nflows"):
        other = peers.nflows_flow(nets)
        variants.append(
            variant("nflows", PEER, other, lambda: other.log_prob(x), lambda: peers.nflows_gradients(other, nets))
        )
    if _wants(options, "zuko"):
        zuko = peers.zuko_flow(nets)
        variants.append(
            variant(
                "zuko",
                PEER,
                zuko,
                lambda: zuko().log_prob(x),
                lambda: peers.zuko_gradients(zuko),
                partial(truth, law=plain.softclip_law),
            )
        )
    return Problem(
        variants, truth, flops=6.0 * batch * plain.existing_weights(nets), bytes=3 * _bytes(nets, batch), grad=True
    )


def _parameters(nets: list[plain.Net]) -> list[Tensor]:
    return [p for net in nets for pair in zip(net.weights, net.biases, strict=True) for p in pair]


def _gradients(nets: list[plain.Net]) -> list[Tensor]:
    return [p.grad for p in _parameters(nets) if p.grad is not None]


# ---- gradients of samples --------------------------------------------------------------------------------------------


def _rsample(features: int, hidden: int, batch: int, options: Options) -> Problem:
    """Samples and the gradient of ``sum x^2 + sum logdet`` with respect to every parameter; time and memory."""
    flow = _flow(features, hidden, 1)
    z = _noise(batch, features)

    def both(nets: list[plain.Net], transform: Callable[[], tuple[Tensor, Tensor]]) -> list[Tensor]:
        x, logdet = transform()
        # Returned, not kept in .grad: so they count as memory of this call.
        gradients = torch.autograd.grad(x.square().sum() + logdet.sum(), _parameters(nets))
        return [x.detach(), logdet.detach(), *gradients]

    def true_sampling() -> list[Tensor]:
        leaves = [net.leaves() for net in plain.nets_of(flow)]
        return both(leaves, lambda: plain.sample_blocked_differentiable([plain.Blocked(n) for n in leaves], z.double()))

    def true_density(unmasked: bool) -> list[Tensor]:
        leaves = [(net.unmasked() if unmasked else net).leaves() for net in plain.nets_of(flow)]
        return both(leaves, lambda: plain.density(leaves, z.double()))

    ours, density, dense, blocked, naive = (copy.deepcopy(flow) for _ in range(5))
    nets = [plain.nets_of(one) for one in (ours, density, dense, blocked, naive)]
    unmasked = [net.unmasked() for net in nets[2]]
    variants = [
        Variant("flowkernels", OURS, lambda: both(nets[0], lambda: ours.inverse(z))),
        Variant(
            "flowkernels density",
            YARDSTICK,
            lambda: both(nets[1], lambda: density.transform(z)),
            partial(true_density, False),
        ),
        Variant(
            "dense pass",
            YARDSTICK,
            lambda: both(nets[2], lambda: plain.density(unmasked, z, multiply=False)),
            partial(true_density, True),
        ),
        Variant(
            "PyTorch, blocked",
            RIVAL,
            lambda: both(nets[3], lambda: plain.sample_blocked_differentiable([plain.Blocked(n) for n in nets[3]], z)),
        ),
    ]
    # D whole networks in one graph: gigabytes soon enough.
    if features * hidden * hidden < 2**26:
        variants.insert(1, Variant("PyTorch", PLAIN, lambda: both(nets[4], lambda: plain.sample_naive(nets[4], z))))
        if _wants(options, "nflows"):
            other = peers.nflows_flow(nets[4])

            def run() -> list[Tensor]:
                x, logdet = other._transform.inverse(z)
                torch.autograd.backward(x.square().sum() + logdet.sum())
                gradients = peers.nflows_gradients(other, nets[4])
                other.zero_grad()
                return [x.detach(), logdet.detach(), *gradients]

            variants.append(Variant("nflows", PEER, run))
    flops = 6.0 * batch * plain.existing_weights(nets[0])
    return Problem(variants, true_sampling, flops=flops, bytes=3 * _bytes(nets[0], batch), grad=True)


# ---- the cases -------------------------------------------------------------------------------------------------------


def sampling(d: int, h: int, b: int, transforms: int = 1, layers: int = 2, sweep: str | None = None) -> Case:
    size = {"D": d, "H": h, "B": b, "transforms": transforms, "layers": layers}
    op, what = ("maf", "sampling") if sweep is None else ("growth", f"sampling over {sweep}")
    return Case(op, what, size, partial(_sampling, d, h, transforms, b, layers, sweep is None), sweep)


def log_prob(d: int, h: int, b: int, transforms: int) -> Case:
    return Case("maf", "log_prob", _size(d, h, b, transforms), partial(_log_prob, d, h, transforms, b))


def training(d: int, h: int, b: int, transforms: int) -> Case:
    return Case("maf", "training step", _size(d, h, b, transforms), partial(_training, d, h, transforms, b))


def rsample(d: int, h: int, b: int) -> Case:
    return Case("maf", "sampling+gradient", _size(d, h, b, 1), partial(_rsample, d, h, b))


def _size(d: int, h: int, b: int, transforms: int) -> dict[str, int]:
    return {"D": d, "H": h, "B": b, "transforms": transforms, "layers": 2}


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            sampling(64, 128, 100),
            sampling(43, 64, 1),
            log_prob(16, 64, 128, 5),
            training(16, 64, 128, 5),
            sampling(5, 50, 1, 5),
            log_prob(5, 50, 1, 5),
            rsample(32, 64, 32),
        ]
    return [
        sampling(784, 1024, 100),
        sampling(63, 512, 1000),
        sampling(43, 512, 1),
        sampling(5, 50, 1, 5),
        sampling(63, 512, 1024, 5),
        sampling(3072, 1024, 64),
        log_prob(63, 512, 1024, 5),
        log_prob(784, 1024, 100, 5),
        log_prob(43, 512, 1, 5),
        log_prob(5, 50, 1, 5),
        training(63, 512, 1024, 5),
        training(5, 50, 128, 5),
        rsample(784, 1024, 100),
        rsample(63, 128, 100),
    ]
