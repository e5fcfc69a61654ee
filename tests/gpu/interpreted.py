"""Checks of the Triton kernels under TRITON_INTERPRET=1; `python tests/gpu/interpreted.py affine_coupling`."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from cases import (
    PLANS,
    affine_options,
    assert_as_close,
    between_permutations,
    check_affine,
    check_gumbel_argmax,
    check_maf,
    check_masked_linear,
    check_rq_spline,
    check_rq_spline_extremes,
    made_masks,
    spline_plan,
)

from flowkernels.plan import ACTIVATIONS, Plan
from flowkernels.scales import ScaleLaw
from flowkernels.testing import LAYOUTS
from flowkernels.transforms import LRSpline, RQSpline


def interpreted(kernel: object) -> None:
    assert type(kernel).__name__ == "InterpretedFunction", "TRITON_INTERPRET=1 came too late"


def affine_coupling() -> None:
    from flowkernels.ops.affine_coupling import triton as kernels

    interpreted(kernels.forward_kernel)
    for law, form, inverse in affine_options():
        for dtype in (torch.float64, torch.float32):
            check_affine(kernels, 3, 5, dtype, law, form, inverse)
    for layout in ("contiguous", "interleaved", "blocked", "transposed", "masked", "compact"):
        for rows, features in ((0, 5), (1, 1), (9, 7), (2, 1030), (70, 16)):
            check_affine(
                kernels, rows, features, torch.float32, ScaleLaw("softplus"), "scale_shift", False, layout=layout
            )


def rq_spline() -> None:
    from flowkernels.ops.rq_spline import triton as kernels

    interpreted(kernels.forward_kernel)
    for style in ("nflows", "zuko", "linear"):
        for inverse in (False, True):
            for dtype in (torch.float64, torch.float32):
                check_rq_spline(kernels, 125, 31, 3, dtype, style, inverse)
            check_rq_spline_extremes(kernels, torch.float32, style, inverse)
    for rows, bins, dtype, style, inverse in (
        (125, 8, torch.float32, "nflows", True), (125, 8, torch.bfloat16, "linear", False),
        (125, 2, torch.float16, "pyro", True), (8, 64, torch.float32, "zuko", False),
    ):  # fmt: skip
        check_rq_spline(kernels, rows, 31, bins, dtype, style, inverse)
    for layout in LAYOUTS:
        check_rq_spline(kernels, 9, 5, 2, torch.float32, "nflows", True, layout=layout)
    for rows, features in ((0, 5), (5, 0), (1, 1), (2, 4100)):
        check_rq_spline(kernels, rows, features, 2, torch.float32, "linear", False)


def masked_linear() -> None:
    from flowkernels.ops.masked_linear import triton as kernels

    interpreted(kernels.forward_kernel)
    check_masked_linear(kernels.masked_linear, kernels.masked_linear_backward, torch.float32)


def maf() -> None:
    from flowkernels.ops.maf import triton as kernels

    interpreted(kernels.sweep_kernel)
    plans = {
        "one_feature": 1, "no_hidden": 3, "shuffled": 5, "residual_context": 5, "wide_step": 5, "blocked_layout": 5
    }  # fmt: skip
    for inverse in (True, False):
        for plan, samples in plans.items():
            check_maf(kernels, [PLANS[plan]()], samples, torch.float32, inverse)
        check_maf(kernels, [Plan(made_masks(16, [70]), activation="tanh")], 70, torch.float64, inverse)
        check_maf(kernels, [PLANS["small"]()], 0, torch.float32, inverse)
        for weights in (torch.float16, torch.bfloat16):
            check_maf(kernels, [PLANS["two_layers"]()], 5, torch.float32, inverse, weights=weights)
        laws = [ScaleLaw("tanh", bound=1.5), ScaleLaw("sigmoid", floor=0.1)]
        check_maf(kernels, [PLANS["small"](), PLANS["small"]()], 3, torch.float32, inverse, law=laws)
        for activation in ACTIVATIONS:
            plan = Plan(made_masks(3, [4]), activation=activation)
            check_maf(kernels, [plan], 2, torch.float32, inverse, law="sigmoid", form="gate")


def maf_splines() -> None:
    from flowkernels.ops.maf import triton as kernels

    interpreted(kernels.sweep_kernel)
    for inverse in (True, False):
        for spline in (RQSpline("nflows", 3, bound=2.0), RQSpline("zuko", 3), LRSpline(2)):
            plan = between_permutations(spline_plan(spline, 3, [5, 4], activation="tanh"))
            check_maf(kernels, [plan], 5, torch.float32, inverse, law=spline)
        check_maf(kernels, [spline_plan(spline, 2, [3])], 40, torch.float64, inverse, law=spline)
        check_maf(kernels, [plan], 0, torch.float32, inverse, law=spline)
        laws = [ScaleLaw("tanh", bound=1.5), spline, ScaleLaw("sigmoid", floor=0.1)]
        plans = [Plan(made_masks(3, [4])), plan, between_permutations(Plan(made_masks(3, [4], shuffled=True)))]
        check_maf(kernels, plans, 3, torch.float32, inverse, law=laws)
    # More features in one step than a tile has, and more than a program of the density direction takes.
    wide = [torch.ones(6, 20) * (torch.arange(20) < 18), torch.cat([torch.zeros(126, 6), torch.ones(14, 6)])]
    spline = LRSpline(2)
    plan = Plan(wide, parameters=spline.parameter_names)
    check_maf(kernels, [plan], 3, torch.float32, True, law=spline)
    check_maf(kernels, [spline_plan(spline, 70, [3])], 2, torch.float32, False, law=spline)


def either_layout() -> None:
    """What C++ packs or keeps Triton reads, and the other way round: each may run a part of one chain."""
    import build
    from flowkernels.ops.maf import triton as kernels

    build.load_host_libraries()
    names = ("maf_pack", "maf_forward", "maf_inverse", "maf_forward_backward", "maf_inverse_backward")
    compiled = torch.ops.flowkernels_cuda
    for plan in ("shuffled", "residual_context"):  # activations whose slopes need the input, or only the output
        for forwards, backwards in ((kernels, compiled), (compiled, kernels)):
            mixed = {n: getattr(backwards if n.endswith("backward") else forwards, n) for n in names}
            for inverse in (True, False):
                check_maf(SimpleNamespace(**mixed), [PLANS[plan]()], 5, torch.float32, inverse)
    spline = RQSpline("nflows", 2)
    for forwards, backwards in ((kernels, compiled), (compiled, kernels)):
        mixed = {n: getattr(backwards if n.endswith("backward") else forwards, n) for n in names}
        for inverse in (True, False):
            plan = spline_plan(spline, 3, [4], activation="silu")
            check_maf(SimpleNamespace(**mixed), [plan], 5, torch.float32, inverse, law=spline)


def gumbel() -> None:
    from flowkernels.ops.gumbel_argmax import triton as argmax
    from flowkernels.ops.gumbel_softmax import reference, triton

    interpreted(triton.forward_kernel)
    generator = torch.Generator().manual_seed(0)
    for rows, classes in ((0, 3), (1, 1), (7, 5), (3, 130), (2, 2100)):
        logits = torch.randn(rows, classes, generator=generator)
        tau = torch.rand(rows, generator=generator) + 0.5
        seed = torch.tensor(0x123456789ABCDEF)
        for stream in (0, 3):
            soft = triton.gumbel_softmax(logits, tau, seed, stream, False)
            plain = reference.gumbel_softmax(logits, tau, seed, stream, False)
            exact = reference.gumbel_softmax(logits, tau, seed, stream, False).double()
            assert (soft - plain).abs().max().item() < 2e-6 if rows else True
            hard = triton.gumbel_softmax(logits, tau, seed, stream, True)
            assert torch.equal(hard, reference.gumbel_softmax(logits, tau, seed, stream, True))
            grad = torch.randn(rows, classes, generator=generator)
            for a, b, c in zip(
                triton.gumbel_softmax_backward(grad, soft, tau, True),
                reference.gumbel_softmax_backward(grad, soft, tau, True),
                reference.gumbel_softmax_backward(grad.double(), soft.double(), tau.double(), True),
                strict=True,
            ):
                assert_as_close("gumbel_softmax_backward", a, b, c)
            del exact
        check_gumbel_argmax(argmax.gumbel_argmax, rows, classes, torch.float32, samples=(0, 1, 3, 40))


if __name__ == "__main__":
    checks = (affine_coupling, rq_spline, masked_linear, maf, maf_splines, either_layout, gumbel)
    {check.__name__: check for check in checks}[sys.argv[1]]()
    print(f"{sys.argv[1]}: as the reference says")
