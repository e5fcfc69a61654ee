"""The CUDA C++ kernels, built as host C++ (tests/cuda/host_shim.h), against the references."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    PLANS,
    affine_options,
    check_affine,
    check_dequantize,
    check_element_layouts,
    check_elements,
    check_gumbel_argmax,
    check_logistic_mixture,
    check_maf,
    check_masked_linear,
    check_rq_spline,
    check_rq_spline_extremes,
    made_masks,
    spline_plan,
)
from torch import Tensor

import flowkernels as fk
from flowkernels.ops import maf
from flowkernels.ops.logistic_mixture import reference as logistic_mixture
from flowkernels.ops.maf import cuda as maf_cuda
from flowkernels.ops.masked_linear import cuda as masked_linear_cuda
from flowkernels.ops.masked_linear.degrees import sorted_degrees
from flowkernels.ops.rq_spline import reference as rq_spline
from flowkernels.plan import Plan
from flowkernels.scales import FORMS, NAMES, ScaleLaw
from flowkernels.transforms import LRSpline, RQSpline, Spline, code_and_numbers

FLOATS = (torch.float64, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_affine_coupling(host_kernels: Any, dtype: torch.dtype) -> None:
    for law, form, inverse in affine_options():
        check_affine(host_kernels, 3, 8, dtype, law, form, inverse)


@pytest.mark.parametrize("layout", ["contiguous", "interleaved", "blocked", "transposed", "masked", "compact"])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (9, 7), (2, 64), (3, 1030), (17, 256)], ids=str)
def test_affine_coupling_shapes(host_kernels: Any, shape: tuple[int, int], layout: str) -> None:
    for dtype in FLOATS:
        check_affine(host_kernels, *shape, dtype, ScaleLaw("tanh"), "scale_shift", False, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masked_linear(host_kernels: Any, dtype: torch.dtype) -> None:
    calls = (masked_linear_cuda.masked_linear, masked_linear_cuda.masked_linear_backward)
    check_masked_linear(*(functools.partial(call, kernels=host_kernels) for call in calls), dtype)


def test_long_sums(host_kernels: Any) -> None:
    """Tensor cores cut off where float32 rounds; the errors of many steps must not add up in one direction."""
    calls = (masked_linear_cuda.masked_linear, masked_linear_cuda.masked_linear_backward)
    ours = [functools.partial(call, kernels=host_kernels) for call in calls]
    check_masked_linear(ours[0], ours[1], torch.float32, shapes=[(2, 1500, 3, 2), (1500, 2, 3, 2)])


def test_a_nan_stays_one(host_kernels: Any) -> None:
    """The device's NaN has all bits set: rounding its first part gives -0."""
    degrees = torch.zeros(5, dtype=torch.long)
    for row, column in ((1, 2), (4, 0)):
        x, weight = torch.ones(5, 5), torch.ones(5, 5)
        for tensor in (x, weight):
            tensor.view(torch.int32)[row, column] = 0x7FFFFFFF
        for a, b in ((x, torch.ones(5, 5)), (torch.ones(5, 5), weight)):
            y = masked_linear_cuda.masked_linear(a, b, None, degrees, degrees, False, 0, kernels=host_kernels)
            assert torch.equal(y.isnan(), (a.isnan().any(1)[:, None] | b.isnan().any(1)))
            assert (y[~y.isnan()] == 5).all()


def test_degrees_are_sorted_once() -> None:
    i, o = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    first = sorted_degrees(i, o, False)
    assert first.depth.tolist() == [1, 2]
    assert sorted_degrees(i, o, False) is first
    assert sorted_degrees(i, o, True).depth.tolist() == [0, 1]
    assert sorted_degrees(i, o.clone(), False) is not first
    i[0] = 0
    assert sorted_degrees(i, o, False).depth.tolist() == [2, 3]
    o[1] = 7
    assert sorted_degrees(i, o, False).rows.tolist() == [0, 1]
    with torch.inference_mode():
        i, o = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
        assert sorted_degrees(i, o, False).depth.tolist() == [1, 2]


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
@pytest.mark.parametrize("plan", PLANS)
def test_maf(host_kernels: Any, plan: str, inverse: bool) -> None:
    for dtype, samples in zip(FLOATS, (5, 9), strict=True):
        check_maf(host_kernels, [PLANS[plan]()], samples, dtype, inverse)


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16], ids=str)
def test_maf_of_halves(host_kernels: Any, weights: torch.dtype) -> None:
    """Weights in halves, all else in float32: not one bit of them is lost."""
    spline = RQSpline("nflows", 4)
    for inverse in (True, False):
        for plan in ("small", "several_blocks", "residual_context", "ten_layers", "wide_step"):
            check_maf(host_kernels, [PLANS[plan]()], 9, torch.float32, inverse, weights=weights)
        check_maf(
            host_kernels, [spline_plan(spline, 5, [9, 8])], 5, torch.float32, inverse, law=spline, weights=weights
        )


def test_a_nan_among_weights_in_halves_stays_one(host_kernels: Any) -> None:
    """As a device converts it, with all bits set: not one of them may be rounded away."""
    plan = PLANS["several_blocks"]()
    for weights in (torch.float16, torch.bfloat16):
        parameters = [torch.full(s, 0.01, dtype=weights) for mask in plan.masks for s in (mask.shape, mask.shape[:1])]
        parameters[0][plan.masks[0].nonzero().unbind(1)] = torch.nan
        packed = host_kernels.maf_pack(parameters, plan.masks, plan.forward_table, plan.packed_sizes[0])
        named = code_and_numbers(ScaleLaw("exp"))
        for call in (host_kernels.maf_forward, host_kernels.maf_inverse):
            y, _ = call(torch.ones(2, plan.features), None, packed, plan.forward_table, *named, 0, None)
            assert y[:, 1:].isnan().all()


def test_types_that_do_not_fit(host_kernels: Any) -> None:
    plan = PLANS["small"]()
    parameters = [torch.zeros(s) for mask in plan.masks for s in (mask.shape, mask.shape[:1])]
    packed = host_kernels.maf_pack(parameters, plan.masks, plan.forward_table, plan.packed_sizes[0])
    named = code_and_numbers(ScaleLaw("exp"))
    for x, weights in ((torch.ones(2, 5).double(), packed), (torch.ones(2, 5), packed.double())):
        with pytest.raises(RuntimeError, match="packed weights must be of the input's type, or halves for float32"):
            host_kernels.maf_inverse(x, None, weights, plan.forward_table, *named, 0, None)
    with pytest.raises(RuntimeError, match="packed weights must be of the input's type"):
        host_kernels.maf_inverse(torch.ones(2, 5).double(), None, packed.half(), plan.forward_table, *named, 0, None)
    with pytest.raises(RuntimeError, match="parameters must be of one type"):
        host_kernels.maf_pack(
            [parameters[0].half(), *parameters[1:]], plan.masks, plan.forward_table, plan.packed_sizes[0]
        )


def test_shapes_that_do_not_fit() -> None:
    """On a GPU the plan lies on the device: they are checked before."""
    plan = PLANS["residual_context"]()
    step = maf.Step(plan, [], torch.zeros(3, plan.context_width), ScaleLaw("exp"), "scale_shift", False)
    maf._check_fits(torch.zeros(3, 7), step)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 7\), got \(3, 8\)"):
        maf._check_fits(torch.zeros(3, 8), step)
    with pytest.raises(ValueError, match=r"context must have shape \(2, \d+\), got \(3, \d+\)"):
        maf._check_fits(torch.zeros(2, 7), step)
    with pytest.raises(ValueError, match=r"context must have shape \(3, \d+\), got None"):
        maf._check_fits(torch.zeros(3, 7), step._replace(context=None))


def test_a_flow_in_halves(host_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a flow's halves to the kernels and of their gradients back, with kernels built for the host."""
    from flowkernels.ops.maf import autograd, pack

    packed_in: list[torch.dtype] = []

    def pack_op(parameters: list[torch.Tensor], *rest: Any) -> torch.Tensor:
        packed_in.append(parameters[0].dtype)
        return host_kernels.maf_pack(parameters, *rest)

    monkeypatch.setattr(maf, "_takes_weights_in_halves", lambda _: True)
    monkeypatch.setattr(pack, "_may_remember", lambda _: False)
    monkeypatch.setattr(pack, "pack_op", pack_op)
    for module in (maf, autograd):
        monkeypatch.setattr(module, "maf_op", functools.partial(maf_cuda.maf, kernels=host_kernels))
    monkeypatch.setattr(autograd, "backward_op", functools.partial(maf_cuda.maf_backward, kernels=host_kernels))
    plan = PLANS["two_layers"]()
    parameters = [
        torch.nn.Parameter(0.2 * torch.randn(*shape, dtype=torch.bfloat16))
        for mask in plan.masks
        for shape in (mask.shape, mask.shape[:1])
    ]
    z = torch.randn(4, plan.features, dtype=torch.bfloat16, requires_grad=True)
    for call in (fk.ops.maf_inverse, fk.ops.maf_forward):
        y, logdet = call(z, plan, parameters)
        assert (y.dtype, logdet.dtype) == (torch.bfloat16, torch.float32)
        grads = torch.autograd.grad((y.float().square().sum() + logdet.sum()), [z, *parameters])
        exact_leaves = [t.detach().double().requires_grad_() for t in (z, *parameters)]
        with fk.use_backend("reference"):
            exact_y, exact_logdet = call(exact_leaves[0], plan, exact_leaves[1:])
        exact = torch.autograd.grad(exact_y.square().sum() + exact_logdet.sum(), exact_leaves)
        torch.testing.assert_close(logdet.double(), exact_logdet, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y.double(), exact_y, rtol=0.01, atol=0.01)
        for ours, theirs in zip(grads, exact, strict=True):
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())
    assert set(packed_in) == {torch.bfloat16}
    # Parameters of several types have nothing to be kept for.
    mixed = [p if i % 2 else p.detach().float().requires_grad_() for i, p in enumerate(parameters)]
    y, _ = maf.run_chain(z, [maf.Step(plan, mixed, None, ScaleLaw("softplus"), "scale_shift", False)])
    grads = torch.autograd.grad(y.float().sum(), mixed)
    assert [g.dtype for g in grads] == [p.dtype for p in mixed]
    assert packed_in[-1] == torch.float32


@pytest.mark.parametrize(("law", "form"), [*((n, f) for n in NAMES for f in FORMS[:2]), ("sigmoid", "gate")])
def test_maf_laws(host_kernels: Any, law: str, form: str) -> None:
    """Two transforms: the second one has to find its own numbers."""
    for inverse in (True, False):
        check_maf(host_kernels, [PLANS["small"](), PLANS["small"]()], 3, torch.float64, inverse, law=law, form=form)


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
@pytest.mark.parametrize(
    "spline",
    [RQSpline("nflows", 4), RQSpline("zuko", 8, bound=2.0), RQSpline("nflows", 30), RQSpline("pyro", 4), LRSpline(4)],
    ids=str,
)
def test_maf_splines(host_kernels: Any, spline: Spline, inverse: bool) -> None:
    plans = [spline_plan(spline, 5, [9, 8], activation="tanh"), spline_plan(spline, 5, [7], activation="silu")]
    for dtype, samples in zip(FLOATS, (5, 9), strict=True):
        check_maf(host_kernels, plans, samples, dtype, inverse, law=spline)


def test_laws_and_splines_in_one_chain(host_kernels: Any) -> None:
    spline = RQSpline("nflows", 3, bound=2.0)
    plans = [PLANS["small"](), spline_plan(spline, 5, [7]), PLANS["small"]()]
    laws = [ScaleLaw("tanh", bound=1.5), spline, ScaleLaw("softplus", floor=0.1)]
    for inverse in (True, False):
        check_maf(host_kernels, plans, 5, torch.float64, inverse, law=laws)


@pytest.mark.parametrize("plan", ["small", "several_blocks"])
def test_a_later_infinity_leaves_earlier_features_alone(host_kernels: Any, plan: str) -> None:
    """A weight of zero hides it, inside a block of steps as between blocks: 0 * inf is NaN."""
    net = PLANS[plan]()
    parameters = [t for mask in net.masks for t in (torch.randn(mask.shape), torch.randn(mask.shape[0]))]
    packed = host_kernels.maf_pack(parameters, net.masks, net.forward_table, net.packed_sizes[0])
    z = torch.randn(3, net.features)
    call = (None, packed, net.forward_table, *code_and_numbers(ScaleLaw("softplus")), 0, None)
    x, _ = host_kernels.maf_inverse(z, *call)
    z[:, 3] = float("inf")
    other, _ = host_kernels.maf_inverse(z, *call)
    assert torch.equal(other[:, :3], x[:, :3])
    assert (other[:, 3] == float("inf")).all()


def test_a_transform_is_described_in_full(host_kernels: Any) -> None:
    plan = PLANS["small"]()
    table, packed = plan.forward_table, torch.zeros(plan.packed_sizes[0])
    with pytest.raises(RuntimeError, match="described by 6 numbers, got 3"):
        host_kernels.maf_inverse(torch.zeros(2, 5), None, packed, table, 0, [1.0, 0.0, 0.0], 0, None)
    with pytest.raises(RuntimeError, match="there is no transform 12"):
        host_kernels.maf_inverse(torch.zeros(2, 5), None, packed, table, 12, [1.0] * 6, 0, None)
    with pytest.raises(RuntimeError, match="bins must be 2 to 64, got 65"):
        host_kernels.maf_inverse(torch.zeros(2, 5), None, packed, table, 8, [1.0] * 5 + [65.0], 0, None)


def test_a_chain(host_kernels: Any) -> None:
    plans = [PLANS["residual_context"](), Plan(made_masks(7, [11])), PLANS["residual_context"]()]
    for inverse in (True, False):
        check_maf(host_kernels, plans, 5, torch.float32, inverse)
    check_maf(host_kernels, plans, 5, torch.float64, False, density=True)


def test_no_samples(host_kernels: Any) -> None:
    for inverse in (True, False):
        check_maf(host_kernels, [PLANS["small"]()], 0, torch.float64, inverse)


@pytest.mark.parametrize("setting", ["FK_SHIM_REVERSE=1", "FK_SHIM_SHARED_MEMORY=60000", "FK_SHIM_SHARED_MEMORY=20000"])
def test_under_other_circumstances(host_kernels: Any, setting: str) -> None:
    """Threads run in the other order, and less shared memory: the results stay right. A missing barrier would show."""
    script = """
import torch, build
from cases import PLANS, check_gumbel_argmax, check_logistic_mixture, check_maf, check_masked_linear, check_rq_spline
from flowkernels.ops.masked_linear import cuda
build.load_host_libraries()
check_masked_linear(cuda.masked_linear, cuda.masked_linear_backward, torch.float32)
check_masked_linear(cuda.masked_linear, cuda.masked_linear_backward, torch.bfloat16)
for plan in ("two_layers", "shuffled", "several_blocks", "residual_context"):
    for inverse in (True, False):
        check_maf(torch.ops.flowkernels_cuda, [PLANS[plan]()], 9, torch.float32, inverse)
for rows, classes in ((9, 300), (2, 2100)):
    check_gumbel_argmax(torch.ops.flowkernels_cuda.gumbel_argmax, rows, classes, torch.float32)
for style in ("nflows", "zuko"):
    for rows, features, bins in ((9, 7, 3), (30, 40, 4), (30, 40, 5), (3, 400, 30)):
        check_rq_spline(torch.ops.flowkernels_cuda, rows, features, bins, torch.float32, style, True)
check_logistic_mixture(torch.ops.flowkernels_cuda, 11, 13, 4, torch.float32, False)
"""
    here = Path(__file__).parent
    path = os.pathsep.join(
        [str(here), str(here.parent / "cuda"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    name, value = setting.split("=")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, name: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 5), (3, 130), (9, 700), (2, 1025), (1, 9001)], ids=str)
def test_gumbel_softmax(host_kernels: Any, shape: tuple[int, int]) -> None:
    """The same stream as everywhere: the noise of an element does not depend on the kernel."""
    from flowkernels.ops.gumbel_softmax import reference

    generator = torch.Generator().manual_seed(0)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        logits = torch.randn(shape, generator=generator, dtype=dtype)
        tau = torch.rand(shape[0], generator=generator, dtype=dtype) + 0.5
        grad = torch.randn(shape, generator=generator, dtype=dtype)
        seed = torch.tensor(0x123456789ABCDEF)
        soft = host_kernels.gumbel_softmax(logits, tau, seed, 3, False)
        plain = reference.gumbel_softmax(logits, tau, seed, 3, False)
        assert torch.allclose(soft, plain, rtol=100 * bound, atol=bound)
        assert torch.equal(
            host_kernels.gumbel_softmax(logits, tau, seed, 3, True),
            reference.gumbel_softmax(logits, tau, seed, 3, True),
        )
        ours = host_kernels.gumbel_softmax_backward(grad, soft, tau, True)
        theirs = reference.gumbel_softmax_backward(grad.double(), soft.double(), tau.double(), True)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.double(), b, rtol=1000 * bound, atol=10 * bound)


def test_gumbel_softmax_of_impossible_rows(host_kernels: Any) -> None:
    logits = torch.tensor([[-torch.inf] * 3, [0.0, torch.nan, 1.0], [-torch.inf, 0.0, -torch.inf]])
    for hard in (False, True):
        y = host_kernels.gumbel_softmax(logits, torch.ones(3), torch.tensor(1), 0, hard)
        assert y[:2].isnan().all()
        assert y[2].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 5), (70, 6), (3, 130), (70, 300), (2, 1025), (1, 9001)], ids=str)
def test_gumbel_argmax(host_kernels: Any, shape: tuple[int, int]) -> None:
    """A row to a warp and to a block, one tile and several, many samples of few rows and few of many."""
    for dtype in FLOATS:
        check_gumbel_argmax(host_kernels.gumbel_argmax, *shape, dtype)


def test_gumbel_argmax_takes_the_first_of_equals(host_kernels: Any) -> None:
    """Logits so large that adding the noise changes nothing."""
    for classes in (5, 900):
        logits = torch.zeros(3, classes)
        logits[:, [1, classes // 2, classes - 1]] = 1e12
        index, _, _ = host_kernels.gumbel_argmax(logits, torch.tensor(7), 0, 1)
        assert index.tolist() == [[1]] * 3


def test_gumbel_argmax_of_a_certain_category(host_kernels: Any) -> None:
    """Its log-probability keeps the digits that log(1 + tiny) would lose."""
    for classes in (2, 1000):
        logits = torch.full((1, classes), -30.0)
        logits[0, classes // 2] = 0.0
        expected = torch.tensor(-math.log1p((classes - 1) * math.exp(-30)))
        for samples in (1, 2):
            index, log_prob, _ = host_kernels.gumbel_argmax(logits, torch.tensor(7), 0, samples)
            assert (index == classes // 2).all()
            torch.testing.assert_close(log_prob, expected.expand(1, samples), rtol=1e-6, atol=0)


def test_gumbel_argmax_of_impossible_rows(host_kernels: Any) -> None:
    logits = torch.tensor([[-torch.inf] * 3, [0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0], [-torch.inf, 0, -torch.inf]])
    for samples in (1, 5):
        index, log_prob, normaliser = host_kernels.gumbel_argmax(logits, torch.tensor(1), 0, samples)
        assert ((index >= 0) & (index < 3)).all()
        assert log_prob[:3].isnan().all()
        assert normaliser[:3, 1].isnan().all()
        assert index[3].tolist() == [1] * samples
        assert log_prob[3].tolist() == [0.0] * samples


STYLES = ("nflows", "zuko", "pyro", "linear")


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
@pytest.mark.parametrize("style", STYLES)
def test_rq_spline(host_kernels: Any, style: str, inverse: bool) -> None:
    for dtype in FLOATS:
        for bins in (2, 5, 8):
            check_rq_spline(host_kernels, 9, 7, bins, dtype, style, inverse)
        check_rq_spline_extremes(host_kernels, dtype, style, inverse)


# Fewer features than lanes, than threads, than the log-det's terms, and more; no rows, no features, many rows.
@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (1, 1), (700, 1), (300, 2), (41, 33), (17, 64), (5, 130), (2, 1025), (1, 2100)], ids=str
)
def test_rq_spline_shapes(host_kernels: Any, shape: tuple[int, int]) -> None:
    spline = RQSpline("nflows", 3)
    for dtype in FLOATS:
        options = (spline.bins, spline.code, spline.numbers, False)
        check_elements("rq_spline", host_kernels, rq_spline, *shape, spline.params_per_feature, options, dtype)


def test_rq_spline_of_most_bins(host_kernels: Any) -> None:
    for style in STYLES:
        check_rq_spline(host_kernels, 7, 20, 64, torch.float64, style, False)


@pytest.mark.parametrize("bins", [3, 4, 5])
def test_rq_spline_layouts(host_kernels: Any, bins: int) -> None:
    """Numbers of parameters with each way through shared memory: a multiple of four, an odd one, twice an odd one."""
    for dtype in FLOATS:
        for spline in (RQSpline("nflows", bins), RQSpline("zuko", bins)):
            options = (bins, spline.code, spline.numbers, True)
            check_element_layouts("rq_spline", host_kernels, 37, 5, spline.params_per_feature, options, dtype)


def test_rq_spline_at_and_beyond_the_bounds(host_kernels: Any) -> None:
    x = torch.tensor([[-torch.inf, -3.0001, -3.0, -0.0, 3.0, 3.0001, torch.inf, torch.nan]])
    given = torch.randn(1, 8, 14, generator=torch.Generator().manual_seed(0)), torch.ones(1, 8), torch.ones(1)
    spline = RQSpline("nflows", 5)
    for inverse in (True, False):
        options = (5, spline.code, spline.numbers, inverse)
        for name in ("rq_spline", "rq_spline_backward"):

            def call(of: Any, x: Tensor, theta: Tensor, grad: Tensor, sums: Tensor, name: str = name) -> Any:
                tensors = (grad, sums, x, theta) if name.endswith("backward") else (x, theta, sums)
                return getattr(of, name)(*tensors, *options)  # noqa: B023

            exact = call(rq_spline, x.double(), *(t.double() for t in given))
            for a, b in zip(call(host_kernels, x, *given), exact, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6, equal_nan=True)


def test_rq_spline_asks_for_what_it_reads(host_kernels: Any) -> None:
    spline = RQSpline("nflows", 4)
    with pytest.raises(RuntimeError, match="parameters must have 11 numbers per feature, got 10"):
        host_kernels.rq_spline(torch.zeros(2, 3), torch.zeros(2, 3, 10), None, 4, 0, spline.numbers, False)
    with pytest.raises(RuntimeError, match="bins must be 2 to 64, got 65"):
        host_kernels.rq_spline(torch.zeros(2, 3), torch.zeros(2, 3, 194), None, 65, 0, spline.numbers, False)


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
@pytest.mark.parametrize("components", [1, 2, 5, 64])
def test_logistic_mixture(host_kernels: Any, components: int, inverse: bool) -> None:
    for dtype in FLOATS:
        check_logistic_mixture(host_kernels, 9, 5, components, dtype, inverse)


@pytest.mark.parametrize("law", NAMES)
def test_logistic_mixture_laws(host_kernels: Any, law: str) -> None:
    for inverse in (True, False):
        check_logistic_mixture(host_kernels, 5, 3, 3, torch.float32, inverse, law=law)


def test_logistic_mixture_shapes(host_kernels: Any) -> None:
    for rows, features in ((0, 5), (5, 0), (700, 1), (41, 33), (2, 1025)):
        check_logistic_mixture(host_kernels, rows, features, 2, torch.float32, False)


@pytest.mark.parametrize("components", [2, 3, 4])
def test_logistic_mixture_layouts(host_kernels: Any, components: int) -> None:
    law = ScaleLaw("tanh")
    for dtype in FLOATS:
        options = (-7.0, law.code, law.numbers, True)
        check_element_layouts("logistic_mixture", host_kernels, 37, 5, 3 * components + 2, options, dtype)


def test_logistic_mixture_far_from_its_components(host_kernels: Any) -> None:
    """Both tails, a gap in which float32 would underflow, a scale below its least, and a number that is none. In the
    gap the inverse is too steep for the reference."""
    theta = torch.tensor([0.3, 0.1, 0.0, 0.5, -20.0, 20.0, -3.0, -9.0], dtype=torch.float64).expand(6, 1, 8)
    law, grad = ScaleLaw("tanh"), torch.ones(6, 1, dtype=torch.float64)
    for inverse, gap in ((True, -20.3), (False, 0.0)):
        x = torch.tensor([-1e4, -300.0, gap, 300.0, 1e4, torch.nan], dtype=torch.float64)[:, None]
        options = (-7.0, law.code, law.numbers, inverse)
        ours, plain = (
            (
                *of.logistic_mixture(x, theta, None, *options),
                *of.logistic_mixture_backward(grad, grad[:, 0], x, theta, *options),
            )
            for of in (host_kernels, logistic_mixture)
        )  # fmt: skip
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_logistic_mixture_asks_for_what_it_reads(host_kernels: Any) -> None:
    law = ScaleLaw("tanh")
    with pytest.raises(RuntimeError, match="parameters must have 3 K \\+ 2 numbers per feature, K = 1 to 64, got 10"):
        host_kernels.logistic_mixture(
            torch.zeros(2, 3), torch.zeros(2, 3, 10), None, -7.0, law.code, law.numbers, False
        )


@pytest.mark.parametrize("logit", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, 3), (5, 0), (1, 1), (9, 7), (17, 64), (3, 130), (2, 1025), (2, 784), (1, 4100)], ids=str
)
def test_dequantize(host_kernels: Any, shape: tuple[int, int], logit: bool) -> None:
    for dtype in FLOATS:
        for bytes in (True, False):
            check_dequantize(host_kernels, *shape, dtype, logit, bytes=bytes)


def test_dequantize_reads_bytes_or_what_it_calculates_in(host_kernels: Any) -> None:
    with pytest.raises(RuntimeError, match="x must be uint8 or of the type that is calculated in"):
        host_kernels.dequantize(torch.zeros(2, 3), None, torch.tensor(1), 0, 256, True, 0.01, True)
