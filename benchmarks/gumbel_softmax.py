"""gumbel_softmax beside torch.nn.functional.gumbel_softmax: bound by drawing noise and by memory.

What is timed draws new noise at every call. What is checked is the same call with its noise fixed, against softmax of
the logits plus that noise in float64, and of the unfixed one that its rows sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import flowkernels as fk
from benchmarks.core import COMPILED, OURS, PLAIN, Case, Options, Problem, Variant, compiled
from flowkernels import ops

TAU, SEED = 0.7, 7


def _problem(rows: int, classes: int, hard: bool, backward: bool, options: Options) -> Problem:
    g = torch.Generator().manual_seed(0)
    logits, weight = torch.randn(rows, classes, generator=g), torch.randn(rows, classes, generator=g)
    leaf = logits.clone().requires_grad_() if backward else logits

    def step(sample: Callable[[Tensor], Tensor], at: Tensor) -> list[Tensor]:
        y = sample(at)
        return [y.detach(), torch.autograd.grad(y, at, weight.to(y.dtype))[0]] if backward else [y]

    def true(noise: Tensor) -> list[Tensor]:
        at = logits.double().requires_grad_(backward)

        def sample(at: Tensor) -> Tensor:
            perturbed = at + noise.double()
            soft = (perturbed / TAU).softmax(-1)
            if not hard:
                return soft
            return F.one_hot(perturbed.argmax(-1), classes).double() + (soft - soft.detach())

        return [*step(sample, at), torch.ones(rows)]

    def our_truth() -> list[Tensor]:
        with fk.use_backend("reference"):
            return true(fk.random.gumbel(rows, classes, seed=SEED))

    def torch_truth() -> list[Tensor]:
        torch.manual_seed(SEED)
        return true(-torch.empty(rows, classes).exponential_().log())

    def seeded(out: list[Tensor]) -> list[Tensor]:
        torch.manual_seed(SEED)
        return [*step(plain, leaf), out[0].sum(-1)]

    ours = partial(ops.gumbel_softmax, tau=TAU, hard=hard)
    plain = partial(F.gumbel_softmax, tau=TAU, hard=hard)
    fused = compiled(plain)
    return Problem(
        [
            Variant(
                "flowkernels",
                OURS,
                lambda: step(ours, leaf),
                result=lambda out: [*step(partial(ours, seed=SEED), leaf), out[0].sum(-1)],
            ),
            Variant("PyTorch", PLAIN, lambda: step(plain, leaf), torch_truth, seeded),
            # The compiled generator draws other numbers; its rows' sums have to do.
            Variant(
                "torch.compile",
                COMPILED,
                lambda: step(fused, leaf),
                lambda: [torch.ones(rows)],
                lambda out: [out[0].sum(-1)],
            ),
        ],
        our_truth,
        bytes=4.0 * logits.numel() * (5 if backward else 2),
        grad=backward,
    )


def cases(quick: bool) -> list[Case]:
    sizes = [(1, 8), (512, 64)] if quick else [(1, 10), (512, 64), (4096, 256), (65536, 256)]
    found = []
    for rows, classes in sizes:
        size = {"N": rows, "D": classes}
        for what, hard, backward in (
            ("forward", False, False),
            ("forward, hard", True, False),
            ("forward+backward", False, True),
        ):
            found.append(Case("gumbel_softmax", what, size, partial(_problem, rows, classes, hard, backward)))
    return found
