"""`fk.accelerate` on the flows of other libraries: each flow against itself, before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import flowkernels as fk
from benchmarks.core import OURS, PEER, Case, Options, Problem, Variant, peer


def _randomise(model: nn.Module, gain: float = 0.5) -> nn.Module:
    """Weights of a size that matters, and small enough that a chain of inverses does not magnify every rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.1 if p.dim() < 2 else gain * p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


# ---- the flows, as their users build them ----------------------------------------------------------------------------


def nflows(features: int, hidden: int, transforms: int, residual: bool = False) -> nn.Module:
    """Two hidden layers, or nflows' default: two residual blocks."""
    t = peer("nflows.transforms")
    chain = []
    for i in range(transforms):
        if i:
            chain.append(t.ReversePermutation(features))
        blocks = 2 if residual else 1
        chain.append(
            t.MaskedAffineAutoregressiveTransform(features, hidden, num_blocks=blocks, use_residual_blocks=residual)
        )
    base = peer("nflows.distributions.normal").StandardNormal([features])
    flow: nn.Module = peer("nflows.flows").Flow(t.CompositeTransform(chain), base)
    return flow


def zuko(features: int, hidden: int, transforms: int) -> nn.Module:
    flow: nn.Module = peer("zuko.flows").MAF(features, transforms=transforms, hidden_features=(hidden, hidden))
    return flow


def normflows(features: int, hidden: int, transforms: int) -> nn.Module:
    n = peer("normflows")
    chain = [
        n.flows.MaskedAffineAutoregressive(features, hidden, num_blocks=1, use_residual_blocks=False)
        for _ in range(transforms)
    ]
    flow: nn.Module = n.NormalizingFlow(n.distributions.DiagGaussian(features, trainable=False), chain)
    return flow


def pyro(features: int, hidden: int, transforms: int, spline: bool = False) -> nn.Module:
    """Affine transforms, or Pyro's default splines: linear-rational, 8 bins."""
    t = peer("pyro.distributions.transforms")
    make = t.spline_autoregressive if spline else t.affine_autoregressive
    torch.manual_seed(0)
    return nn.ModuleList(make(features, [hidden, hidden]) for _ in range(transforms))


def _pyro_logdet(part: Any) -> Tensor:
    """Of the last call; through the public method, whose cache knows its input, the next one would cost nothing."""
    kept: Tensor = part._cached_log_scale if hasattr(part, "_cached_log_scale") else part._cache_log_detJ
    return kept.sum(-1)


def _pyro_sequential(flow: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(x.shape[:-1])
    for part in reversed(list(flow)):
        y, x = x, part._inverse(x)
        total = total - _pyro_logdet(part)
        del y
    return x, total


def _pyro_one_pass(flow: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    total = z.new_zeros(z.shape[:-1])
    for part in flow:
        z = part._call(z)
        total = total - _pyro_logdet(part)
    return z, total


def _normal(z: Tensor) -> Tensor:
    log_prob: Tensor = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    return log_prob.sum(-1)


def _pyro_log_prob(flow: Any, x: Tensor) -> Tensor:
    z, logdet = _pyro_sequential(flow, x)
    return _normal(z) + logdet


def _normflows_log_prob(flow: Any, x: Tensor) -> Tensor:
    log_prob: Tensor = flow.log_prob(x)
    return log_prob


# What a library's user calls, per direction: the sequential one, the one-pass one, and a loss to train with.
_CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "nflows": (
        lambda flow, z: flow._transform.inverse(z),
        lambda flow, x: flow.log_prob(x),
        lambda flow, x: -flow.log_prob(x).mean(),
    ),
    "zuko": (
        lambda flow, z: flow().transform.inv(z),
        lambda flow, x: flow().log_prob(x),
        lambda flow, x: -flow().log_prob(x).mean(),
    ),
    "normflows": (
        _normflows_log_prob,
        lambda flow, z: flow.forward_and_log_det(z),
        lambda flow, z: sum(t.mean() for t in flow.forward_and_log_det(z)),
    ),
    "pyro": (
        _pyro_log_prob,
        _pyro_one_pass,
        lambda flow, z: sum(t.mean() for t in _pyro_one_pass(flow, z)),
    ),
}
_BUILD: dict[str, Callable[..., nn.Module]] = {"nflows": nflows, "zuko": zuko, "normflows": normflows, "pyro": pyro}


def _problem(
    library: str, what: int, features: int, hidden: int, transforms: int, batch: int, more: dict[str, Any], _: Options
) -> Problem:
    # Residual blocks add up: with larger weights the inverse of five transforms ends at 1e32, in either library.
    flow = _randomise(_BUILD[library](features, hidden, transforms, **more), 0.2 if more.get("residual") else 0.5)
    fast, exact = fk.accelerate(flow, inplace=False), copy.deepcopy(flow).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, features, generator=generator)
    call = _CALLS[library][what]

    if what < 2:
        # Pyro starts its inverse with zeros of the default dtype.
        def truth() -> list[Tensor]:
            torch.set_default_dtype(torch.float64)
            try:
                return _as_list(call(exact, x.double()))
            finally:
                torch.set_default_dtype(torch.float32)

        variants = [
            Variant("flowkernels", OURS, lambda: call(fast, x)),
            Variant(library, PEER, lambda: call(flow, x)),
        ]
        return Problem(variants, truth, least=1.0, reference=library)

    # The learning rate is 0: the optimizer writes the parameters, and they keep their values.
    def step(model: nn.Module) -> Callable[[], Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

        def run() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = call(model, x)
            torch.autograd.backward(loss)
            optimizer.step()
            return loss.detach()

        return run

    def with_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    def true_step() -> list[Tensor]:
        loss = call(exact, x.double())
        loss.backward()
        return with_gradients(exact, loss.detach())

    variants = [
        Variant(name, kind, step(model), result=partial(with_gradients, model))
        for name, kind, model in (("flowkernels", OURS, fast), (library, PEER, flow))
    ]
    return Problem(variants, true_step, grad=True, reference=library)


def _as_list(result: Any) -> list[Tensor]:
    return [t.detach() for t in ([result] if isinstance(result, Tensor) else result)]


def _names(library: str) -> tuple[str, str, str]:
    if library in ("nflows", "zuko"):
        return "sampling", "log_prob", "training step"
    return "log_prob (sequential)", "sampling (one pass)", "training step on samples"


# Options of the flows above, as a case's size names them.
_SIZES = {"residual": ("blocks", "residual"), "spline": ("spline", "linear")}


def case(library: str, what: int, d: int, h: int, b: int, transforms: int, **more: Any) -> Case:
    name = f"{library} {_names(library)[what]}"
    size: dict[str, int | str] = {"D": d, "H": h, "B": b, "transforms": transforms}
    size.update(_SIZES[option] for option in more)
    return Case("accelerate", name, size, partial(_problem, library, what, d, h, transforms, b, more))


def cases(quick: bool) -> list[Case]:
    installed = [library for library in _BUILD if peer(library) is not None]
    if quick:
        found = [case(library, what, 8, 32, 16, 2) for library in installed for what in range(3)]
        if "pyro" in installed:
            found += [case("pyro", what, 8, 32, 16, 2, spline=True) for what in range(3)]
        return found
    found = [case(library, 0, 784, 1024, 100, 1) for library in installed]
    for library in installed:
        found += [case(library, what, 43, 512, 1000, 5) for what in range(3)]
        found += [case(library, what, 5, 50, 1, 5) for what in range(2)]
        found += [case(library, what, 5, 50, 100, 5) for what in range(3)]
    if "pyro" in installed:
        found += [case("pyro", what, 43, 512, 100, 5, spline=True) for what in range(3)]
        found += [case("pyro", what, 5, 50, 1, 5, spline=True) for what in range(2)]
    if "nflows" in installed:
        found += [case("nflows", what, 43, 512, 1000, 5, residual=True) for what in range(3)]
    return found
