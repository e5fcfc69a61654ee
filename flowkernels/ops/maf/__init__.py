"""The masked autoregressive transform: density in one pass, exact sampling for less than that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_choice, check_float_tensor, check_shape
from flowkernels.ops.maf import reference
from flowkernels.ops.maf.autograd import Maf, maf_op
from flowkernels.ops.maf.pack import packed_weights
from flowkernels.plan import Plan
from flowkernels.scales import FORMS, ScaleLaw
from flowkernels.transforms import Spline, as_transform, code_and_numbers

__all__ = ["Step", "maf_forward", "maf_inverse", "run_chain"]


def maf_forward(
    x: Tensor,
    plan: Plan,
    parameters: Sequence[Tensor],
    *,
    context: Tensor | None = None,
    law: str | ScaleLaw | Spline = "softplus",
    form: str = "scale_shift",
) -> tuple[Tensor, Tensor]:
    r"""Density direction x -> z of a masked autoregressive transform, and its log-det, in one pass.

    ``z_i = affine(x_i; shift_i(x_<i), scale_i(x_<i))``, the parameters given by the masked network of `plan`
    (`flowkernels.plan.Plan`), the affine transform as in `affine_coupling` with `law` and `form`.

    Args:
        x: (N, D), float64, float32, bfloat16 or float16; halves are calculated in float32.
        plan: the network's plan.
        parameters: ``weight_0, bias_0, weight_1, bias_1, ...``: dense weights (out, in) and biases (out,); masked
            weights are never used, and their gradient is zero.
        context: (N, plan.context_width), the terms added to the pre-activations of the layers ``plan.context``, side by
            side.
        law, form: see `affine_coupling`. An `RQSpline` or `LRSpline` in place of the law makes the transform a
            rational spline; the plan then has its ``parameter_names`` (`flowkernels.transforms`).

    Returns:
        z (N, D) and logdet (N,) in nats, differentiable once with respect to x, context and every parameter.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be.

    Source: Papamakarios et al. 2017, arXiv:1705.07057; masks: Germain et al. 2015, arXiv:1502.03509.
    """
    law = _as_transform(law)
    _check("x", x, plan, parameters, context, law, form)
    return run_chain(x, [Step(plan, parameters, context, law, form, False)])


def maf_inverse(
    z: Tensor,
    plan: Plan,
    parameters: Sequence[Tensor],
    *,
    context: Tensor | None = None,
    law: str | ScaleLaw | Spline = "softplus",
    form: str = "scale_shift",
) -> tuple[Tensor, Tensor]:
    r"""Sampling direction z -> x: the exact inverse of `maf_forward`, and its log-det (minus the forward one).

    Others run the whole network D times. Here every weight is used once: a hidden unit is calculated when the last
    feature that it sees is known, features go block by block, and what earlier blocks contribute is one matrix product.
    The gradient is the same sweep backwards and takes memory for one pass, not for D.

    Arguments, returns and errors are those of `maf_forward`, with z (N, D) in place of x.
    """
    law = _as_transform(law)
    _check("z", z, plan, parameters, context, law, form)
    return run_chain(z, [Step(plan, parameters, context, law, form, True)])


class Step(NamedTuple):
    """One transform of a chain."""

    plan: Plan
    parameters: Sequence[Tensor]
    context: Tensor | None
    law: ScaleLaw | Spline
    form: str
    inverse: bool


def run_chain(x: Tensor, steps: Sequence[Step], *, density: bool = False) -> tuple[Tensor, Tensor]:
    """(y, logdet) of x (N, D) through all steps in one call: a tile of samples passes them all inside the cache.

    With `density`, (y, logdet + log N(y; 0, I)): for a small flow, the few more operators would take longer than this.

    The models' way in. Arguments are taken as they are: `maf_forward` and `maf_inverse` check them first.
    """
    dtype = COMPUTE_DTYPE[x.dtype]
    reference = runs_reference(x, _form_of(steps) if x.is_cuda else "maf")
    if x.dtype != dtype:
        keep = x.dtype if not reference and _takes_weights_in_halves(x) else None
        y, logdet = run_chain(x.to(dtype), [_in_dtype(step, dtype, keep) for step in steps], density=density)
        return y.to(x.dtype), logdet
    if reference:
        return _reference_chain(x, steps, density)
    device = x.device
    if x.is_cuda:
        for step in steps:
            _check_fits(x, step)
    grad = torch.is_grad_enabled() and (x.requires_grad or any(_step_needs_grad(step) for step in steps))
    plans = [step.plan for step in steps]
    packed, packed_back = packed_weights(plans, [step.parameters for step in steps], backward=grad)
    tables, contexts = [], []
    codes: list[int] = []
    numbers: list[float] = []
    with_context = any(step.context is not None for step in steps)
    for plan, _, context, law, form, inverse in steps:
        tables.append(plan.tables(device)[0])
        code, described = code_and_numbers(law)
        codes += (code, FORMS.index(form), inverse, plan.saved_rows[inverse] if grad else 0)
        numbers += described
        if with_context:
            contexts.append(x.new_empty(x.shape[0], 0) if context is None else context.to(dtype))
    if not grad:
        y, logdet, _ = maf_op(x, contexts, packed, tables, codes, numbers, density)
        return y, logdet
    tables_back = [step.plan.tables(device)[1] for step in steps]
    masks = [mask for step in steps for mask in step.plan.masks_on(device)]
    weights = [p for step in steps for p in step.parameters]
    groups = (contexts, packed, packed_back, tables, tables_back, masks, weights)
    tensors = [t for group in groups for t in group]
    y, logdet, _ = Maf.apply(x, tuple(map(len, groups)), codes, numbers, density, *tensors)
    return y, logdet


def _form_of(steps: Sequence[Step]) -> str:
    """As `flowkernels.ops.maf.autograd.form_of`."""
    return "maf_spline" if any(isinstance(step.law, Spline) for step in steps) else "maf"


def _step_needs_grad(step: Step) -> bool:
    return (step.context is not None and step.context.requires_grad) or any(p.requires_grad for p in step.parameters)


def _takes_weights_in_halves(x: Tensor) -> bool:
    """On a GPU weights are read where they are multiplied: halves of them are half of what the memory has to give."""
    return x.is_cuda


def _in_dtype(step: Step, dtype: torch.dtype, keep: torch.dtype | None) -> Step:
    """`step` in `dtype`, but for parameters that are all of type `keep`."""
    context = None if step.context is None else step.context.to(dtype)
    kept = all(p.dtype == keep for p in step.parameters)
    return step._replace(
        parameters=step.parameters if kept else [p.to(dtype) for p in step.parameters], context=context
    )


def _check_columns(name: str, x: Tensor, plan: Plan) -> None:
    if x.dim() != 2 or x.shape[1] != plan.features:
        raise ValueError(f"{name} must have shape (N, {plan.features}), got {tuple(x.shape)}")


def _check_fits(x: Tensor, step: Step) -> None:
    """What the kernels of the CPU see in the plan; that of a GPU's lies on the device."""
    plan, context = step.plan, step.context
    _check_columns("x", x, plan)
    if plan.context_width and (context is None or context.shape != (x.shape[0], plan.context_width)):
        got = None if context is None else tuple(context.shape)
        raise ValueError(f"context must have shape ({x.shape[0]}, {plan.context_width}), got {got}")


def _reference_chain(x: Tensor, steps: Sequence[Step], density: bool) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(x.shape[0])
    for plan, parameters, context, law, form, inverse in steps:
        run = reference.maf_inverse if inverse else reference.maf_forward
        if plan.order is not None:
            x = x[:, plan.order]
        x, logdet = run(x, context, plan, parameters, law, form)
        if plan.order is not None:
            x = x[:, plan.order.argsort()]
        total = total + logdet
    return x, total + reference.log_normal(x) if density else total


def _as_transform(law: Any) -> ScaleLaw | Spline:
    transform = as_transform(law)
    if not isinstance(transform, (ScaleLaw, Spline)):
        raise TypeError(f"law must be a scale law, an RQSpline or an LRSpline, got {type(transform).__name__}")
    return transform


def _check(
    name: str, x: Any, plan: Any, parameters: Sequence[Tensor], context: Any, law: ScaleLaw | Spline, form: str
) -> None:
    check_float_tensor(name, x)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a flowkernels.plan.Plan, got {type(plan).__name__}")
    _check_columns(name, x, plan)
    if len(parameters) != 2 * len(plan.masks):
        raise ValueError(
            f"parameters must hold {2 * len(plan.masks)} tensors, a weight and a bias for each of "
            f"{len(plan.masks)} layers, got {len(parameters)}"
        )
    for i, parameter in enumerate(parameters):
        mask = plan.masks[i // 2]
        label = f"parameters[{i}]"
        if not (isinstance(parameter, Tensor) and parameter.dtype == x.dtype and parameter.device == x.device):
            check_float_tensor(label, parameter, like=x, like_name=name)
        if parameter.shape != (mask.shape if i % 2 == 0 else mask.shape[:1]):
            check_shape(label, parameter, tuple(mask.shape if i % 2 == 0 else mask.shape[:1]), "as its mask")
    if plan.context_width and context is None:
        raise ValueError(f"context is missing: this plan needs one of shape (N, {plan.context_width})")
    if context is not None and not plan.context_width:
        raise ValueError("context was given, but this plan has no context layers")
    if context is not None:
        if torch.is_autocast_enabled(x.device.type) and isinstance(context, Tensor):
            context = context.to(x.dtype)  # a linear layer under autocast made it
        check_float_tensor("context", context, like=x, like_name=name)
        check_shape(
            "context", context, (x.shape[0], plan.context_width), "one row per sample, the plan's context_width"
        )
    check_choice("form", form, FORMS)
    if isinstance(law, Spline):
        if form != "scale_shift":
            raise ValueError(f"form must be left as it is for a spline, got {form!r}")
        if len(plan.parameters) != law.params_per_feature:
            raise ValueError(
                f"plan must have {law.params_per_feature} parameters per feature for a spline of {law.bins} bins, "
                f"got {len(plan.parameters)}"
            )
        return
    if form == "gate" and law.name != "sigmoid":
        raise ValueError(f"form 'gate' needs law 'sigmoid', got {law.name!r}")
    if sorted(plan.parameters) != ["scale", "shift"]:
        raise ValueError(
            f"plan must have the parameters shift and scale for an affine transform, got {plan.parameters}"
        )
