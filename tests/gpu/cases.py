"""Calls and nets that every GPU backend is compared on, small enough for an interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flowkernels.ops.affine_coupling import reference as affine
from flowkernels.ops.maf import reference as maf
from flowkernels.plan import Plan
from flowkernels.scales import FORMS, NAMES, ScaleLaw


def assert_as_close(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error of `got` is at most twice that of the plain version in its dtype, plus that dtype's rounding.

    Against the largest value of the tensor: what a kernel may lose by another order of summation is relative to that.
    """
    assert got.shape == exact.shape, (name, got.shape, exact.shape)
    if exact.numel() == 0:
        return
    finite = exact.isfinite()
    assert (got.isfinite() == finite).all(), f"{name}: other elements are finite"
    exact = torch.where(finite, exact, 0.0)
    error = torch.where(finite, (got.double() - exact).abs(), 0.0).max().item()
    plain_error = torch.where(finite, (plain.double() - exact).abs(), 0.0).max().item()
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= 2 * plain_error + 4 * rounding, f"{name}: error {error:.3g}, plain {plain_error:.3g}"


def affine_options() -> Iterator[tuple[ScaleLaw, str, bool]]:
    laws = [ScaleLaw(name) for name in NAMES]
    laws += [ScaleLaw("softplus", floor=0.0), ScaleLaw("sigmoid", floor=0.0), ScaleLaw("clip", pass_gradient=0.0)]
    for law in laws:
        for form in FORMS:
            if form != "gate" or law.name == "sigmoid":
                yield law, form, False
                yield law, form, True


def check_affine(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
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
    generator = torch.Generator().manual_seed(rows * 1000 + features)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    x, grad_y = make(rows, features).to(dtype), make(rows, features).to(dtype)
    theta = make(rows, 2 * features + 1).to(dtype)
    if layout == "interleaved":
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
    options = (law.code, law.numbers, FORMS.index(form), inverse)

    def double(*tensors: Tensor) -> list[Tensor]:
        return [t.double() for t in tensors]

    inputs, grads = (x, shift, scale, logdet), (grad_y, grad_logdet, x, shift, scale)
    for name, ours, plain, exact in (
        *_zip("forward", forward, affine.affine_coupling, inputs, double(*inputs), options),
        *_zip("backward", backward, affine.affine_coupling_backward, grads, double(*grads), options),
    ):
        assert_as_close(f"{name} {law} {form} inverse={inverse} {layout} {dtype}", ours, plain, exact)
    assert forward(x, shift, scale, None, *options)[1].dtype == compute


def _zip(name: str, ours: Any, reference: Any, inputs: Any, exact: Any, options: Any) -> Iterator[Any]:
    for i, results in enumerate(zip(ours(*inputs, *options), reference(*inputs, *options), reference(*exact, *options), strict=True)):
        yield f"{name} {i}", *results


# ---- autoregressive networks -------------------------------------------------------------------------------------------


def made_masks(features: int, hidden: Sequence[int], *, shuffled: bool = False) -> list[Tensor]:
    """The masks of a MADE with two parameters per feature, interleaved; hidden degrees go round, or are drawn."""
    generator = torch.Generator().manual_seed(features)
    before = degrees = torch.randperm(features, generator=generator) + 1 if shuffled else torch.arange(features) + 1
    masks = []
    for width in hidden:
        now = torch.arange(width) % max(1, features - 1) + 1
        if shuffled:
            now = torch.randint(1, max(2, features), (width,), generator=generator)
        masks.append(now[:, None] >= before[None])
        before = now
    masks.append(degrees.repeat_interleave(2)[:, None] > before[None])
    return masks


def _residual() -> Plan:
    return Plan(made_masks(7, [16] * 5), residual=[None, None, 0, None, 2], context=[0, 2])


def _wide_step() -> Plan:
    """Three features at once, then three that see them: one step has more units than a chain takes."""
    first = torch.ones(70, 6) * (torch.arange(6) < 3)
    return Plan([first, torch.cat([torch.zeros(6, 70), torch.ones(6, 70)])], activation="tanh")


def _blocked() -> Plan:
    masks = made_masks(6, [9])
    masks[-1] = torch.cat([masks[-1][0::2], masks[-1][1::2]])
    return Plan(masks, layout="blocked", activation="elu")


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
    "wide_step": _wide_step,
    "blocked_layout": _blocked,
}


def check_maf(
    kernels: Any, plan: Plan, samples: int, dtype: torch.dtype, inverse: bool, *, law: str = "softplus", form: str = "scale_shift",
    device: str = "cpu",
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(samples)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    parameters = []
    for mask in plan.masks:
        parameters += [make(*mask.shape) / max(1, mask.shape[1]) ** 0.5, 0.3 * make(mask.shape[0])]
    x, grad_y, grad_logdet = make(samples, plan.features), make(samples, plan.features), make(samples)
    context = make(samples, plan.context_width) if plan.context_width else None
    tables, masks = plan.tables(x.device), plan.masks_on(x.device)
    packed, back = (kernels.maf_pack(parameters, masks, tables[i], plan.packed_sizes[i]) for i in (0, 1))
    law_ = ScaleLaw(law)
    options = (law_.code, law_.numbers, FORMS.index(form))
    name = "maf_inverse" if inverse else "maf_forward"
    run, run_back = getattr(kernels, name), getattr(kernels, f"{name}_backward")
    y, logdet, _ = run(x, context, packed, tables[0], *options, 0)
    again, logdet_again, saved = run(x, context, packed, tables[0], *options, plan.saved_rows)
    assert torch.equal(y, again), "keeping activations changes the result"
    assert torch.equal(logdet, logdet_again)
    grads = run_back(grad_y, grad_logdet, x, saved, back, masks, *tables, *options, plan.context_width, True)
    flat = grads[2].split([n for m in masks for n in (m.numel(), m.shape[0])])
    got = [y, logdet, grads[0], *flat, *([grads[1]] if context is not None else [])]

    def reference(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *parameters, *([] if context is None else [context]))]
        weights, terms = leaves[1 : 1 + len(parameters)], None if context is None else leaves[-1]
        out = (maf.maf_inverse if inverse else maf.maf_forward)(leaves[0], terms, plan, weights, law_, form)
        grads = torch.autograd.grad(out, leaves, [grad_y.to(dtype), grad_logdet.to(dtype)], allow_unused=True)
        return [t.detach() for t in out] + [
            torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)
        ]

    for i, (ours, plain, exact) in enumerate(zip(got, reference(dtype), reference(torch.float64), strict=True)):
        assert_as_close(f"{name} output {i} {dtype}", ours.reshape(exact.shape), plain, exact)
