"""masked_linear: a hidden layer of a MADE, bound by arithmetic or, at batch 1, by reading the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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
from flowkernels import ops


def _setting(features: int, hidden: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, degrees, mask of a hidden layer between two of `hidden` units, in a MADE of so many features."""
    g = torch.Generator().manual_seed(0)
    degrees = torch.arange(hidden) % max(1, features - 1) + 1
    x = torch.randn(rows, hidden, generator=g)
    weight = torch.randn(hidden, hidden, generator=g) * (2 / hidden) ** 0.5
    bias = torch.randn(hidden, generator=g)
    return x, weight, bias, degrees, (degrees[:, None] >= degrees).float()


def masked(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return F.linear(x, weight * mask, bias).relu()


def _peers(
    options: Options, degrees: Tensor, mask: Tensor, features: int, weight: Tensor, bias: Tensor
) -> dict[str, torch.nn.Module]:
    found: dict[str, torch.nn.Module] = {}
    hidden = len(degrees)
    if options.wants(PEER, "nflows") and peer("nflows") is not None:
        made = peer("nflows.transforms.made")
        found["nflows"] = made.MaskedLinear(degrees, hidden, features, random_mask=False, is_output=False)
    if options.wants(PEER, "zuko") and peer("zuko") is not None:
        found["zuko"] = peer("zuko.nn").MaskedLinear(mask.bool())
    for layer in found.values():
        with torch.no_grad():
            layer.weight.copy_(weight)  # type: ignore[operator]
            layer.bias.copy_(bias)  # type: ignore[operator]
    return found


def _forward(features: int, hidden: int, rows: int, options: Options) -> Problem:
    x, weight, bias, degrees, mask = _setting(features, hidden, rows)
    once = weight * mask
    fused = compiled(masked)
    variants = [
        Variant(
            "flowkernels",
            OURS,
            lambda: ops.masked_linear(x, weight, bias, in_degrees=degrees, out_degrees=degrees, activation="relu"),
        ),
        Variant("PyTorch", PLAIN, lambda: masked(x, weight, bias, mask)),
        Variant("torch.compile", COMPILED, lambda: fused(x, weight, bias, mask)),
        Variant("PyTorch, masked once", RIVAL, lambda: F.linear(x, once, bias).relu_()),
        Variant(
            "without masks",
            YARDSTICK,
            lambda: F.linear(x, weight, bias).relu_(),
            lambda: [F.linear(x.double(), weight.double(), bias.double()).relu()],
        ),
    ]
    for name, layer in _peers(options, degrees, mask, features, weight, bias).items():
        variants.append(Variant(name, PEER, lambda layer=layer: layer(x).relu_()))  # type: ignore[misc]
    exist = float(mask.sum())
    return Problem(
        variants,
        lambda: [masked(x.double(), weight.double(), bias.double(), mask.double())],
        flops=2.0 * rows * exist,
        bytes=4.0 * (exist + 2 * x.numel()),
    )


def _both(features: int, hidden: int, rows: int, options: Options) -> Problem:
    x, weight, bias, degrees, mask = _setting(features, hidden, rows)
    grad = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1))

    def step(layer: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        y = layer(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    def leaves(*values: Tensor) -> list[Tensor]:
        return [v.detach().clone().requires_grad_() for v in values]

    shared = leaves(x, weight, bias)
    ours = partial(ops.masked_linear, in_degrees=degrees, out_degrees=degrees, activation="relu")
    fused = compiled(lambda x, weight, bias: masked(x, weight, bias, mask))

    def unmasked(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias).relu()

    def truth(layer: Callable[..., Tensor]) -> list[Tensor]:
        return step(layer, leaves(x.double(), weight.double(), bias.double()))

    variants = [
        Variant("flowkernels", OURS, lambda: step(ours, shared)),
        Variant("PyTorch", PLAIN, lambda: step(lambda x, w, b: masked(x, w, b, mask), shared)),
        Variant("torch.compile", COMPILED, lambda: step(fused, shared)),
        Variant("without masks", YARDSTICK, lambda: step(unmasked, shared), lambda: truth(unmasked)),
    ]
    for name, layer in _peers(options, degrees, mask, features, weight, bias).items():
        inputs = [shared[0], layer.weight, layer.bias]
        variants.append(
            Variant(name, PEER, lambda layer=layer, inputs=inputs: step(lambda x, w, b: layer(x).relu(), inputs))  # type: ignore[misc]
        )
    exist = float(mask.sum())
    return Problem(
        variants,
        lambda: truth(lambda x, w, b: masked(x, w, b, mask.double())),
        flops=6.0 * rows * exist,
        bytes=4.0 * (3 * exist + 5 * x.numel()),
        grad=True,
    )


def cases(quick: bool) -> list[Case]:
    sizes = (
        [(8, 32, 1), (16, 64, 128)]
        if quick
        else [(8, 64, 1), (43, 512, 1), (63, 512, 128), (63, 512, 1024), (784, 1024, 1024)]
    )
    found = []
    for features, hidden, rows in sizes:
        size = {"D": features, "H": hidden, "B": rows}
        found += [
            Case("masked_linear", "forward", size, partial(_forward, features, hidden, rows)),
            Case("masked_linear", "forward+backward", size, partial(_both, features, hidden, rows)),
        ]
    return found
