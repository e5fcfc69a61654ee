"""affine_coupling: y = sigma(u) x + t and its log-det, bound by memory. The file to copy for a new operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
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
    both_ways,
    compiled,
    peer,
    with_gradients,
)
from flowkernels import ops
from flowkernels.nn.masks import alternating_mask, half_mask


def forward(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x * scale.exp() + shift, scale.sum(-1)


def inverse(y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return (y - shift) * torch.exp(-scale), -scale.sum(-1)


def _in_place(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One fresh tensor instead of three."""
    return scale.exp().mul_(x).add_(shift), scale.sum(-1)


def _normflows(shift: Tensor, scale: Tensor, inverse: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """normflows' affine coupling layer, its conditioner's output given: [shift, scale] of each feature side by side."""
    parameters = torch.stack([shift, scale], -1).flatten(1)

    class Given(torch.nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return parameters

    layer = peer("normflows.flows").AffineCoupling(Given(), scale=True, scale_map="exp")
    call = layer.inverse if inverse else layer

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        (_, y), logdet = call([x[:, :0], x])
        return y, logdet

    return run


def _inputs(rows: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, shift, scale = (torch.randn(rows, features, generator=g) for _ in range(3))
    return x, shift, scale * 0.5


def _once(backwards: bool, rows: int, features: int, memory: str, options: Options) -> Problem:
    x, shift, scale = _inputs(rows, features)
    plain = inverse if backwards else forward
    ours = partial(ops.affine_coupling, inverse=backwards)
    fused = compiled(plain)
    variants = [
        Variant("flowkernels", OURS, lambda: ours(x, shift, scale)),
        Variant("PyTorch", PLAIN, lambda: plain(x, shift, scale)),
        Variant("torch.compile", COMPILED, lambda: fused(x, shift, scale)),
    ]
    if not backwards:
        variants.append(Variant("PyTorch, in place", RIVAL, lambda: _in_place(x, shift, scale)))
    if options.wants(PEER, "normflows") and peer("normflows") is not None:
        layer = _normflows(shift, scale, backwards)
        variants.append(Variant("normflows", PEER, lambda: layer(x)))
    return Problem(
        variants,
        lambda: plain(x.double(), shift.double(), scale.double()),
        bytes=4.0 * (4 * x.numel() + rows),
        reuse_memory=memory == "reused",
        least=1.0,
    )


def _alternating(rows: int, features: int, options: Options) -> Problem:
    """Every second feature is transformed, and only those have parameters; the half split is what to measure by."""
    x, shift, scale = _inputs(rows, features)
    mask, half = alternating_mask(features), half_mask(features)
    chosen = mask.nonzero().flatten()
    shift, scale = shift[:, : len(chosen)].contiguous(), scale[:, : len(chosen)].contiguous()

    def plain(x: Tensor, shift: Tensor, scale: Tensor, chosen: Tensor = chosen) -> tuple[Tensor, Tensor]:
        part, logdet = forward(x[:, chosen], shift, scale)
        return x.index_copy(1, chosen, part), logdet

    def truth(chosen: Tensor = chosen) -> tuple[Tensor, Tensor]:
        return plain(x.double(), shift.double(), scale.double(), chosen)

    fused = compiled(plain)
    split = half.nonzero().flatten()
    return Problem(
        [
            Variant("flowkernels", OURS, lambda: ops.affine_coupling(x, shift, scale, mask=mask)),
            Variant("PyTorch", PLAIN, lambda: plain(x, shift, scale)),
            Variant("torch.compile", COMPILED, lambda: fused(x, shift, scale)),
            Variant(
                "half split",
                YARDSTICK,
                lambda: ops.affine_coupling(x, shift, scale, mask=half),
                truth=lambda: truth(split),
            ),
        ],
        truth,
        bytes=4.0 * (3 * x.numel() + rows),
        least=1.0,
    )


def _both(rows: int, features: int, memory: str, options: Options) -> Problem:
    given = _inputs(rows, features)
    step = with_gradients(given)
    fused = compiled(forward)
    return Problem(
        [
            Variant("flowkernels", OURS, lambda: step(ops.affine_coupling)),
            Variant("PyTorch", PLAIN, lambda: step(forward)),
            Variant("torch.compile", COMPILED, lambda: step(fused)),
        ],
        lambda: with_gradients(given, dtype=torch.float64)(forward),
        # Forward: three in, one out. Backward: grad_y, x and scale in, three gradients out.
        bytes=4.0 * (4 + 6) * given[0].numel(),
        grad=True,
        reuse_memory=memory == "reused",
        least=1.0,
    )


def cases(quick: bool) -> list[Case]:
    sizes = [(1, 8), (1000, 64)] if quick else [(1, 8), (100, 64), (4096, 64), (65536, 256)]
    rows, features = sizes[-1]
    size: dict[str, int | str] = {"N": rows, "D": features}
    alternating = partial(_alternating, rows, features)
    found = [Case("affine_coupling", "forward, alternating mask", size, alternating)]
    for rows, features in sizes:
        # More than 32 MB come as fresh pages from the system at every call, unless the C library may keep them.
        for memory in ("fresh", "reused") if rows * features >= 2**23 else ("fresh",):
            size = {"N": rows, "D": features, "memory": memory}
            found += both_ways("affine_coupling", size, _once, _both)
    return found
