"""Autoregressive networks for tests: from a few names, or drawn by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from flowkernels import testing
from flowkernels.nn.made import MADE
from flowkernels.ops import maf_forward, maf_inverse
from flowkernels.plan import ACTIVATIONS, Plan
from flowkernels.scales import NAMES, ScaleLaw

# Every law and form that exists, and the variants of a law that take another branch.
TRANSFORMS: list[tuple[str | ScaleLaw, str]] = [
    *((law, form) for law in NAMES for form in ("scale_shift", "shift_scale")),
    (ScaleLaw("softplus", floor=0.0), "scale_shift"),
    (ScaleLaw("sigmoid", offset=1.0, floor=0.0), "scale_shift"),
    (ScaleLaw("clip", pass_gradient=0.0), "scale_shift"),
    ("sigmoid", "gate"),
    (ScaleLaw("sigmoid", offset=2.0, floor=0.0), "gate"),
]


def masks_of(degrees: Sequence[Tensor], per: int = 2) -> list[Tensor]:
    """Masks from the degrees of the features and of every hidden layer: the convention of Germain et al."""
    masks = [o[:, None] >= i[None, :] for i, o in pairwise(degrees)]
    out = degrees[0].repeat_interleave(per)
    return [*masks, out[:, None] > degrees[-1][None, :]]


def parameters_of(plan: Plan, dtype: torch.dtype = torch.float64, *, seed: int = 0, gain: float = 1.0) -> list[Tensor]:
    """Dense weights and biases, also where the masks hide them: nobody may read those."""
    parameters = []
    for i, mask in enumerate(plan.masks):
        rows, columns = mask.shape
        spread = gain / math.sqrt(max(1, columns))
        parameters.append(testing.random_tensor((rows, columns), dtype, seed=seed + 2 * i, spread=spread))
        parameters.append(testing.random_tensor((rows,), dtype, seed=seed + 2 * i + 1, spread=0.5))
    return parameters


def inputs_of(
    plan: Plan, rows: int, dtype: torch.dtype = torch.float64, *, layout: str = "contiguous", seed: int = 0
) -> list[Tensor | None]:
    """What `bound` takes: x or z, context or None, and the parameters."""
    x = testing.random_tensor((rows, plan.features), dtype, layout=layout, seed=seed + 50)
    context = None
    if plan.context_width:
        context = testing.random_tensor((rows, plan.context_width), dtype, layout=layout, seed=seed + 51)
    return [x, context, *parameters_of(plan, dtype, seed=seed)]


def bound(plan: Plan, *, inverse: bool, **options: Any) -> testing.Call:
    """An operator as a function of its tensors alone."""
    run = maf_inverse if inverse else maf_forward

    def call(x: Tensor, context: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return run(x, plan, parameters, context=context, **options)

    return call


def made_plan(features: int, hidden: Sequence[int], **options: Any) -> Plan:
    return MADE(features, hidden, **options).plan


def grouped_plan(groups: Sequence[int], hidden: Sequence[Sequence[int]], **options: Any) -> Plan:
    """Features of the same group are generated in the same step; `hidden` gives the degrees of each layer."""
    return Plan(masks_of([torch.tensor(groups), *map(torch.tensor, hidden)]), **options)


def named_plans() -> dict[str, Plan]:
    """One plan of every kind that the library promises, small enough for finite differences."""
    torch.manual_seed(7)
    return {
        "natural": made_plan(5, (8, 7)),
        "reversed": made_plan(5, (8, 7), order="reversed"),
        "random_order": made_plan(5, (8, 7), order="random"),
        "given_order": made_plan(5, (8, 7), order=[3, 0, 4, 1, 2]),
        "random_degrees": made_plan(5, (9, 8, 6), degrees="random"),
        "given_degrees": made_plan(4, (3, 5), degrees=[[3, 0, 1], [2, 2, 1, 3, 0]]),
        "narrow": made_plan(7, (3, 2)),
        "one_unit": made_plan(4, (1,)),
        "no_hidden": made_plan(5, ()),
        "four_layers": made_plan(4, (6, 3, 7, 5)),
        "residual": made_plan(5, (8, 8), residual=True, activation="elu"),
        "residual_random": made_plan(5, (8, 8), residual=True, degrees="random", order="random"),
        "context": made_plan(4, (7, 6), context_features=3),
        "context_residual": made_plan(4, (7,), context_features=3, residual=True, activation="tanh"),
        "context_everywhere": Plan(made_plan(3, (5, 4), context_features=1).masks, context=(0, 1, 2)),
        "context_no_hidden": made_plan(3, (), context_features=2),
        "grouped": grouped_plan([1, 1, 2, 0, 2, 1], [[0, 1, 1, 0, 2], [1, 0, 1]], activation="silu"),
        "independent": grouped_plan([0, 0, 0], [[0, 0]]),
        "one_feature": made_plan(1, (4, 3)),
        "one_feature_context": made_plan(1, (4,), context_features=2),
        "one_feature_no_hidden": made_plan(1, ()),
        "blocked_layout": Plan(
            [
                *made_plan(4, (6,)).masks[:-1],
                made_plan(4, (6,)).masks[-1].reshape(4, 2, 6).transpose(0, 1).reshape(8, 6),
            ],
            layout="blocked",
        ),
        "scale_first": Plan(made_plan(4, (6,)).masks, parameters=("scale", "shift")),
        "mixed_activations": Plan(made_plan(4, (6, 5, 6)).masks, activation=("gelu", "leaky_relu", "silu")),
    }


@st.composite
def plans(draw: st.DrawFn, most_features: int = 24, most_units: int = 60) -> Plan:
    """Plans of every kind: drawn degrees, orders, groups, sparsity, residuals, context, layouts, activations."""
    features = draw(st.integers(1, most_features))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):  # one feature per step
        degrees = [torch.randperm(features, generator=generator) + 1]
    else:
        degrees = [torch.randint(1, draw(st.integers(1, features)) + 1, (features,), generator=generator)]
    top = int(degrees[0].max())
    residual: list[int | None]
    if draw(st.booleans()):
        blocks, width = draw(st.integers(1, 2)), draw(st.integers(1, most_units))
        stem = torch.randint(0, top + 1, (width,), generator=generator)
        degrees += [stem] * (1 + 2 * blocks)
        residual = [None] * (1 + 2 * blocks)
        residual[2::2] = list(range(0, 2 * blocks, 2))
    else:
        widths = draw(st.lists(st.integers(1, most_units), max_size=3))
        degrees += [torch.randint(0, top + 1, (width,), generator=generator) for width in widths]
        residual = [None] * len(widths)
    masks = masks_of(degrees)
    if draw(st.booleans()):  # a graph sparser than its degrees allow
        masks = [m & (torch.rand(m.shape, generator=generator) < 0.6) for m in masks]
    layout = draw(st.sampled_from(("interleaved", "blocked")))
    if layout == "blocked":
        last = masks[-1]
        masks[-1] = last.reshape(features, 2, -1).transpose(0, 1).reshape(last.shape)
    hidden = len(masks) - 1
    return Plan(
        masks,
        activation=[draw(st.sampled_from(ACTIVATIONS)) for _ in range(hidden)],
        residual=residual,
        context=draw(st.lists(st.integers(0, hidden), unique=True)) if draw(st.booleans()) else (),
        parameters=draw(st.permutations(["shift", "scale"])),
        layout=layout,
    )
