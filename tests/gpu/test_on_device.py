"""The kernels on a real GPU: every backend that is there, at small sizes as everywhere and at real ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import (
    PLANS,
    affine_options,
    between_permutations,
    check_affine,
    check_dequantize,
    check_element_layouts,
    check_gumbel_argmax,
    check_logistic_mixture,
    check_maf,
    check_masked_linear,
    check_rq_spline,
    check_rq_spline_extremes,
    made_masks,
    spline_plan,
)

import flowkernels as fk
from flowkernels import _cuda, _gpu_choices
from flowkernels.plan import Plan
from flowkernels.scales import NAMES, ScaleLaw
from flowkernels.testing import LAYOUTS
from flowkernels.transforms import LRSpline, RQSpline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


def kernels_of(name: str, operator: str) -> Any:
    reason = _cuda.why_not(name, operator)
    if reason:
        pytest.skip(reason)
    if name == "cuda":
        return torch.ops.flowkernels_cuda
    import importlib

    module = importlib.import_module(_cuda.TRITON[operator][0])
    return SimpleNamespace(**{n: getattr(module, n) for n in dir(module) if not n.startswith("__")})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_affine_coupling(name: str, dtype: torch.dtype) -> None:
    kernels = kernels_of(name, "affine_coupling")
    for law, form, inverse in affine_options():
        check_affine(kernels, 33, 70, dtype, law, form, inverse, device="cuda")
    for layout in ("contiguous", "interleaved", "blocked", "transposed", "masked", "compact"):
        for rows, features in ((0, 5), (1, 1), (9, 7), (3, 5000), (4000, 256)):
            check_affine(
                kernels, rows, features, dtype, ScaleLaw("tanh"), "scale_shift", True, layout=layout, device="cuda"
            )


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_maf(name: str, plan: str, inverse: bool) -> None:
    kernels = kernels_of(name, "maf")
    for dtype in (torch.float64, torch.float32):
        for samples in (1, 9, 1000):
            check_maf(kernels, [PLANS[plan]()], samples, dtype, inverse, device="cuda")


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_maf_at_real_sizes(name: str, inverse: bool) -> None:
    kernels = kernels_of(name, "maf")
    for dtype in (torch.float64, torch.float32):
        check_maf(kernels, [Plan(made_masks(63, [512, 512]))], 1000, dtype, inverse, device="cuda")


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_maf_of_splines_and_laws(name: str, inverse: bool) -> None:
    kernels = kernels_of(name, "maf_spline")
    for spline in (RQSpline("nflows", 8), RQSpline("zuko", 8), RQSpline("nflows", 64), LRSpline(8)):
        plans = [spline_plan(spline, 5, [40, 30]), Plan(made_masks(5, [30]))]
        for samples in (1, 9, 100):
            check_maf(
                kernels, plans, samples, torch.float64, inverse, law=[spline, ScaleLaw("tanh", bound=1.5)],
                device="cuda",
            )  # fmt: skip


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
def test_maf_between_permutations(inverse: bool) -> None:
    """In Triton: C++ has no kernel that does."""
    kernels, spline = kernels_of("triton", "maf"), RQSpline("zuko", 8)
    for plan in (PLANS["several_blocks"](), PLANS["residual_context"]()):
        check_maf(kernels, [between_permutations(plan), plan], 70, torch.float32, inverse, device="cuda")
    plan = between_permutations(spline_plan(spline, 9, [40]))
    check_maf(kernels, [plan], 70, torch.float32, inverse, law=spline, device="cuda")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("cuda", "triton") for dtype in (torch.float64, torch.float32)),
        ("triton", torch.bfloat16),  # halves become float32 before C++ kernels are called
        ("triton", torch.float16),
    ],
    ids=str,
)
def test_rq_spline(name: str, dtype: torch.dtype) -> None:
    """Triton compiles two kernels for most of these: only float32 takes all of them."""
    kernels = kernels_of(name, "rq_spline")
    for style in ("nflows", "zuko", "linear"):
        for inverse in (False, True):
            check_rq_spline(kernels, 129, 31, 8, dtype, style, inverse, device="cuda")
    for rows, features in ((0, 5), (5, 0), (1, 1), (700, 2), (3, 1100)):
        check_rq_spline(kernels, rows, features, 8, dtype, "linear", False, device="cuda")
    if dtype != torch.float32:
        return
    for inverse in (False, True):
        for style in ("nflows", "zuko", "linear"):
            check_rq_spline_extremes(kernels, dtype, style, inverse, device="cuda")
        for style, bins in (("nflows", 2), ("nflows", 64), ("zuko", 64), ("linear", 64), ("pyro", 8)):
            check_rq_spline(kernels, 129, 31, bins, dtype, style, inverse, device="cuda")
    for layout in LAYOUTS:
        check_rq_spline(kernels, 33, 70, 8, dtype, "nflows", True, layout=layout, device="cuda")
    check_rq_spline(kernels, 4000, 64, 8, dtype, "linear", False, device="cuda")


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_maf_of_halves(name: str, weights: torch.dtype) -> None:
    """Weights in halves, all else in float32."""
    kernels = kernels_of(name, "maf")
    for inverse in (True, False):
        for plan in ("several_blocks", "residual_context", "ten_layers"):
            check_maf(kernels, [PLANS[plan]()], 70, torch.float32, inverse, weights=weights, device="cuda")
    flow = fk.models.MAF(20, (40, 40), 2).to("cuda", weights)
    z = torch.randn(70, 20, device="cuda", dtype=weights)
    with fk.use_backend(name):
        x, logdet = flow.inverse(z)
        x.float().square().sum().backward()
    assert (x.dtype, logdet.dtype) == (weights, torch.float32)
    assert all(p.grad is not None and p.grad.dtype == weights for p in flow.parameters())
    with fk.use_backend("reference"), torch.no_grad():
        exact, _ = flow.double().inverse(z.double())
    assert torch.allclose(x.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_maf_of_images(name: str) -> None:
    kernels_of(name, "maf")
    torch.manual_seed(0)
    flow = fk.models.MAF(784, (1024, 1024), 1).cuda()
    z = torch.randn(40, 784, device="cuda")
    with torch.no_grad():
        with fk.use_backend(name):
            x, logdet = flow.inverse(z)
            again, back = flow.transform(x)
        with fk.use_backend("reference"):
            exact = flow.double().inverse(z.double())
    assert torch.allclose(x.double(), exact[0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(logdet.double(), exact[1], rtol=1e-4, atol=1e-3)
    assert torch.allclose(again, z, rtol=1e-3, atol=1e-3)
    assert torch.allclose(back, -logdet, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("rows", "classes"), [(0, 3), (1, 1), (70, 5), (33, 130), (5, 9000), (3, 50257)])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gumbel(name: str, rows: int, classes: int) -> None:
    from flowkernels.ops.gumbel_softmax import reference

    kernels = kernels_of(name, "gumbel_softmax")
    logits = torch.randn(rows, classes, device="cuda")
    tau = torch.rand(rows, device="cuda") + 0.5
    seed = torch.tensor(0x123456789ABCDEF, device="cuda")
    soft = kernels.gumbel_softmax(logits, tau, seed, 3, False)
    plain = reference.gumbel_softmax(logits, tau, seed, 3, False)
    assert torch.allclose(soft, plain, rtol=1e-4, atol=2e-6)
    hard = kernels.gumbel_softmax(logits, tau, seed, 3, True)
    assert (
        torch.equal(hard.argmax(-1), reference.gumbel_softmax(logits, tau, seed, 3, True).argmax(-1)) if rows else True
    )
    grad = torch.randn_like(logits)
    for a, b in zip(
        kernels.gumbel_softmax_backward(grad, soft, tau, True),
        reference.gumbel_softmax_backward(grad.double(), soft.double(), tau.double(), True),
        strict=True,
    ):
        assert torch.allclose(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rows", "classes"), [(0, 3), (1, 1), (70, 5), (33, 130), (5000, 300), (5, 9000), (3, 50257)])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gumbel_argmax(name: str, rows: int, classes: int) -> None:
    kernels = kernels_of(name, "gumbel_argmax")
    for dtype in (torch.float64, torch.float32):
        check_gumbel_argmax(kernels.gumbel_argmax, rows, classes, dtype, samples=(0, 1, 2, 5, 300), device="cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gumbel_argmax_from_outside(name: str, dtype: torch.dtype) -> None:
    """Every dtype, any dimension, many samples of a single row, and the gradient; the CPU draws the same."""
    kernels_of(name, "gumbel_argmax")
    logits = torch.randn(3, 40, 2, dtype=dtype)
    for x, dim, k in ((logits, 1, 1), (logits, -2, 7), (logits[0, :1].double(), 1, 100_000)):
        on_device = x.cuda().requires_grad_()
        with fk.use_backend(name):
            index, log_prob = fk.ops.gumbel_argmax(on_device, k, dim, seed=5)
        there, log_there = fk.ops.gumbel_argmax(x, k, dim, seed=5)
        assert (index.cpu() != there).sum() <= 1  # a rounding of one of the two devices may decide
        assert log_prob.dtype == log_there.dtype
        exact = x.double().log_softmax(dim).gather(dim, index.cpu())
        assert torch.allclose(log_prob.double().cpu(), exact, rtol=1e-3, atol=1e-5)
        (grad,) = torch.autograd.grad(log_prob.sum(), on_device)
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_masked_linear(name: str, dtype: torch.dtype) -> None:
    kernels_of(name, "masked_linear")
    calls = (_cuda._kernel(name, operator) for operator in ("masked_linear", "masked_linear_backward"))
    check_masked_linear(*calls, dtype, device="cuda")
    calls = (_cuda._kernel(name, operator) for operator in ("masked_linear", "masked_linear_backward"))
    check_masked_linear(*calls, dtype, shapes=((3000, 300, 265, 200),), device="cuda")


@pytest.mark.parametrize("bins", [3, 4, 5])
def test_rq_spline_layouts(bins: int) -> None:
    kernels = kernels_of("cuda", "rq_spline")
    for dtype in (torch.float64, torch.float32):
        for spline in (RQSpline("nflows", bins), RQSpline("zuko", bins)):
            options = (bins, spline.code, spline.numbers, True)
            count = spline.params_per_feature
            check_element_layouts("rq_spline", kernels, 370, 50, count, options, dtype, device="cuda")


@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
def test_logistic_mixture(inverse: bool) -> None:
    kernels = kernels_of("cuda", "logistic_mixture")
    for dtype in (torch.float64, torch.float32):
        for components in (1, 4, 5, 64):
            check_logistic_mixture(kernels, 41, 33, components, dtype, inverse, device="cuda")
    law = ScaleLaw("tanh")
    for components in (2, 3, 4):
        options = (-7.0, law.code, law.numbers, inverse)
        check_element_layouts(
            "logistic_mixture", kernels, 370, 50, 3 * components + 2, options, torch.float32, device="cuda"
        )
    for name in NAMES:
        check_logistic_mixture(kernels, 9, 7, 3, torch.float32, inverse, law=name, device="cuda")


@pytest.mark.parametrize("logit", [True, False])
def test_dequantize(logit: bool) -> None:
    kernels = kernels_of("cuda", "dequantize")
    for dtype in (torch.float64, torch.float32):
        for rows, features in ((0, 3), (5, 0), (1, 1), (9, 7), (2, 1025), (300, 784), (3, 9000)):
            for bytes in (True, False):
                check_dequantize(kernels, rows, features, dtype, logit, bytes=bytes, device="cuda")


# ---- through the public faces ---------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(backend, operator) of every kernel that is called, from any thread."""
    calls: list[tuple[str, str]] = []
    kernel = _cuda._kernel
    monkeypatch.setattr(_cuda, "_kernel", lambda *what: (calls.append(what), kernel(*what))[1])
    return calls


def test_auto_goes_by_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ran: list[tuple[str, str]]) -> None:
    for name in ("cuda", "triton"):
        kernels_of(name, "affine_coupling")
    choices = {"affine_coupling": {"source": "made-up.json", "up_to": [[12, "triton"], [None, "cuda"]]}}
    table = {torch.cuda.get_device_name(): {"capability": list(torch.cuda.get_device_capability()), "choices": choices}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    monkeypatch.setattr(_gpu_choices, "TABLE", tmp_path / "table.json")
    caches = (_cuda._choices, _gpu_choices.table)
    for cache in caches:
        cache.cache_clear()
    try:
        for rows in (3, 4):
            x = torch.randn(rows, 4, device="cuda")
            fk.ops.affine_coupling(x, x, x)
        told = fk.explain()
    finally:
        for cache in caches:
            cache.cache_clear()
    assert ran == [("triton", "affine_coupling"), ("cuda", "affine_coupling")]
    assert "affine_coupling: triton up to 12 elements, above that cuda" in told


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backward_is_forced_too(name: str, ran: list[tuple[str, str]]) -> None:
    """Autograd calls it in a thread of its own."""
    kernels_of(name, "affine_coupling")
    x = torch.randn(3, 4, device="cuda", requires_grad=True)
    with fk.use_backend(name):
        y, logdet = fk.ops.affine_coupling(x, x, x)
        (y.sum() + logdet.sum()).backward()
    assert ran == [(name, "affine_coupling"), (name, "affine_coupling_backward")]


@pytest.mark.parametrize("name", ["auto", "cuda", "triton"])
def test_gradcheck(name: str) -> None:
    if name != "auto" and _cuda.why_not(name, "affine_coupling"):
        pytest.skip(str(_cuda.why_not(name, "affine_coupling")))
    x, t, u = (torch.randn(3, 4, device="cuda", dtype=torch.float64, requires_grad=True) for _ in range(3))
    with fk.use_backend(name):
        assert torch.autograd.gradcheck(lambda *a: fk.ops.affine_coupling(*a, law="softplus"), (x, t, u))


def test_the_chain_has_a_gradient() -> None:
    flow = fk.models.MAF(5, (12, 12), 2).cuda().double()
    z = torch.randn(3, 5, device="cuda", dtype=torch.float64, requires_grad=True)
    for call in (flow.inverse, flow.transform):
        grads = torch.autograd.grad(sum(t.square().sum() for t in call(z)), [z, *flow.parameters()])
        with fk.use_backend("reference"):
            plain = torch.autograd.grad(sum(t.square().sum() for t in call(z)), [z, *flow.parameters()])
        for a, b in zip(grads, plain, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_captured_in_a_graph(name: str) -> None:
    kernels_of(name, "maf")
    flow = fk.models.MAF(20, (40, 40), 2).cuda().requires_grad_(False)
    layer = fk.nn.MADE(20, (40,)).cuda().requires_grad_(False)
    z = torch.randn(70, 20, device="cuda")
    x = torch.randn(9, 16, device="cuda")
    spline, theta = RQSpline("zuko", 4), torch.randn(9, 16, 11, device="cuda")
    calls = [
        lambda: flow.inverse(z), lambda: flow.transform(z), lambda: fk.ops.affine_coupling(x, x, x),
        lambda: (layer(z),),
        lambda: fk.ops.gumbel_argmax(x, seed=5)[1:], lambda: fk.ops.gumbel_argmax(x, 3, seed=5)[1:],
    ]  # fmt: skip
    if _cuda.has_kernel(name, "rq_spline"):
        calls.append(lambda: fk.ops.rq_spline(x, theta, spline=spline))
    if _cuda.has_kernel(name, "logistic_mixture"):
        calls.append(lambda: fk.ops.logistic_mixture(x, theta, inverse=True))
    for plain in calls:

        def call(plain: Any = plain) -> Any:
            with fk.use_backend(name):
                return plain()

        expected = [t.clone() for t in call()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        for t in outputs:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(outputs, expected, strict=True):
            assert torch.equal(a, b)


def test_on_another_stream_and_twice_the_same() -> None:
    flow = fk.models.MAF(20, (40, 40), 2).cuda().requires_grad_(False)
    z = torch.randn(700, 20, device="cuda")
    first = flow.inverse(z)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = flow.inverse(z)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_more_elements_than_an_int_counts() -> None:
    features = 1024
    rows = 2**31 // features + 7
    if torch.cuda.mem_get_info()[0] < 8 * rows * features:
        pytest.skip("too little device memory")
    for name in ("cuda", "triton"):
        if _cuda.why_not(name, "affine_coupling"):
            continue
        x = torch.ones(rows, features, device="cuda", dtype=torch.float16)
        small = torch.full((1, 1), 0.5, device="cuda", dtype=torch.float16).expand(rows, features)
        with fk.use_backend(name):
            y, logdet = fk.ops.affine_coupling(x, small, small, law="exp")
        assert torch.allclose(y[-3:].float(), torch.full((3, features), 2.1487, device="cuda"), rtol=1e-3)
        assert torch.allclose(logdet[-3:], torch.full((3,), 512.0, device="cuda"), rtol=1e-3)


def test_compiles_as_one_graph() -> None:
    x, t, u = (torch.randn(64, 32, device="cuda") for _ in range(3))
    compiled = torch.compile(lambda *a: fk.ops.affine_coupling(*a, law="softplus"), fullgraph=True)
    for a, b in zip(compiled(x, t, u), fk.ops.affine_coupling(x, t, u, law="softplus"), strict=True):
        assert torch.allclose(a, b)


def test_bad_input() -> None:
    x = torch.zeros(3, 4, device="cuda")
    with pytest.raises(ValueError, match=r"shift is on cpu, but x is on cuda"):
        fk.ops.affine_coupling(x, torch.zeros(3, 4), x)
    with fk.use_backend("reference"), pytest.raises(ValueError, match="use one device"):
        fk.ops.affine_coupling(x, x, torch.zeros(3, 4))
    if "cpu" in fk.available_backends():
        with fk.use_backend("cpu"), pytest.raises(RuntimeError, match="CUDA tensors"):
            fk.ops.affine_coupling(x, x, x)
