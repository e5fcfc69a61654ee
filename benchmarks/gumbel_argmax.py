"""gumbel_argmax beside torch.multinomial on softmaxed logits: bound by drawing noise, for several samples by exp.

What is timed draws new noise at every call. Checked is the same call with its noise fixed: the log-probabilities
against log_softmax in float64; of one sample, that it is the argmax of the logits plus the noise; of several, that
the categories' cumulated probabilities enclose the uniform numbers. Of the samples of torch, that they are categories.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import flowkernels as fk
from benchmarks.core import OURS, PLAIN, Case, Options, Problem, Variant
from flowkernels import ops
from flowkernels.random import uniform_of_pairs

SEED = 7


def _problem(rows: int, classes: int, samples: int, options: Options) -> Problem:
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))

    def uniform() -> Tensor:
        return uniform_of_pairs(fk.random.bits(rows, samples, 2, seed=SEED))

    def truth() -> list[Tensor]:
        with fk.use_backend("reference"):
            drawn = uniform() if samples > 1 else ops.gumbel_argmax(logits, seed=SEED)[0].double()
        return [drawn, torch.zeros(rows, samples)]

    def seeded(_: object) -> list[Tensor]:
        index, log_prob = ops.gumbel_argmax(logits, samples, seed=SEED)
        log_p = logits.double().log_softmax(-1)
        error = (log_prob - log_p.gather(-1, index)).float()
        if samples == 1:
            return [index.double(), error]
        # The number in the category's interval that is nearest to the one drawn: itself, up to rounding.
        sums = torch.nn.functional.pad(log_p.exp().cumsum(-1), (1, 0))
        return [uniform().clamp(sums.gather(-1, index), sums.gather(-1, index + 1)), error]

    return Problem(
        [
            Variant("flowkernels", OURS, lambda: ops.gumbel_argmax(logits, samples), result=seeded),
            Variant(
                "PyTorch",
                PLAIN,
                lambda: torch.multinomial(logits.softmax(-1), samples, replacement=samples > 1),
                lambda: [torch.ones(rows, samples)],
                lambda index: [((index >= 0) & (index < classes)).float()],
            ),
        ],
        truth,
        bytes=4.0 * logits.numel(),
        least=1.0,
    )


def cases(quick: bool) -> list[Case]:
    sizes = [(1, 8), (512, 64)] if quick else [(1, 10), (512, 64), (4096, 256), (65536, 256)]
    return [
        Case("gumbel_argmax", "samples", {"N": n, "D": d, "k": k}, partial(_problem, n, d, k))
        for n, d in sizes
        for k in (1, 4, 64)
    ]
