"""gumbel_argmax beside torch.multinomial on softmaxed logits: bound by drawing noise, for several samples by exp.

What is timed draws new noise at every call. Checked is the same call with its noise fixed, against the argmax of
the logits plus that noise and log_softmax in float64; of the samples of torch, that they are categories.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import flowkernels as fk
from benchmarks.core import OURS, PLAIN, RIVAL, Case, Options, Problem, Variant
from flowkernels import ops

SEED = 7


def _problem(rows: int, classes: int, samples: int, options: Options) -> Problem:
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))

    def truth() -> list[Tensor]:
        with fk.use_backend("reference"):
            index, _ = ops.gumbel_argmax(logits, samples, seed=SEED)
        return [index.double(), logits.double().log_softmax(-1).gather(-1, index)]

    def seeded(_: object) -> list[Tensor]:
        index, log_prob = ops.gumbel_argmax(logits, samples, seed=SEED)
        return [index.double(), log_prob]

    def multinomial(name: str, kind: str, replacement: bool) -> Variant:
        return Variant(
            name,
            kind,
            lambda: torch.multinomial(logits.softmax(-1), samples, replacement=replacement),
            lambda: [torch.ones(rows, samples)],
            lambda index: [((index >= 0) & (index < classes)).float()],
        )

    # A single sample is the same with and without replacement; torch takes another way.
    rival = [multinomial("PyTorch, with replacement", RIVAL, True)] if samples == 1 else []
    return Problem(
        [
            Variant("flowkernels", OURS, lambda: ops.gumbel_argmax(logits, samples), result=seeded),
            multinomial("PyTorch", PLAIN, samples > 1),
            *rival,
        ],
        truth,
        bytes=4.0 * logits.numel(),
    )


def cases(quick: bool) -> list[Case]:
    sizes = [(1, 8), (512, 64)] if quick else [(1, 10), (512, 64), (4096, 256), (65536, 256)]
    return [
        Case("gumbel_argmax", "samples", {"N": n, "D": d, "k": k}, partial(_problem, n, d, k))
        for n, d in sizes
        for k in (1, 4, 64)
    ]
