"""``python -m benchmarks.gpu`` (``make gpu``): tests, ceilings and timings of the GPU kernels, in ten minutes at most.

Every part runs in a process of its own with a time limit, writes what it has after every figure, and cannot take the others'
results with it: a crash of a kernel spoils its process only. No figure is written for a result that was not right in the same
run. The results go to ``benchmarks/results/gpu-<device>-<commit>.json``; the table comes last.

With ``--table`` nothing runs: the recorded results become flowkernels/gpu_choices.json, the table that `auto` goes by.
"""

# ruff: noqa: E501 -- a case is one line

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 500.0  # seconds for everything after the build, which takes the rest of ten minutes

# A dry run takes every figure once, of small tensors on the CPU, to see that nothing here is wrong before there is a
# device: tests/gpu/test_gpu_benchmarks.py, with the kernels built for the host and interpreted.
DRY = False
DEVICE = "cuda"


def log(*words: object) -> None:
    print(*words, flush=True)


# ---- timing ------------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any], *, graph: bool = True, seconds: float = 0.5) -> tuple[float, float, float]:
    """(p20, p50, p80) of a call: replays of a CUDA graph where that is asked for, timed by events."""
    import torch

    if DRY:
        begin_dry = time.perf_counter()
        run()
        return (1000 * (time.perf_counter() - begin_dry),) * 3
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    call = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        call = captured.replay
        call()
        torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    once = max(begin.elapsed_time(end), 1e-3)
    times = []
    for _ in range(max(5, min(200, int(1000 * seconds / once)))):
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    times.sort()
    return times[len(times) // 5], times[len(times) // 2], times[len(times) * 4 // 5]


def small(n: int, most: int = 48) -> int:
    """A size, which a dry run makes small."""
    return min(n, most) if DRY else n


def tensor(*shape: int, dtype: Any = None) -> Any:
    import torch

    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def on(backend: str) -> AbstractContextManager[None]:
    import flowkernels as fk

    return nullcontext() if DRY else fk.use_backend(backend)


def bound_to(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` on a backend, wherever it is called from."""

    def call() -> Any:
        with on(backend):
            return run()

    return call


def have(report: Report, name: str, operator: str) -> bool:
    """Whether a backend runs an operator here; if not, the reason becomes a row."""
    from flowkernels import _cuda

    if name == "triton" and operator not in _cuda.TRITON:
        return False  # not written is no failure
    reason = None if DRY else _cuda.why_not(name, operator)
    if reason is not None:
        report.add(family=operator, case="all", variant=name, failed=reason)
    return reason is None


def measured_as(operator: str, args: Sequence[Any]) -> dict[str, Any]:
    """Where a call belongs in the table of choices: the line, the size and the type."""
    import torch

    from flowkernels import _gpu_choices

    found = _gpu_choices.call(operator, args)
    if found is None:
        return {}
    first = next(arg for arg in args if isinstance(arg, torch.Tensor))
    return {"line": found[0], "size": found[1], "dtype": str(first.dtype).removeprefix("torch.")}


class Report:
    """The rows of one part, written out after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []  # type: ignore[var-annotated]

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.path.write_text(json.dumps(self.rows))
        log(
            "  ",
            *(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()),
        )

    @contextmanager
    def trying(self, family: str, case: str) -> Iterator[None]:
        """What fails inside is noted as failed; the next case goes on."""
        try:
            yield
        except Exception as problem:
            self.add(family=family, case=case, variant="-", failed=f"{type(problem).__name__}: {str(problem)[:300]}")

    def kernel(self, family: str, case: str, backend: str, operator: str, *args: Any, **more: Any) -> None:
        """Times the kernel that a backend has for an operator."""
        from flowkernels import _cuda

        self.time(family, case, backend, partial(_cuda._kernel(backend, operator), *args),
                  **measured_as(operator, args), **more)  # fmt: skip

    def time(
        self, family: str, case: str, variant: str, run: Callable[[], Any], *, check: Callable[[Any], float] | None = None,
        bound: float = 0.0, moved: float = 0.0, flops: float = 0.0, graph: bool = True, **more: Any,
    ) -> None:  # fmt: skip
        """Checks, times and notes one variant; what fails is noted as failed and the next one goes on.

        What `measured_as` adds makes it count in the table of choices, by the time of a call without a graph.
        """
        try:
            error = None
            if check is not None:
                error = check(run())
                if not error <= bound:
                    self.add(family=family, case=case, variant=variant, wrong=error, bound=bound)
                    return
            try:
                p20, p50, p80 = milliseconds(run, graph=graph)
            except Exception as problem:
                if not graph:
                    raise
                more["not_captured"] = f"{type(problem).__name__}: {str(problem)[:100]}"
                p20, p50, p80 = milliseconds(run, graph=False)
            if "line" in more:
                more["call_ms"] = milliseconds(run, graph=False, seconds=0.2)[1] if graph else p50
        except Exception as problem:
            self.add(
                family=family, case=case, variant=variant, failed=f"{type(problem).__name__}: {str(problem)[:300]}"
            )
            return
        row = {"family": family, "case": case, "variant": variant, "ms": p50, "p20": p20, "p80": p80, **more}
        if error is not None:
            row["error"] = error
        if moved:
            row["gb_per_s"] = moved / p50 / 1e6
        if flops:
            row["tflop_per_s"] = flops / p50 / 1e9
        self.add(**row)


def relative(got: Any, truth: Any) -> float:
    """The largest error over the largest value, of the worst of several tensors; NaN if anything is NaN."""
    worst = 0.0
    for a, b in zip(got, truth, strict=True):
        scale = b.abs().max().item() or 1.0
        error = (a.double() - b.double()).abs().max().item() / scale
        worst = error if math.isnan(error) else max(worst, error)
    return worst


# ---- parts -------------------------------------------------------------------------------------------------------------


def ceilings(report: Report) -> None:
    """Copy bandwidth, GEMM rates, graph launch, barriers."""
    import torch

    with report.trying("ceiling", "copy 1 GiB"):
        a = tensor(small(1 << 28))
        b = torch.empty_like(a)
        report.time("ceiling", "copy 1 GiB", "torch", partial(b.copy_, a), moved=2.0 * a.numel() * 4)
        del a, b
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        n = small(8192)
        with report.trying("ceiling", f"GEMM {n} {name}"):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            x, y = (tensor(n, n, dtype=dtype) for _ in range(2))
            report.time("ceiling", f"GEMM {n} {name}", "cuBLAS", partial(torch.matmul, x, y), flops=2.0 * n**3)
    torch.backends.cuda.matmul.allow_tf32 = False
    if DRY:
        return
    with report.trying("ceiling", "barriers"), tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        major, minor = torch.cuda.get_device_capability()
        arch = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
        subprocess.run(
            ["nvcc", "-O3", "-std=c++17", arch, str(ROOT / "benchmarks/ceilings.cu"), "-o", str(program)], check=True
        )
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
        for line in done.stdout.splitlines():
            name, value = line.split()
            report.add(family="ceiling", case=name, variant="measured", value=float(value))


def affine_coupling(report: Report) -> None:
    import torch

    large, few = ((65536, 1024), (65536, 256)), ((4096, 256), (64, 64))
    for dtype, shapes in ((torch.float32, (*large, *few)), (torch.bfloat16, large)):
        for rows, features in shapes:
            case = f"{rows}x{features} {str(dtype).removeprefix('torch.')}"
            with report.trying("affine_coupling", case):
                _affine_coupling(report, case, small(rows), small(features), dtype)


def _affine_coupling(report: Report, case: str, rows: int, features: int, dtype: Any) -> None:
    import torch

    import flowkernels as fk
    from flowkernels.ops.affine_coupling import reference
    from flowkernels.scales import ScaleLaw

    x, shift, scale, grad = (tensor(rows, features, dtype=dtype) for _ in range(4))
    law = ScaleLaw("softplus")
    options = (None, law.code, law.numbers, 0, False)
    few = slice(0, 512)
    forward: Callable[..., Any] = reference.affine_coupling
    backward: Callable[..., Any] = reference.affine_coupling_backward
    truth = forward(*(t[few].double() for t in (x, shift, scale)), None, *options)
    sums = tensor(rows)
    truth_back = backward(*(t[few].double() for t in (grad, sums, x, shift, scale)), *options, 7)
    size, bound = x.element_size() * x.numel(), 5e-6 if dtype == torch.float32 else 2e-2

    def first(out: Any) -> list[Any]:
        return [t[few] for t in out]

    for name in ("cuda", "triton"):
        if not have(report, name, "affine_coupling"):
            continue
        report.kernel("affine_coupling", f"forward {case}", name, "affine_coupling", x, shift, scale, None, *options,
                      check=lambda out: relative(first(out), truth), bound=bound, moved=4 * size)  # fmt: skip
        report.kernel("affine_coupling", f"backward {case}", name, "affine_coupling_backward",
                      grad, sums, x, shift, scale, *options, 7,
                      check=lambda out: relative(first(out), truth_back), bound=bound, moved=7 * size)  # fmt: skip

    def plain(x: Any, shift: Any, scale: Any) -> Any:
        sigma = torch.nn.functional.softplus(scale) + 1e-3
        return sigma * x + shift, sigma.log().sum(-1)

    check = lambda out: relative(first(out), truth)  # noqa: E731
    report.time("affine_coupling", f"forward {case}", "eager", lambda: plain(x, shift, scale), check=check,
                bound=10 * bound, moved=4 * size)  # fmt: skip
    if features != 1024 or DRY:
        return
    compiled = torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False)
    report.time("affine_coupling", f"forward {case}", "torch.compile", lambda: compiled(x, shift, scale),
                check=check, bound=10 * bound, moved=4 * size)  # fmt: skip
    leaves = [t.clone().requires_grad_() for t in (x, shift, scale)]

    def both(function: Callable[..., Any]) -> list[Any]:
        y, logdet = function(*leaves)
        return list(torch.autograd.grad([y, logdet], leaves, [grad, sums.to(logdet.dtype)]))

    ours = lambda x, shift, scale: fk.ops.affine_coupling(x, shift, scale, law="softplus")  # noqa: E731
    for name, function in (("auto", ours), ("eager", plain), ("torch.compile", compiled)):
        report.time("affine_coupling", f"forward+backward {case}", name, partial(both, function),
                    check=lambda out: relative(first(out), truth_back), bound=10 * bound, moved=11 * size,
                    graph=False)  # fmt: skip


def maf(report: Report) -> None:
    """Sampling and density of D=784, H=1024, two hidden layers, of the smaller flow of the CPU benchmarks, of splines."""
    import torch

    import flowkernels as fk

    torch.manual_seed(0)
    for chain, model, features, hidden, batches in (
        ("maf", fk.models.MAF, 784, 1024, (1, 1024, 64, 16384)),
        ("maf", fk.models.MAF, 63, 512, (1, 1024, 64, 16384)),
        ("maf_spline", fk.models.NSF, 63, 512, (64, 2048, 16384)),
    ):
        backends = [name for name in ("cuda", "triton") if have(report, name, chain)]
        label = f"{model.__name__} D={features} H={hidden}"
        with report.trying("maf", label):
            sizes = small(features, 6), (small(hidden, 8), small(hidden, 8))
            flow = model(*sizes, small(5, 2)).to(DEVICE).requires_grad_(False)
            one = model(*sizes, 1).to(DEVICE).requires_grad_(False)
            made = [m for m in flow.modules() if isinstance(m, fk.nn.MADE)]
            pairs = sum(int(mask.sum()) for m in made for mask in m.plan.masks)
            for batch in batches:
                with report.trying("maf", f"{label} B={batch}"):
                    _maf(report, chain, f"{label} B={batch}", backends, flow, one, small(batch, 4), sizes[0], pairs)
            flow.requires_grad_(True)
            for batch in (64, 1024, 16384):
                with report.trying("maf", f"backward, {label} B={batch}"):
                    case = f"5 transforms, {label} B={batch}"
                    _maf_backward(report, chain, case, backends, flow, small(batch, 4), sizes[0])


def _maf(
    report: Report,
    chain: str,
    case: str,
    backends: Sequence[str],
    flow: Any,
    one: Any,
    batch: int,
    features: int,
    pairs: int,
) -> None:
    z = tensor(batch, features)
    flops = 2.0 * pairs * batch
    few = z[: min(batch, 32)]
    with on("reference"):
        truth = one.double().inverse(few.double())
    one.float()
    counts: dict[str, Any] = {"size": batch, "dtype": "float32"}
    sampling, density = counts | {"line": f"{chain}_inverse"}, counts | {"line": f"{chain}_forward"}
    for name in backends:
        report.time("maf", f"inverse, 1 transform, {case}", name, bound_to(name, lambda: one.inverse(z)),
                    check=lambda out: relative([t[: len(few)] for t in out], truth), bound=1e-4 if chain == "maf" else 1e-3, flops=flops / 5,
                    **sampling)  # fmt: skip
        # The right answer of a long chain is what the density direction takes back to where it came from.
        report.time("maf", f"inverse, 5 transforms, {case}", name, bound_to(name, lambda: flow.inverse(z)),
                    check=lambda out: relative([flow.transform(out[0])[0]], [z]), bound=1e-2, flops=flops,
                    **sampling)  # fmt: skip
        report.time("maf", f"log_prob, 5 transforms, {case}", name, bound_to(name, lambda: flow.log_prob(z)),
                    flops=flops, **density)  # fmt: skip
    report.time("maf", f"log_prob, 5 transforms, {case}", "eager masks",
                bound_to("reference", lambda: flow.log_prob(z)), flops=flops)  # fmt: skip
    if batch in (1, 1024):
        for graph in (True, False):
            report.time("maf", f"inverse, 1 transform, {case}", f"naive loop, {'CUDA graph' if graph else 'eager'}",
                        bound_to("reference", lambda: one.inverse(z)), graph=graph)  # fmt: skip


def _maf_backward(
    report: Report, chain: str, case: str, backends: Sequence[str], flow: Any, batch: int, features: int
) -> None:
    """The backward operator of either direction, and sampling with its gradient."""
    import torch

    from flowkernels.ops.maf.autograd import Maf

    z = tensor(batch, features)
    for way, run in (("inverse", flow.inverse), ("forward", flow.transform)):
        for name in backends:
            y, logdet = bound_to(name, partial(run, z))()
            given = torch.randn_like(y), torch.randn_like(logdet)
            # Called as autograd calls it, but in this thread, for which the backend is chosen.
            with torch.no_grad():
                report.time("maf", f"{way} backward, {case}", name, bound_to(name, partial(Maf.backward, y.grad_fn, *given, None)),
                            line=f"{chain}_{way}_backward", size=batch, dtype="float32")  # fmt: skip

    def rsample() -> list[Any]:
        x, logdet = flow.inverse(z)
        return list(torch.autograd.grad(x.square().sum() + logdet.sum(), list(flow.parameters())))

    report.time("maf", f"inverse forward+backward, {case}", "auto", rsample, graph=False)


def gumbel(report: Report) -> None:
    for rows, classes in ((65536, 1024), (65536, 256), (4096, 50257), (4096, 256), (64, 256)):
        case = f"{rows}x{classes}"
        with report.trying("gumbel_softmax", case):
            _gumbel(report, case, small(rows), small(classes), compiled=rows * classes > 1 << 20)
        for samples in (1, 16):
            with report.trying("gumbel_argmax", f"k={samples} {case}"):
                _gumbel_argmax(report, f"k={samples} {case}", small(rows), small(classes), samples)


def _gumbel_argmax(report: Report, case: str, rows: int, classes: int, samples: int) -> None:
    import torch

    from flowkernels.ops.gumbel_argmax import reference

    logits, seed = tensor(rows, classes), torch.tensor(1234567, device=DEVICE)
    few, bytes_read = slice(0, 256), 4 * logits.numel()
    truth = reference.gumbel_argmax(logits[few].contiguous(), seed, 0, samples)

    def wrong(out: Any) -> float:
        """The share of samples that are others: where rounding decides, that may be."""
        return float((out[0][few] != truth[0]).double().mean()) + relative([out[2][few]], [truth[2]])

    for name in ("cuda", "triton"):
        if have(report, name, "gumbel_argmax"):
            report.kernel("gumbel_argmax", case, name, "gumbel_argmax", logits, seed, 0, samples,
                          check=wrong, bound=5e-3, moved=bytes_read)  # fmt: skip
    report.time("gumbel_argmax", case, "torch.multinomial",
                lambda: torch.multinomial(logits.softmax(-1), samples, replacement=samples > 1), moved=bytes_read)  # fmt: skip


def _gumbel(report: Report, case: str, rows: int, classes: int, *, compiled: bool) -> None:
    import torch

    from flowkernels import _cuda
    from flowkernels.ops.gumbel_softmax import reference

    logits = tensor(rows, classes)
    tau = torch.ones((), device=DEVICE).expand(rows)
    seed = torch.tensor(1234567, device=DEVICE)
    size = 4 * logits.numel()
    few = slice(0, 256)
    truth = [reference.gumbel_softmax(logits[few].contiguous(), tau[few], seed, 0, False)]
    for name in ("cuda", "triton"):
        if not have(report, name, "gumbel_softmax"):
            continue
        for hard in (False, True):
            report.kernel("gumbel_softmax", f"forward hard={hard} {case}", name, "gumbel_softmax", logits, tau, seed, 0, hard,
                          check=None if hard else lambda out: relative([out[few]], truth), bound=1e-5, moved=2 * size)  # fmt: skip
        y = _cuda._kernel(name, "gumbel_softmax")(logits, tau, seed, 0, False)
        report.kernel("gumbel_softmax", f"backward {case}", name, "gumbel_softmax_backward", logits, y, tau, False,
                      moved=3 * size)  # fmt: skip
    function = torch.nn.functional.gumbel_softmax
    report.time(
        "gumbel_softmax", f"forward hard=False {case}", "F.gumbel_softmax", lambda: function(logits), moved=2 * size
    )
    if DRY or not compiled:
        return
    fused = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    report.time("gumbel_softmax", f"forward hard=False {case}", "torch.compile", lambda: fused(logits),
                moved=2 * size, graph=False)  # fmt: skip


def masked_linear(report: Report) -> None:
    import torch

    backends = [name for name in ("cuda", "triton") if have(report, name, "masked_linear")]
    half = torch.float16 if DRY else torch.bfloat16  # interpreted, Triton multiplies bfloat16 wrongly
    every = ("sorted", "shuffled")
    for width, batches, dtypes, labels in (
        (1024, (1024, 16384), (torch.float32, half), every),
        (256, (1024,), (torch.float32,), every[:1]),
        (128, (64,), (torch.float32,), every[:1]),
    ):
        for label in labels:
            order = torch.arange if label == "sorted" else torch.randperm
            degrees = order(small(width), device=DEVICE)
            for dtype in dtypes:
                for batch in batches:
                    case = f"{batch}x{width} {str(dtype).removeprefix('torch.')} {label}"
                    with report.trying("masked_linear", case):
                        _masked_linear(report, case, backends, degrees, small(batch), dtype)


def _masked_linear(report: Report, case: str, backends: Sequence[str], degrees: Any, batch: int, dtype: Any) -> None:
    import torch

    from flowkernels.ops.masked_linear import reference

    linear: Callable[..., Any] = reference.masked_linear
    width = len(degrees)
    mask = reference.mask_of(degrees, degrees, False)
    x, grad = (tensor(batch, width, dtype=dtype) for _ in range(2))
    weight, bias = tensor(width, width, dtype=dtype) / 32, tensor(width, dtype=dtype)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    exact = linear(*(t.double() for t in (x[:64], weight, bias)), degrees, degrees, False, 1)
    exact_back = [
        grad[:64].double() @ (weight.double() * mask), (grad.double().T @ x.double()) * mask, grad.double().sum(0)
    ]  # fmt: skip
    flops = 2.0 * batch * int(mask.sum())
    for name in backends:
        report.kernel("masked_linear", f"forward relu {case}", name, "masked_linear",
                      x, weight, bias, degrees, degrees, False, 1,
                      check=lambda out: relative([out[:64]], [exact]), bound=bound, flops=flops)  # fmt: skip
        report.kernel("masked_linear", f"backward {case}", name, "masked_linear_backward",
                      grad, x, weight, degrees, degrees, False, True, True, flops=2 * flops,
                      check=lambda out: relative([out[0][:64], *out[1:]], exact_back), bound=bound)  # fmt: skip
    cast = mask.to(dtype)
    report.time("masked_linear", f"forward relu {case}", "W*M, cuBLAS",
                lambda: torch.relu(torch.nn.functional.linear(x, weight * cast, bias)), flops=flops)  # fmt: skip
    report.time("masked_linear", f"backward {case}", "W*M, cuBLAS",
                lambda: (grad @ (weight * cast), (grad.T @ x) * cast, grad.sum(0)), flops=2 * flops)  # fmt: skip


def elements(report: Report) -> None:
    """Operators whose elements have a row of parameters each."""
    from flowkernels.scales import ScaleLaw
    from flowkernels.transforms import LRSpline, RQSpline

    splines = [RQSpline("nflows", 8), RQSpline("zuko", 8), LRSpline(8), RQSpline("nflows", 32)]
    for rows, spline in [*((65536, spline) for spline in splines), (4096, splines[0]), (64, splines[0])]:
        options = (spline.bins, spline.code, spline.numbers)
        for inverse in (False, True):
            case = f"{rows}x64 {spline.style} {spline.bins} bins inverse={inverse}"
            with report.trying("rq_spline", case):
                _elements(report, "rq_spline", case, rows, spline.params_per_feature, (*options, inverse))
    law = ScaleLaw("tanh")
    for components in (4, 32):
        for inverse in (False, True):
            case = f"{65536}x64 {components} components inverse={inverse}"
            with report.trying("logistic_mixture", case):
                mixture = (-7.0, law.code, law.numbers, inverse)
                _elements(report, "logistic_mixture", case, 65536, 3 * components + 2, mixture)
    with report.trying("dequantize", "4096x3072"):
        _dequantize(report)


def _dequantize(report: Report) -> None:
    import torch

    from flowkernels import _cuda
    from flowkernels.ops.dequantize import reference

    seed = torch.tensor(1234567, device=DEVICE)
    x = torch.randint(0, 256, (small(4096), small(3072)), device=DEVICE, dtype=torch.uint8)
    options = (None, seed, 0, 256, True, 1e-6)
    truth = reference.dequantize(x[:64], *options, False)
    variants: list[tuple[str, Callable[..., Any]]] = [("eager", reference.dequantize)]
    if have(report, "cuda", "dequantize"):
        variants.insert(0, ("cuda", _cuda._kernel("cuda", "dequantize")))
    for name, run in variants:
        report.time("dequantize", f"bytes {4096}x{3072}", name, partial(run, x, *options, False), moved=5.0 * x.numel(),
                    check=lambda out: relative([t[:64] for t in out], truth), bound=1e-5, graph=name == "cuda")  # fmt: skip


def _elements(report: Report, operator: str, case: str, rows: int, count: int, options: tuple[Any, ...]) -> None:
    import importlib

    import torch

    # Near the border of a bin gradients of float32 are off by parts in a hundred: with these numbers none is so near.
    generator = torch.Generator().manual_seed(2)
    reference: Any = importlib.import_module(f"flowkernels.ops.{operator}.reference")
    rows, features = small(rows, 8), small(64, 8)
    shapes = (rows, features), (rows, features), (rows, features, count), (rows,)
    x, grad, parameters, sums = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    plain, plain_back = (getattr(reference, operator + suffix) for suffix in ("", "_backward"))
    few = slice(0, 512)
    truth = plain(x[few].double(), parameters[few].double(), None, *options)
    truth_back = plain_back(*(t[few].double() for t in (grad, sums, x, parameters)), *options)
    moved, moved_back = 4.0 * x.numel() * (count + 2), 4.0 * x.numel() * (2 * count + 3)
    for name in ("cuda", "triton"):
        if have(report, name, operator):
            report.kernel(operator, f"forward {case}", name, operator, x, parameters, None, *options, moved=moved,
                          check=lambda out: relative([t[few] for t in out], truth), bound=1e-4)  # fmt: skip
            report.kernel(operator, f"backward {case}", name, f"{operator}_backward", grad, sums, x, parameters, *options,
                          check=lambda out: relative([t[few] for t in out], truth_back), bound=1e-3, moved=moved_back)  # fmt: skip
    if operator == "rq_spline" or not options[-1]:  # a bisection takes seconds
        eager = partial(plain, x, parameters, None, *options)
        report.time(operator, f"forward {case}", "eager", eager, moved=moved, graph=False)


def sanitizer(report: Report) -> None:
    """compute-sanitizer over small calls of the CUDA C++ kernels."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        report.add(
            family="sanitizer", case="all", variant="compute-sanitizer", failed="compute-sanitizer is not on the PATH"
        )
        return
    script = """
import torch
from cases import (
    PLANS, affine_options, check_affine, check_dequantize, check_gumbel_argmax, check_logistic_mixture, check_maf,
    check_masked_linear, check_rq_spline, spline_plan,
)
from flowkernels.ops.masked_linear import cuda
from flowkernels.transforms import RQSpline
kernels = torch.ops.flowkernels_cuda
import flowkernels
for law, form, inverse in list(affine_options())[::5]:
    check_affine(kernels, 9, 70, torch.float32, law, form, inverse, device="cuda")
for plan in ("two_layers", "residual_context", "wide_step"):
    for inverse in (True, False):
        check_maf(kernels, [PLANS[plan]()], 9, torch.float32, inverse, device="cuda")
spline = RQSpline("nflows", 4)
for inverse in (True, False):
    check_maf(kernels, [spline_plan(spline, 5, [9])], 9, torch.float32, inverse, law=spline, device="cuda")
for dtype in (torch.float32, torch.bfloat16):
    check_masked_linear(cuda.masked_linear, cuda.masked_linear_backward, dtype, shapes=((70, 130, 150, 12),), device="cuda")
for rows, classes in ((9, 300), (2, 2100)):
    check_gumbel_argmax(kernels.gumbel_argmax, rows, classes, torch.float32, device="cuda")
for style, bins in (("nflows", 5), ("zuko", 4)):
    check_rq_spline(kernels, 41, 33, bins, torch.float32, style, True, device="cuda")
check_logistic_mixture(kernels, 41, 33, 4, torch.float32, True, device="cuda")
check_dequantize(kernels, 9, 1030, torch.float32, True, device="cuda")
torch.cuda.synchronize()
print("FINISHED")
"""
    path = os.pathsep.join([str(ROOT / "tests/gpu"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    for check in ("memcheck", "racecheck"):
        try:
            done = subprocess.run(
                [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                text=True, timeout=100, env={**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            report.add(family="sanitizer", case=check, variant="compute-sanitizer", failed="took longer than 100 s")
            continue
        text = done.stdout + done.stderr
        verdict = "clean" if done.returncode == 0 and "FINISHED" in text else f"exit {done.returncode}: {text[-1500:]}"
        report.add(
            family="sanitizer",
            case=check,
            variant="compute-sanitizer",
            **{"result" if verdict == "clean" else "failed": verdict},
        )


def tests(report: Report) -> None:
    """The whole GPU test suite, in as many processes as there are cores for: most of its time Triton compiles."""
    count = max(1, min(8, (os.cpu_count() or 2) // 2))
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        running = [
            subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, "FK_SHARD": f"{i}/{count}"})
            for i, out in enumerate(logs)
        ]
        # Before this part has to end, so that what was found till then is told.
        end = time.monotonic() + 0.9 * PARTS["tests"][1]
        for process in running:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        codes = [process.wait() for process in running]
        texts = []
        for out in logs:
            out.seek(0)
            texts.append(out.read())
    totals: dict[str, int] = {}
    for text in texts:
        log(text[-3000:])
        closing = (text.strip().splitlines() or [""])[-1]
        for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", closing):
            totals[what] = totals.get(what, 0) + int(number)
    failed = [line for text in texts for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    summary = ", ".join(f"{number} {what}" for what, number in totals.items()) or "nothing was run"
    report.add(
        family="tests",
        case="pytest -m gpu",
        variant=summary,
        **({"failed": failed[:40] or f"exit statuses {codes}"} if any(codes) else {}),
    )


# In this order; the limits in seconds add up to less than LIMIT with what usually happens, and nobody can take all of it.
PARTS: dict[str, tuple[Callable[[Report], None], float]] = {
    "ceilings": (ceilings, 60),
    "tests": (tests, 170),
    "maf": (maf, 140),
    "affine_coupling": (affine_coupling, 105),
    "gumbel": (gumbel, 105),
    "masked_linear": (masked_linear, 70),
    "elements": (elements, 120),
    "sanitizer": (sanitizer, 210),
}


# ---- the whole ---------------------------------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    import torch

    import flowkernels as fk

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    try:
        explanation = fk._cuda.explain()
    except Exception as problem:  # what is wrong with one backend must not cost the figures of the other
        explanation = [f"{type(problem).__name__}: {problem}"]
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton_version,
        "python": platform.python_version(), "flowkernels": fk.__version__,
        "commit": output("git", "rev-parse", "HEAD") or os.environ.get("FK_COMMIT", "unknown"),
        "uncommitted": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "backends": list(fk.available_backends()), "explain": explanation,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Family by family: time, rate, share of the measured ceiling, time over the fastest other variant."""
    copy = next((r.get("gb_per_s") for r in rows if r.get("case") == "copy 1 GiB"), None)
    lines = []
    for row in rows:
        name = f"{row['family']}: {row['case']} [{row['variant']}]"
        if "failed" in row:
            lines.append(f"{name:<86} FAILED {str(row['failed'])[:110]}")
        elif "wrong" in row:
            lines.append(f"{name:<86} WRONG: error {row['wrong']:.3g}")
        elif "ms" in row:
            rate = (
                f"{row['gb_per_s']:8.0f} GB/s"
                if "gb_per_s" in row
                else f"{row['tflop_per_s']:8.1f} TF/s"
                if "tflop_per_s" in row
                else ""
            )
            share = f"{100 * row['gb_per_s'] / copy:4.0f}% of copy" if copy and "gb_per_s" in row else ""
            lines.append(f"{name:<86} {row['ms']:10.4f} ms {rate} {share}")
        else:
            lines.append(f"{name:<86} {row.get('value', row.get('result', 'ok'))}")
    return "\n".join(lines)


def run_for(command: Sequence[str], seconds: float) -> str:
    """What went wrong with a command, or nothing. Processes that it has started end with it: they would spoil the times of
    the next."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
        return f"exit status {code}" if code else ""
    except subprocess.TimeoutExpired:
        return "ran out of time"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def dry() -> list[dict[str, Any]]:
    """The rows of every part that times kernels, each taken once on the CPU and of small tensors."""
    global DRY, DEVICE
    DRY, DEVICE = True, "cpu"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (part, _) in PARTS.items():
            if name not in ("tests", "sanitizer"):
                report = Report(Path(folder) / f"{name}.json")
                part(report)
                rows += json.loads(report.path.read_text())
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=tuple(PARTS), help="run one part in this process")
    parser.add_argument("--json", type=Path, help="where that part writes its rows")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument(
        "--table", action="store_true", help="write the table of choices from what is recorded in --out"
    )
    arguments = parser.parse_args()
    if arguments.table:
        from benchmarks import gpu_choices

        devices = gpu_choices.write(arguments.out)
        log(f"table of choices: {', '.join(sorted(devices)) or 'nothing was measured'}")
        return 0
    if arguments.part:
        PARTS[arguments.part][0](Report(arguments.json))
        return 0
    import torch

    if not torch.cuda.is_available():
        log("make gpu: torch sees no CUDA device; nothing was run")
        return 1
    begin = time.monotonic()
    about = describe()
    log(json.dumps(about, indent=1))
    rows: list[dict[str, Any]] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = about["device"].lower().replace(" ", "-")
    target = arguments.out / f"gpu-{device}-{about['commit'][:10]}.json"
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            left = LIMIT - (time.monotonic() - begin)
            path = Path(folder) / f"{name}.json"
            log(f"===== {name}")
            if left < 10:
                rows.append({"family": name, "case": "all", "variant": "-", "failed": "no time left"})
                continue
            command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--json", str(path)]
            started = time.monotonic()
            problem = run_for(command, min(left, PARTS[name][1]))
            rows += json.loads(path.read_text()) if path.exists() else []
            if problem:
                rows.append({"family": name, "case": "the rest", "variant": "-", "failed": problem})
            rows.append(
                {"family": name, "case": "seconds", "variant": "-", "value": round(time.monotonic() - started, 1)}
            )
            target.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    log(
        f"\n{about['device']}, driver {about['driver']}, CUDA {about['cuda']}, torch {about['torch']}, Triton {about['triton']}, {about['commit'][:10]}"
    )
    log(table(rows))
    log(f"{time.monotonic() - begin:.0f} s; {target}")
    return 1 if any("failed" in row or "wrong" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
