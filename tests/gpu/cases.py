"""Calls and nets that every GPU backend is compared on, small enough for an interpreter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flowkernels._backend import backend
from flowkernels.ops import rq_spline
from flowkernels.ops.affine_coupling import cuda as affine_cuda
from flowkernels.ops.affine_coupling import reference as affine
from flowkernels.ops.dequantize import reference as dequantize
from flowkernels.ops.gumbel_argmax import reference as argmax
from flowkernels.ops.logistic_mixture import reference as logistic_mixture
from flowkernels.ops.maf import Step, _reference_chain
from flowkernels.ops.maf import cuda as maf_cuda
from flowkernels.ops.masked_linear import reference as linear
from flowkernels.ops.rq_spline.reference import rq_spline as rq_spline_reference
from flowkernels.plan import Plan
from flowkernels.random import KINDS, reference_noise, uniform_of_pairs, words
from flowkernels.scales import FORMS, NAMES, ScaleLaw
from flowkernels.testing import LAYOUTS, _shaken, check_against_reference, poisoned, random_tensor, with_layout
from flowkernels.transforms import LRSpline, RQSpline, Spline, as_transform, code_and_numbers


def assert_as_close(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error of `got` is at most twice that of the plain version in its dtype, plus that dtype's rounding.

    Against the largest value of the tensor, or 1: what another order of summation may lose is relative to that.
    """
    assert got.shape == exact.shape, (name, got.shape, exact.shape)
    if exact.numel() == 0:
        return
    finite = exact.isfinite()
    assert (got.isfinite() == finite).all(), f"{name}: other elements are finite"
    exact = torch.where(finite, exact, 0.0)
    error = torch.where(finite, (got.double() - exact).abs(), 0.0).max().item()
    plain_error = torch.where(finite, (plain.double() - exact).abs(), 0.0).max().item()
    rounding = torch.finfo(got.dtype).eps * max(1.0, exact.abs().max().item())
    assert error <= 2 * plain_error + 4 * rounding, f"{name}: error {error:.3g}, plain {plain_error:.3g}"


def assert_as_plain(
    name: str,
    got: Sequence[Tensor],
    reference: Callable[[torch.dtype, torch.dtype, int], Sequence[Tensor]],
    dtype: torch.dtype,
) -> None:
    """`assert_as_close` with plain PyTorch's error found as flowkernels.check_against_reference finds it.

    That is the worst of several runs with inputs shaken by some roundings; for float64, which nothing is more exact
    than, from float32, scaled down. `reference(dtype, low, run)` is run number `run`, shaken by roundings of `low`.
    """
    low = torch.float32
    errors: list[Tensor] = []
    for run in range(12):
        pairs = zip(reference(low, low, run), reference(torch.float64, low, run), strict=True)
        now = [(p.double() - e).abs() for p, e in pairs]
        errors = [torch.maximum(a, b) for a, b in zip(errors, now, strict=True)] if errors else now
    scale = 1.5 * torch.finfo(dtype).eps / torch.finfo(low).eps if dtype == torch.float64 else 1.0
    exact = reference(torch.float64, dtype, 0)
    for i, (ours, error, truth) in enumerate(zip(got, errors, exact, strict=True)):
        assert_as_close(f"{name} output {i}", ours.reshape(truth.shape), truth + scale * error, truth)


def affine_options() -> Iterator[tuple[ScaleLaw, str, bool]]:
    laws = [ScaleLaw(name) for name in NAMES]
    laws += [ScaleLaw("softplus", floor=0.0), ScaleLaw("sigmoid", floor=0.0), ScaleLaw("clip", pass_gradient=0.0)]
    for law in laws:
        for form in FORMS:
            if form != "gate" or law.name == "sigmoid":
                yield law, form, False
                yield law, form, True


def check_affine(
    kernels: Any,
    rows: int,
    features: int,
    dtype: torch.dtype,
    law: ScaleLaw,
    form: str,
    inverse: bool,
    *,
    layout: str = "contiguous",
    device: str = "cpu",
) -> None:
    """`layout` is that of the tensors, or "masked" or "compact": every second feature stays as it is."""
    generator = torch.Generator().manual_seed(rows * 1000 + features)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    x, grad_y = make(rows, features).to(dtype), make(rows, features).to(dtype)
    theta = make(rows, 2 * features + 1).to(dtype)
    positions = None
    if layout == "masked":
        column = torch.arange(features, device=device)
        positions = torch.where(column % 2 == 0, column, -1)
    elif layout == "compact":
        column = torch.arange(features, device=device)
        positions = torch.where(column % 2 == 0, column // 2, -1)
    if layout == "compact":
        count = (features + 1) // 2
        shift, scale = theta[:, :count].contiguous(), theta[:, count : 2 * count].contiguous()
    elif layout == "interleaved":
        shift, scale = theta[:, : 2 * features : 2], theta[:, 1 : 2 * features : 2]
    elif layout == "blocked":
        shift, scale = theta[:, 1 : features + 1], theta[:, features + 1 :]
    elif layout == "transposed":
        x, grad_y = x.T.contiguous().T, grad_y.T.contiguous().T
        shift, scale = theta[:1, :features].expand(rows, -1), theta[:, :1].expand(-1, features)
    else:
        shift, scale = theta[:, :features].contiguous(), theta[:, features : 2 * features].contiguous()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    logdet, grad_logdet = make(rows).to(compute), make(rows).to(compute)
    options = (positions, law.code, law.numbers, FORMS.index(form), inverse)

    def double(*tensors: Tensor) -> list[Tensor]:
        return [t.double() for t in tensors]

    inputs, grads = (x, shift, scale, logdet), (grad_y, grad_logdet, x, shift, scale)
    forward = functools.partial(affine_cuda.affine_coupling, kernels.affine_coupling)
    backward = functools.partial(affine_cuda.affine_coupling_backward, kernels.affine_coupling_backward)
    for name, ours, plain, exact in (
        *_zip("forward", forward, affine.affine_coupling, inputs, double(*inputs), options),
        *_zip("backward", backward, affine.affine_coupling_backward, grads, double(*grads), (*options, 7)),
    ):
        assert_as_close(f"{name} {law} {form} inverse={inverse} {layout} {dtype}", ours, plain, exact)
    assert forward(x, shift, scale, None, *options)[1].dtype == compute


def _zip(name: str, ours: Any, reference: Any, inputs: Any, exact: Any, options: Any) -> Iterator[Any]:
    for i, results in enumerate(
        zip(ours(*inputs, *options), reference(*inputs, *options), reference(*exact, *options), strict=True)
    ):
        yield f"{name} {i}", *results


# ---- splines ---------------------------------------------------------------------------------------------------


class _RqSpline(torch.autograd.Function):
    """The two kernels of a backend as one differentiable call."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, options: Any, x: Tensor, parameters: Tensor, logdet: Tensor) -> Any:
        ctx.kernels, ctx.options = kernels, options
        ctx.save_for_backward(x, parameters)
        return kernels.rq_spline(x, parameters, logdet, *options)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> Any:
        grads = ctx.kernels.rq_spline_backward(grad_y, grad_logdet, *ctx.saved_tensors, *ctx.options)
        return None, None, *grads, grad_logdet


def check_rq_spline(
    kernels: Any, rows: int, features: int, bins: int, dtype: torch.dtype, style: str, inverse: bool, *,
    layout: str = "contiguous", device: str = "cpu",
) -> None:  # fmt: skip
    """Values and gradients, with a fair part of x outside the bounds and the last ones far outside, just outside or no
    number; then values at every knot."""
    own = {
        "nflows": {"min_height": 2e-3, "logit_scale": 0.7}, "zuko": {"min_slope": 1e-2},
        "pyro": {"min_height": 2e-3, "min_slope": 0.1}, "linear": {"min_height": 2e-3, "min_lambda": 0.03},
    }  # fmt: skip
    limits = {"bound": 2.9, **own[style]}  # which is no number of float32
    spline = LRSpline(bins, **limits) if style == "linear" else RQSpline(style, bins, **limits)
    bound, options = spline.bound, (spline.bins, spline.code, spline.numbers, inverse)
    make = functools.partial(random_tensor, device=device)
    running = torch.float64 if dtype == torch.float64 else torch.float32
    theta = make((rows, features, spline.params_per_feature), dtype, seed=1, layout=layout)
    logdet = make((rows,), running, seed=2, layout=layout)
    x = make((rows, features), dtype, spread=0.7 * bound)
    # Next to a knot rounding decides about the bin, and a slope of the other bin gets a gradient of exactly 0 or not.
    knots = spline.knots(theta.double())[1 if inverse else 0]
    x[((x.double()[..., None] - knots).abs() < 1e-5 * bound).any(-1)] = 2 * bound
    just = bound * (1 + 1e-9)
    far = torch.tensor([1e4, -1e4, math.inf, -math.inf, math.nan, just, -just], dtype=torch.float64, device=device)
    if x.numel() > 2 * len(far):
        x.view(-1)[-len(far) :] = far.to(dtype)
    x = with_layout(x, layout)

    def call(x: Tensor, theta: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
        if backend() == "reference":
            return rq_spline(x, theta, spline=spline, inverse=inverse, logdet=logdet)
        return _RqSpline.apply(kernels, options, x, theta, logdet)

    name = f"rq_spline {rows}x{features} {spline} inverse={inverse} {layout} {dtype}"
    check_against_reference(call, [x, theta, logdet], name=name)
    if x.numel():
        # Values are continuous there: the bin on either side may give them.
        given = [knots[:, 0].to(dtype), theta[:, :1].expand(-1, bins + 1, -1), logdet]
        check_against_reference(call, given, gradients=False, name=f"{name} at its knots")


def check_rq_spline_extremes(
    kernels: Any, dtype: torch.dtype, style: str, inverse: bool, *, device: str = "cpu"
) -> None:
    """Bins of minimum size, steep and flat slopes side by side; and one parameter that is NaN, in each row another."""
    spline = LRSpline(3) if style == "linear" else RQSpline(style, 3)
    options, count = (3, spline.code, spline.numbers, inverse), spline.params_per_feature
    size = torch.tensor([0.0, 5.0, 30.0, 1e3, 1e4], device=device)[:, None, None]
    theta = (random_tensor((5, 64, count), device=device).sign() * size).to(dtype)
    x = torch.linspace(-spline.bound, spline.bound, 64, device=device, dtype=dtype).expand(5, -1)
    y, logdet = kernels.rq_spline(x, theta, None, *options)
    name = f"{spline} inverse={inverse} {dtype}"
    assert y.isfinite().all(), f"{name}: y"
    assert (y.abs() <= spline.bound).all(), f"{name}: y beyond the bound"
    assert logdet.isfinite().all(), f"{name}: log-det"
    for grad in kernels.rq_spline_backward(y, logdet, x, theta, *options):
        assert not grad.isnan().any(), f"{name}: a gradient is NaN"

    theta = random_tensor((count, 64, count), dtype, device=device)
    theta[torch.eye(count, dtype=torch.bool, device=device)[:, None].expand(-1, 64, -1)] = math.nan
    x = x[:1].expand(count, -1)
    got = kernels.rq_spline(x, theta, None, *options)
    expected = rq_spline_reference(x, theta, None, *options)
    for ours, plain in zip(got, expected, strict=True):
        assert torch.equal(ours.isnan(), plain.isnan()), f"{name}: a NaN among the parameters"


# ---- autoregressive networks -----------------------------------------------------------------------------------


def made_masks(features: int, hidden: Sequence[int], *, shuffled: bool = False, per: int = 2) -> list[Tensor]:
    """The masks of a MADE with `per` parameters per feature, interleaved; hidden degrees go round, or are drawn."""
    generator = torch.Generator().manual_seed(features)
    before = degrees = torch.randperm(features, generator=generator) + 1 if shuffled else torch.arange(features) + 1
    masks = []
    for width in hidden:
        now = torch.arange(width) % max(1, features - 1) + 1
        if shuffled:
            now = torch.randint(1, max(2, features), (width,), generator=generator)
        masks.append(now[:, None] >= before[None])
        before = now
    masks.append(degrees.repeat_interleave(per)[:, None] > before[None])
    return masks


def _residual() -> Plan:
    return Plan(made_masks(7, [16] * 5), residual=[None, None, 0, None, 2], context=[0, 2])


def _late_residual() -> Plan:
    """Residual connections from units of the same step, of an earlier block of steps, and that no output sees."""
    masks = made_masks(30, [90] * 3)
    unit = torch.arange(90)
    first = unit % 29 + 1
    later = torch.clamp(first + 9 * (unit // 29), max=30)
    masks[2] = later[:, None] >= first[None]
    masks[3] = (torch.arange(30) + 1).repeat_interleave(2)[:, None] > later[None]
    return Plan(masks, residual=[None, None, 0], activation="tanh")


def _wide_step() -> Plan:
    """Three features at once, then three that see them: one step has more units than a chain takes."""
    first = torch.ones(70, 6) * (torch.arange(6) < 3)
    return Plan([first, torch.cat([torch.zeros(6, 70), torch.ones(6, 70)])], activation="tanh")


def _blocked() -> Plan:
    masks = made_masks(6, [9])
    masks[-1] = torch.cat([masks[-1][0::2], masks[-1][1::2]])
    return Plan(masks, layout="blocked", activation="elu")


def spline_plan(spline: Spline, features: int, hidden: Sequence[int], **options: Any) -> Plan:
    per = spline.params_per_feature
    return Plan(made_masks(features, hidden, per=per), parameters=spline.parameter_names, **options)


def between_permutations(plan: Plan) -> Plan:
    return plan.on(torch.randperm(plan.features, generator=torch.Generator().manual_seed(1)))


PLANS: dict[str, Callable[[], Plan]] = {
    "one_feature": lambda: Plan(made_masks(1, [3])),
    "no_hidden": lambda: Plan(made_masks(4, [])),
    "small": lambda: Plan(made_masks(5, [7])),
    "two_layers": lambda: Plan(made_masks(13, [20, 18]), activation="tanh"),
    "shuffled": lambda: Plan(made_masks(11, [30, 25], shuffled=True), activation="gelu"),
    "several_blocks": lambda: Plan(made_masks(30, [100, 80])),
    "five_layers": lambda: Plan(made_masks(9, [12] * 4), activation="silu"),
    "ten_layers": lambda: Plan(made_masks(6, [8] * 9), activation="softplus"),
    "residual_context": _residual,
    "late_residual": _late_residual,
    "between_permutations": lambda: between_permutations(Plan(made_masks(13, [20, 18], shuffled=True))),
    "wide_step": _wide_step,
    "blocked_layout": _blocked,
}


def check_maf(
    kernels: Any, plans: Sequence[Plan], samples: int, dtype: torch.dtype, inverse: bool, *,
    law: str | ScaleLaw | Spline | Sequence[ScaleLaw | Spline] = "softplus", form: str = "scale_shift",
    density: bool = False, weights: torch.dtype | None = None, device: str = "cpu",
) -> None:  # fmt: skip
    """A chain of transforms, forwards and backwards; `law` is that of all, or one of each. `weights`: their type."""
    generator = torch.Generator().manual_seed(samples)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    features = plans[0].features
    x, grad_y, grad_logdet = make(samples, features), make(samples, features), make(samples)
    laws = list(law) if isinstance(law, (list, tuple)) else [as_transform(law)] * len(plans)
    steps, packed, back, contexts = [], [], [], []
    for plan in plans:
        parameters = []
        for mask in plan.masks:
            pair = make(*mask.shape) / max(1, mask.shape[1]) ** 0.5, 0.3 * make(mask.shape[0])
            parameters += [p.to(weights or dtype) for p in pair]
        contexts.append(make(samples, plan.context_width))
        tables, masks = plan.tables(x.device), plan.masks_on(x.device)
        packed.append(kernels.maf_pack(parameters, masks, tables[0], plan.packed_sizes[0]))
        back.append(kernels.maf_pack(parameters, masks, tables[1], plan.packed_sizes[1]))
        steps.append((plan, parameters))
    forward_tables, backward_tables = ([p.tables(x.device)[i] for p in plans] for i in (0, 1))
    masks = [m for p in plans for m in p.masks_on(x.device)]
    named = [code_and_numbers(one) for one in laws]
    codes = lambda keep: [  # noqa: E731
        c for p, (code, _) in zip(plans, named, strict=True)
        for c in (code, FORMS.index(form), inverse, p.saved_rows[inverse] if keep else 0)
    ]  # fmt: skip
    numbers = [n for _, described in named for n in described]
    y, logdet, _ = maf_cuda.maf(x, contexts, packed, forward_tables, codes(False), numbers, density, kernels=kernels)
    again, logdet_again, saved = maf_cuda.maf(
        x, contexts, packed, forward_tables, codes(True), numbers, density, kernels=kernels
    )
    assert torch.equal(y, again), "keeping activations changes the result"
    assert torch.equal(logdet, logdet_again)
    given = torch.addcmul(grad_y, grad_logdet.unsqueeze(1), y, value=-1) if density else grad_y
    grad_x, grad_contexts, flat = maf_cuda.maf_backward(
        given, grad_logdet, saved, back, masks, forward_tables, backward_tables, codes(True), numbers,
        [p.context_width for p in plans], True, kernels=kernels,
    )  # fmt: skip
    got = [y, logdet, grad_x, *grad_contexts.split([c.numel() for c in contexts])]
    got += flat.split([n for m in masks for n in (m.numel(), m.shape[0])])

    def reference(dtype: torch.dtype, low: torch.dtype, run: int) -> list[Tensor]:
        count = iter(range(1000))
        cast = lambda ts: [_shaken(t, low, run, next(count)).to(dtype).requires_grad_() for t in ts]  # noqa: E731
        own = [cast(parameters) for _, parameters in steps]
        (start,), terms, cotangents = cast([x]), cast(contexts), cast([grad_y, grad_logdet])
        chain = [
            Step(plan, parameters, context if plan.context_width else None, one, form, inverse)
            for plan, parameters, context, one in zip(plans, own, terms, laws, strict=True)
        ]
        out, total = _reference_chain(start, chain, density)
        total = total + 0 * start.sum()  # the unit law's log-det depends on nothing
        leaves = [start, *terms, *(p for parameters in own for p in parameters)]
        grads = torch.autograd.grad([out, total], leaves, [c.detach() for c in cotangents], allow_unused=True)
        return [out.detach(), total.detach()] + [
            torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)
        ]

    assert_as_plain(f"maf inverse={inverse} {dtype}", got, reference, dtype)


# ---- masked linear layers --------------------------------------------------------------------------------------


def _plain(
    operator: Any, tensors: Sequence[Tensor | None], rest: Sequence[Any], dtype: torch.dtype, low: torch.dtype, run: int
) -> Sequence[Tensor]:
    """An operator's reference as `assert_as_plain` asks for it."""
    given = [None if t is None else _shaken(t, low, run, n).to(dtype) for n, t in enumerate(tensors)]
    out = operator(*given, *rest)
    return [out] if isinstance(out, Tensor) else out


def check_masked_linear(
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, ...]],
    dtype: torch.dtype,
    *,
    shapes: Sequence[tuple[int, int, int, int]] = (
        (0, 3, 4, 3), (1, 1, 1, 1), (5, 7, 9, 4), (4, 0, 3, 2), (70, 130, 150, 12), (33, 100, 65, 200),
    ),
    device: str = "cpu",
) -> None:  # fmt: skip
    """Every activation, strides, and all gradients; a shape is (samples, inputs, outputs, degrees)."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    for samples, inputs, outputs, top in shapes:
        for strict in (False, True):
            i, o = (torch.randint(0, top, (n,), generator=generator).to(device) for n in (inputs, outputs))
            x, w, b, g = make(inputs, samples).T, make(outputs, inputs), make(outputs), make(samples, outputs)
            for activation in range(9) if samples == 5 else (0, 1):
                for bias in (b, None):
                    y = forward(x, w, bias, i, o, strict, activation)
                    plain = functools.partial(_plain, linear.masked_linear, (x, w, bias), (i, o, strict, activation))
                    assert_as_plain(f"masked_linear {samples} {activation} {dtype}", [y], plain, dtype)
            rest = (i, o, strict, True, True)
            plain = functools.partial(_plain, linear.masked_linear_backward, (g, x, w), rest)
            assert_as_plain(f"gradients {samples} {dtype}", backward(g, x, w, *rest), plain, dtype)
            neither = backward(g, x, w, i, o, strict, False, False)
            assert [t.shape[0] for t in neither] == [0, 0, 0]


# ---- categorical samples ---------------------------------------------------------------------------------------


def check_gumbel_argmax(
    kernel: Callable[..., tuple[Tensor, ...]], rows: int, classes: int, dtype: torch.dtype, *,
    samples: Sequence[int] = (0, 1, 2, 3, 40, 1500), device: str = "cpu",
) -> None:  # fmt: skip
    """The reference's samples, but for those that rounding decides; a third of the categories is impossible."""
    generator = torch.Generator().manual_seed(classes)
    logits = (2 * torch.randn(classes, rows, generator=generator, dtype=torch.float64).to(device, dtype)).T
    if classes > 3:
        logits[:, torch.randperm(classes, generator=generator)[: classes // 3].to(device)] = -torch.inf
    seed, stream, eps = torch.tensor(0x123456789ABCDEF, device=device), 3, torch.finfo(dtype).eps
    for count in samples:
        index, log_prob, normaliser = kernel(logits, seed, stream, count)
        theirs, _, plain = argmax.gumbel_argmax(logits, seed, stream, count)
        assert index.shape == theirs.shape
        if rows == 0:
            continue
        row, sample = (index != theirs).nonzero(as_tuple=True)
        low, high = torch.minimum(index, theirs)[row, sample], torch.maximum(index, theirs)[row, sample]
        if count == 1:
            noise = reference_noise(seed, stream, 0, rows * classes, KINDS.index("gumbel"), dtype == torch.float64)
            values = logits + noise.reshape(rows, classes)
            assert torch.allclose(values[row, low], values[row, high], rtol=8 * eps, atol=8 * eps)
        else:
            sums = logits.double().softmax(-1).cumsum(-1)
            uniform = uniform_of_pairs(words(seed, stream, 2 * rows * count).reshape(rows, count, 2))[row, sample]
            for between in (low, high - 1):
                assert torch.allclose(sums[row, between], uniform, rtol=0, atol=8 * eps)
        assert logits.gather(-1, index).isfinite().all(), "an impossible category"
        exact = argmax.gumbel_argmax(logits.double(), seed, stream, count)[2]
        for name, *values in (
            ("log_prob", log_prob, argmax.log_prob(logits, index), argmax.log_prob(logits.double(), index)),
            ("normaliser", normaliser, plain, exact),
        ):
            assert_as_close(f"gumbel_argmax {name} {rows} x {classes} k={count} {dtype}", *values)


# ---- elements with a row of parameters each --------------------------------------------------------------------


def check_logistic_mixture(
    kernels: Any, rows: int, features: int, components: int, dtype: torch.dtype, inverse: bool, *,
    law: str = "tanh", device: str = "cpu",
) -> None:  # fmt: skip
    """Components as narrow and as far apart as random parameters make them."""
    named = ScaleLaw(law)
    options = (-7.0, named.code, named.numbers, inverse)
    count = 3 * components + 2
    check_elements(
        "logistic_mixture", kernels, logistic_mixture, rows, features, count, options, dtype, spread=0.5, device=device
    )


def check_elements(
    operator: str, kernels: Any, plain: Any, rows: int, features: int, count: int, options: Sequence[Any],
    dtype: torch.dtype, *, spread: float = 1.0, device: str = "cpu",
) -> None:  # fmt: skip
    """Values and gradients of an operator on (x, parameters), with and without a running log-det.

    An element has `count` parameters of size `spread`.
    """
    name = f"{operator} {rows} x {features} of {count} {options} {dtype}"
    shapes = (rows, features), (rows, features, count)
    inputs = [random_tensor(s, torch.float64, seed=i, device=device) for i, s in enumerate(shapes)]
    given = [(1.5 * inputs[0]).to(dtype), (spread * inputs[1]).to(dtype)]
    x = given[0]
    shapes = x.shape, x.shape[:1], x.shape[:1]
    rest = [random_tensor(s, dtype, seed=5 + i, device=x.device) for i, s in enumerate(shapes)]

    def run(of: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        x, parameters, grad_y, grad_logdet, logdet = tensors
        forward, backward = getattr(of, operator), getattr(of, f"{operator}_backward")
        gradients = backward(grad_y, grad_logdet, x, parameters, *options)
        return [*forward(x, parameters, logdet, *options), forward(x, parameters, None, *options)[1], *gradients]

    reference = functools.partial(_plain, lambda *tensors: run(plain, tensors), [*given, *rest], ())
    with poisoned():
        got = run(kernels, [*given, *rest])
    assert_as_plain(name, got, reference, dtype)


def check_element_layouts(
    operator: str, kernels: Any, rows: int, features: int, count: int, options: Sequence[Any], dtype: torch.dtype, *,
    device: str = "cpu",
) -> None:  # fmt: skip
    """However the inputs lie in memory, an element and its gradient have the same bits."""
    forward, backward = getattr(kernels, operator), getattr(kernels, f"{operator}_backward")
    for layout in LAYOUTS:
        shapes = [(rows, features), (rows, features, count), (rows,), (rows, features)]
        given = [with_layout(random_tensor(s, dtype, seed=i, device=device), layout) for i, s in enumerate(shapes)]
        plain = [t.clone(memory_format=torch.contiguous_format) for t in given]
        for x, parameters, logdet, grad_y in (given, plain):
            with poisoned():
                now = *forward(x, parameters, logdet, *options), *backward(grad_y, logdet, x, parameters, *options)
            if x is given[0]:
                first = now
        for i, (a, b) in enumerate(zip(first, now, strict=True)):
            assert torch.equal(a, b), f"{operator} {layout} {dtype}: output {i} differs"


def check_dequantize(
    kernels: Any, rows: int, features: int, dtype: torch.dtype, logit: bool, *, bytes: bool = True, device: str = "cpu"
) -> None:
    """With noise that was given; and drawn, it is that of the stream."""
    generator = torch.Generator().manual_seed(rows)
    levels = torch.randint(0, 256, (rows, features), generator=generator).to(device)
    x = levels.to(torch.uint8 if bytes else dtype)
    seed = torch.tensor(0x123456789ABCDEF, device=device)
    options = (seed, 3, 256, logit, 0.01, dtype == torch.float64)
    noise = reference_noise(seed, 3, 0, x.numel(), 1, dtype == torch.float64).reshape(x.shape)

    def reference(dtype: torch.dtype, low: torch.dtype, run: int) -> Sequence[Tensor]:
        in_double = dtype == torch.float64
        return dequantize.dequantize(levels, _shaken(noise, low, run, 0).to(dtype), *options[:-1], in_double)

    with poisoned():
        drawn, given = kernels.dequantize(x, None, *options), kernels.dequantize(x, noise, *options)
        x, noise = (with_layout(t, "offset") for t in (x, noise))
        offset = kernels.dequantize(x, noise, *options)
    for a, b, c in zip(drawn, given, offset, strict=True):
        assert torch.equal(a, b), "its own noise is not that of the stream"
        assert torch.equal(a, c), "results depend on where the tensors lie"
    assert_as_plain(f"dequantize {rows} x {features} {dtype} logit={logit} bytes={bytes}", drawn, reference, dtype)
