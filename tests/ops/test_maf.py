"""maf_forward and maf_inverse against the plain network and the naive loop of D passes."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_plans import (
    TRANSFORMS,
    bound,
    grouped_plan,
    inputs_of,
    made_plan,
    named_plans,
    parameters_of,
    plans,
)
from torch import Tensor

import flowkernels as fk
from flowkernels import Plan, testing
from flowkernels.nn import MADE
from flowkernels.ops import maf_forward, maf_inverse
from flowkernels.ops.maf import reference
from flowkernels.ops.maf.autograd import backward_op, maf_op, pack_op
from flowkernels.ops.maf.pack import packed_weights
from flowkernels.plan import ACTIVATIONS
from flowkernels.scales import FORMS, ScaleLaw, as_law
from flowkernels.transforms import code_and_numbers

PLANS = named_plans()
ROWS = (0, 1, 2, 3, 4, 15, 16, 17, 100)

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
every_transform = pytest.mark.parametrize(
    ("law", "form"), TRANSFORMS, ids=lambda v: str(v).replace("ScaleLaw(", "").rstrip(")")
)
both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
needs_cpu = pytest.mark.skipif("cpu" not in fk.available_backends(), reason="needs the compiled library")


def leaves_of(given_inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in given_inputs]


def naive(call: testing.Call, given_inputs: list[Tensor | None], *, gradients: bool = True) -> list[Tensor]:
    with fk.use_backend("reference"):
        return values_and_gradients(call, given_inputs, gradients=gradients)


def values_and_gradients(
    call: testing.Call, given_inputs: list[Tensor | None], *, gradients: bool = True
) -> list[Tensor]:
    """Outputs, then the gradient of every input for fixed cotangents (zeros where there is none)."""
    leaves = leaves_of(given_inputs)
    outputs = call(*leaves)
    if not gradients:
        return [t.detach() for t in outputs]
    loss = sum((t * testing.random_tensor(t.shape, t.dtype, seed=90 + i)).sum() for i, t in enumerate(outputs))
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [
        *(t.detach() for t in outputs),
        *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)),
    ]


def without_gradients(call: testing.Call, given_inputs: list[Tensor | None]) -> list[Tensor]:
    """Outputs only, as inference asks for them: nothing is kept, and a few samples go through one by one."""
    with torch.no_grad(), testing.poisoned():
        return list(call(*given_inputs))


def assert_within(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert g.shape == e.shape
        worst = float((g - e).abs().max()) if g.numel() else 0.0
        assert worst <= tolerance * max(1.0, float(e.abs().max()) if e.numel() else 0.0), f"tensor {i}: {worst}"


# ---- values and gradients ----------------------------------------------------------------------


@both_directions
@every_plan
def test_float64_is_the_naive_loop(plan: Plan, inverse: bool) -> None:
    call, given_inputs = bound(plan, inverse=inverse), inputs_of(plan, 19)
    with testing.poisoned():
        got = values_and_gradients(call, given_inputs)
    assert_within(got, naive(call, given_inputs))


@both_directions
@every_plan
def test_float32_is_as_close_as_the_naive_loop(plan: Plan, inverse: bool) -> None:
    testing.check_against_reference(bound(plan, inverse=inverse), inputs_of(plan, 19, torch.float32))


@both_directions
@every_transform
def test_laws_and_forms(law: str | ScaleLaw, form: str, inverse: bool) -> None:
    plan = made_plan(6, (9, 8))
    call, given_inputs = bound(plan, inverse=inverse, law=law, form=form), inputs_of(plan, 17)
    assert_within(values_and_gradients(call, given_inputs), naive(call, given_inputs))
    testing.check_against_reference(call, inputs_of(plan, 17, torch.float32))


@both_directions
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, inverse: bool) -> None:
    for options in ({}, {"residual": True}):
        plan = made_plan(5, (9, 9), activation=activation, **options)
        call, given_inputs = bound(plan, inverse=inverse), inputs_of(plan, 17)
        assert_within(values_and_gradients(call, given_inputs), naive(call, given_inputs))
        testing.check_against_reference(call, inputs_of(plan, 17, torch.float32))


@both_directions
@pytest.mark.parametrize("rows", ROWS)
def test_batch_sizes(rows: int, inverse: bool) -> None:
    for name in ("natural", "context_residual", "grouped", "one_feature"):
        plan = PLANS[name]
        call, given_inputs = bound(plan, inverse=inverse), inputs_of(plan, rows)
        with testing.poisoned():
            got = values_and_gradients(call, given_inputs)
        assert got[0].shape == (rows, plan.features)
        assert got[1].shape == (rows,)
        expected = naive(call, given_inputs)
        assert_within(got, expected)
        assert_within(without_gradients(call, given_inputs), expected[:2])


@both_directions
@pytest.mark.parametrize(
    "plan",
    [
        made_plan(100, (150, 130), order="random"),
        made_plan(33, (64, 64, 64), residual=True, context_features=5, activation="gelu"),
        made_plan(3, (200, 200)),
        grouped_plan([i // 5 for i in range(60)], [[i % 12 for i in range(100)], [i // 10 for i in range(110)]]),
    ],
    ids=["wide", "residual", "many_units_per_step", "grouped"],
)
def test_many_blocks(plan: Plan, inverse: bool) -> None:
    for rows in (3, 50):
        call, given_inputs = bound(plan, inverse=inverse), inputs_of(plan, rows)
        with testing.poisoned():
            got = values_and_gradients(call, given_inputs)
        assert_within(got, naive(call, given_inputs))
    testing.check_against_reference(call, inputs_of(plan, 17, torch.float32), gradients=False)


@settings(max_examples=60)
@given(plans(), st.sampled_from(ROWS), st.booleans(), st.sampled_from(TRANSFORMS), st.integers(0, 20))
def test_any_plan_is_the_naive_loop(
    plan: Plan, rows: int, inverse: bool, transform: tuple[Any, str], seed: int
) -> None:
    call = bound(plan, inverse=inverse, law=transform[0], form=transform[1])
    given_inputs = inputs_of(plan, rows, seed=seed)
    with testing.poisoned():
        got = values_and_gradients(call, given_inputs)
    expected = naive(call, given_inputs)
    assert_within(got, expected)
    assert_within(without_gradients(call, given_inputs), expected[:2])


@settings(max_examples=40)
@given(plans(most_features=12, most_units=30), st.sampled_from((1, 16, 35)), st.booleans())
def test_any_plan_is_as_close_as_the_naive_loop_in_float32(plan: Plan, rows: int, inverse: bool) -> None:
    testing.check_against_reference(bound(plan, inverse=inverse), inputs_of(plan, rows, torch.float32))


@both_directions
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout: str, inverse: bool) -> None:
    plan = PLANS["context"]
    for dtype in (torch.float64, torch.float32):
        x, context, *parameters = inputs_of(plan, 18, dtype, layout=layout)
        if "expanded" not in layout:
            parameters = [testing.with_layout(p, layout) for p in parameters]
        testing.check_against_reference(bound(plan, inverse=inverse), [x, context, *parameters])


@both_directions
@pytest.mark.parametrize("name", ["natural", "context_residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, name: str, inverse: bool) -> None:
    plan = PLANS[name]
    call = bound(plan, inverse=inverse)
    given_inputs = inputs_of(plan, 17, dtype)
    y, logdet = call(*given_inputs)
    assert y.dtype == dtype
    assert logdet.dtype == torch.float32
    # Calculated in float32, rounded once.
    wide = [None if t is None else t.float() for t in given_inputs]
    exact, exact_logdet = call(*wide)
    testing.assert_same_bits([y, logdet], [exact.to(dtype), exact_logdet])
    testing.check_against_reference(call, given_inputs)
    leaves = leaves_of(given_inputs)
    sum(t.float().sum() for t in call(*leaves)).backward()
    assert all(t.grad is not None and t.grad.dtype == dtype for t in leaves if t is not None)


# ---- gradients ---------------------------------------------------------------------------------


@both_directions
@every_plan
def test_masked_weights_get_a_zero_gradient(plan: Plan, inverse: bool) -> None:
    leaves = leaves_of(inputs_of(plan, 21))
    y, logdet = bound(plan, inverse=inverse)(*leaves)
    (y.square().sum() + logdet.sum()).backward()
    for weight, mask in zip(leaves[2::2], plan.masks, strict=True):
        assert weight.grad[~mask].count_nonzero() == 0


@both_directions
def test_masked_weights_are_never_read(inverse: bool) -> None:
    for plan in PLANS.values():
        x, context, *parameters = inputs_of(plan, 17)
        dirty = [p.clone() for p in parameters]
        for weight, mask in zip(dirty[::2], plan.masks, strict=True):
            weight[~mask] = float("nan")
        call = bound(plan, inverse=inverse)
        clean_run = values_and_gradients(call, [x, context, *parameters])
        dirty_run = values_and_gradients(call, [x, context, *dirty])
        testing.assert_same_bits(dirty_run, clean_run)


@both_directions
@every_plan
def test_gradcheck(plan: Plan, inverse: bool) -> None:
    # Smooth activations: finite differences across a kink of relu say nothing.
    smooth = Plan(
        plan.masks,
        activation=[a if a in ("elu", "gelu", "silu", "tanh") else "tanh" for a in plan.activation],
        residual=plan.residual,
        context=plan.context,
        parameters=plan.parameters,
        layout=plan.layout,
    )
    testing.check_gradients(bound(smooth, inverse=inverse), inputs_of(smooth, 2))


@both_directions
def test_only_the_gradients_that_are_needed(inverse: bool) -> None:
    plan = PLANS["context"]
    given_inputs = inputs_of(plan, 5)
    full = leaves_of(given_inputs)
    sum(t.sum() for t in bound(plan, inverse=inverse)(*full)).backward()
    choices = [[i] for i in range(len(given_inputs))] + [[0, 1], [2, 5], [0, 7], list(range(2, 8))]
    for chosen in choices:
        leaves = [t.detach().clone().requires_grad_(i in chosen) for i, t in enumerate(given_inputs)]
        sum(t.sum() for t in bound(plan, inverse=inverse)(*leaves)).backward()
        for i, (leaf, all_of_them) in enumerate(zip(leaves, full, strict=True)):
            assert (leaf.grad is not None) == (i in chosen)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, all_of_them.grad, rtol=1e-13, atol=1e-13)


@both_directions
def test_gradient_of_one_output_alone(inverse: bool) -> None:
    plan = PLANS["context"]
    call = bound(plan, inverse=inverse)
    for output in (0, 1):
        single = lambda *t, output=output: (call(*t)[output],)  # noqa: E731
        given_inputs = inputs_of(plan, 5)
        assert_within(values_and_gradients(single, given_inputs), naive(single, given_inputs))


@both_directions
def test_gradients_accumulate_over_two_calls(inverse: bool) -> None:
    plan = PLANS["natural"]

    def twice(x: Tensor, context: Tensor | None, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        run = maf_inverse if inverse else maf_forward
        y, first = run(x, plan, parameters, context=context)
        y, second = run(y, plan, parameters, context=context)
        return y, first + second

    given_inputs = inputs_of(plan, 9)
    assert_within(values_and_gradients(twice, given_inputs), naive(twice, given_inputs))


@needs_cpu
@both_directions
def test_double_backward_says_that_there_is_none(inverse: bool) -> None:
    plan = PLANS["natural"]
    leaves = leaves_of(inputs_of(plan, 4))
    y, logdet = bound(plan, inverse=inverse)(*leaves)
    (grad,) = torch.autograd.grad(y.square().sum() + logdet.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"maf\w* is not twice differentiable .*use_backend\('reference'\)"):
        grad.square().sum().backward()
    with fk.use_backend("reference"):
        y, logdet = bound(plan, inverse=inverse)(*leaves)
        (grad,) = torch.autograd.grad(y.square().sum() + logdet.sum(), leaves[0], create_graph=True)
        grad.square().sum().backward()
    assert leaves[2].grad.isfinite().all()


@needs_cpu
@both_directions
@pytest.mark.parametrize("by", [0, 1, 2, 7], ids=["input", "context", "weight", "bias"])
def test_a_second_derivative_is_never_silently_zero(by: int, inverse: bool) -> None:
    """Also where the cotangents are constants and another term gives the gradient a value of its own."""
    smooth = Plan(PLANS["context"].masks, activation="tanh", context=(0,))
    leaves = leaves_of(inputs_of(smooth, 4))
    _, logdet = bound(smooth, inverse=inverse)(*leaves)
    (grad,) = torch.autograd.grad(logdet.sum(), leaves[by], create_graph=True)
    for through in (0, 1, 2, 7):
        with pytest.raises(RuntimeError, match=r"not twice differentiable"):
            torch.autograd.grad(grad.square().sum() + leaves[through].sum(), leaves[through], retain_graph=True)


@needs_cpu
@both_directions
def test_backward_twice_over_the_same_graph(inverse: bool) -> None:
    plan = PLANS["context"]
    leaves = leaves_of(inputs_of(plan, 4))
    y, logdet = bound(plan, inverse=inverse)(*leaves)
    loss = y.square().sum() + logdet.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    testing.assert_same_bits(first, second)


@needs_cpu
@both_directions
def test_backward_uses_the_weights_of_its_forward(inverse: bool) -> None:
    plan = PLANS["natural"]
    given_inputs = inputs_of(plan, 4)
    expected = values_and_gradients(bound(plan, inverse=inverse), given_inputs)[2:]
    leaves = leaves_of(given_inputs)
    outputs = bound(plan, inverse=inverse)(*leaves)
    loss = sum((t * testing.random_tensor(t.shape, t.dtype, seed=90 + i)).sum() for i, t in enumerate(outputs))
    with torch.no_grad():
        for p in leaves[2:]:
            p.mul_(2)
    wanted = [t for t in leaves if t is not None]
    got = None
    # Autograd's own answer to a saved tensor that was changed is fine as well.
    try:
        got = torch.autograd.grad(loss, wanted)
    except RuntimeError as error:
        message = str(error)
    if got is None:
        assert "modified by an inplace operation" in message
    else:
        testing.assert_same_bits(got, expected)


@both_directions
def test_memory_is_that_of_one_pass(inverse: bool) -> None:
    """Bytes that autograd keeps for a sample: at most three times those of a density pass, not D times."""
    plan = made_plan(64, (96, 96))
    given_inputs = leaves_of(inputs_of(plan, 32, torch.float32))

    def kept(call: Callable[..., Any]) -> int:
        storages: dict[int, int] = {}
        alive = []

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = call()
            graph = sum(t.sum() for t in out)
        assert graph.requires_grad
        return sum(storages.values())

    call = bound(plan, inverse=inverse)
    with fk.use_backend("reference"):
        density = kept(lambda: bound(plan, inverse=False)(*given_inputs))
    if "cpu" in fk.available_backends():
        assert kept(lambda: call(*given_inputs)) <= 3 * density


# ---- laws of a flow ----------------------------------------------------------------------------


@every_plan
def test_flow_laws(plan: Plan, backend: str) -> None:
    x, context, *parameters = inputs_of(plan, 3)
    forward, inverse = bound(plan, inverse=False), bound(plan, inverse=True)
    testing.check_flow_laws(lambda t: forward(t, context, *parameters), lambda t: inverse(t, context, *parameters), x)


@every_transform
def test_flow_laws_of_every_transform(law: str | ScaleLaw, form: str, backend: str) -> None:
    plan = made_plan(4, (7, 6))
    x, context, *parameters = inputs_of(plan, 3)
    forward, inverse = (bound(plan, inverse=i, law=law, form=form) for i in (False, True))
    testing.check_flow_laws(lambda t: forward(t, context, *parameters), lambda t: inverse(t, context, *parameters), x)


@given(plans(), st.sampled_from((1, 17)), st.sampled_from(TRANSFORMS))
def test_any_plan_is_undone_by_its_inverse(plan: Plan, rows: int, transform: tuple[Any, str]) -> None:
    x, context, *_ = inputs_of(plan, rows)
    # Smaller weights: a chain of features that each multiply the next ones' error would drown the law in rounding.
    parameters = parameters_of(plan, gain=0.3)
    forward, inverse = (bound(plan, inverse=i, law=transform[0], form=transform[1]) for i in (False, True))
    testing.check_inverse(lambda t: forward(t, context, *parameters), lambda t: inverse(t, context, *parameters), x)
    testing.check_logdets_cancel(
        lambda t: forward(t, context, *parameters), lambda t: inverse(t, context, *parameters), x
    )


@both_directions
def test_extremes_do_not_turn_into_nan(inverse: bool) -> None:
    """|log sigma| of 50 and more gives infinity or 0 where the naive loop does, never NaN."""
    # A single feature: with more, the next ones' network meets an infinity, and 0 times infinity is NaN.
    plan = made_plan(1, ())
    for dtype, u in itertools.product((torch.float32, torch.float64), (50.0, -50.0, 200.0, -200.0, 800.0, -800.0)):
        x = testing.random_tensor((20, 1), dtype)
        parameters = [torch.zeros(2, 1, dtype=dtype), torch.tensor([0.0, u], dtype=dtype)]
        y, logdet = bound(plan, inverse=inverse, law="exp")(x, None, *parameters)
        assert not y.isnan().any()
        assert not logdet.isnan().any()
        torch.testing.assert_close(logdet, torch.full((20,), -u if inverse else u, dtype=dtype))
        with fk.use_backend("reference"):
            expected = bound(plan, inverse=inverse, law="exp")(x, None, *parameters)
        torch.testing.assert_close((y, logdet), expected)


# ---- NaN ---------------------------------------------------------------------------------------


@both_directions
@pytest.mark.parametrize("where", range(8))
def test_nan_weights_flow_through(where: int, inverse: bool) -> None:
    plan = PLANS["context"]
    x, context, *parameters = inputs_of(plan, 17)
    tensor = [x, context, *parameters][where]
    if where >= 2 and where % 2 == 0:
        row, column = plan.masks[(where - 2) // 2].nonzero()[0].tolist()
        tensor[row, column] = float("nan")
    else:
        tensor.view(-1)[0] = float("nan")
    call = bound(plan, inverse=inverse)
    y, logdet = call(x, context, *parameters)
    with fk.use_backend("reference"):
        expected, expected_logdet = call(x, context, *parameters)
    assert expected.isnan().any() or expected_logdet.isnan().any()
    if not inverse:  # the loop starts from zeros, so a NaN may reach what it should not in early passes: not compared
        assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(logdet.isnan(), expected_logdet.isnan())
    leaves = leaves_of([x, context, *parameters])
    sum(t.sum() for t in call(*leaves)).backward()


@both_directions
def test_a_nan_sample_stays_alone(inverse: bool) -> None:
    plan = PLANS["natural"]
    x, _, *parameters = inputs_of(plan, 20)
    clean = bound(plan, inverse=inverse)(x, None, *parameters)
    x[7] = float("nan")
    dirty = bound(plan, inverse=inverse)(x, None, *parameters)
    others = torch.arange(20) != 7
    testing.assert_same_bits([t[others] for t in dirty], [t[others] for t in clean])
    assert dirty[0][7].isnan().all()


@both_directions
def test_a_sample_does_not_depend_on_its_neighbours(inverse: bool) -> None:
    plan = PLANS["residual"]
    x, _, *parameters = inputs_of(plan, 40, torch.float32)
    whole = bound(plan, inverse=inverse)(x, None, *parameters)
    for rows in (slice(0, 16), slice(16, 32)):
        part = bound(plan, inverse=inverse)(x[rows], None, *parameters)
        testing.assert_same_bits([t[rows] for t in whole], part)


@both_directions
def test_log_det_of_many_features_is_as_close_as_plain(inverse: bool) -> None:
    """A running sum over features would round off several times more than torch's."""
    plan = MADE(1500, (24,)).plan
    x, _, *parameters = inputs_of(plan, 40, torch.float32)
    y, logdet = bound(plan, inverse=inverse)(x, None, *parameters)
    # The same parameters of every feature for both, so that nothing but the sum differs.
    point = (y if inverse else x).double()
    doubles = [p.double() for p in parameters]
    law = as_law("softplus")
    _, truth = reference.maf_forward(point, None, plan, doubles, law, "scale_shift")
    _, plain = reference.maf_forward(point.float(), None, plan, parameters, law, "scale_shift")
    sign = -1.0 if inverse else 1.0
    error = float((sign * logdet.double() - truth).square().mean().sqrt())
    of_plain = float((plain.double() - truth).square().mean().sqrt())
    assert error <= 2 * of_plain, (error, of_plain)


# ---- the ways PyTorch calls --------------------------------------------------------------------


@needs_cpu
@both_directions
@pytest.mark.parametrize("name", ["natural", "context_residual"])
@pytest.mark.parametrize("rows", [0, 5])
def test_opcheck(name: str, inverse: bool, rows: int) -> None:
    plan = PLANS[name]
    x, context, *parameters = inputs_of(plan, rows)
    tables, masks = plan.tables(x.device), plan.masks_on(x.device)
    (packed,), (back,) = packed_weights([plan], [parameters], backward=True)
    law, numbers = code_and_numbers(as_law("softplus"))
    contexts = [] if context is None else [context]
    for backward in (False, True):
        testing.check_opcheck(pack_op, [parameters, masks, tables[backward], plan.packed_sizes[backward]])
    codes = [law, FORMS.index("scale_shift"), inverse, 0]
    testing.check_opcheck(maf_op, [x, contexts, [packed], [tables[0]], codes, numbers, False])
    codes[3] = plan.saved_rows[inverse]
    y, logdet, saved = maf_op(x, contexts, [packed], [tables[0]], codes, numbers, False)
    width = 0 if context is None else context.shape[1]
    for want in (False, True):
        arguments = [y, logdet, saved, [back], masks, [tables[0]], [tables[1]], codes, numbers, [width], want]
        testing.check_opcheck(backward_op, arguments)


@both_directions
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(compiler: str, inverse: bool, backend: str) -> None:
    for name in ("natural", "context_residual"):
        plan = PLANS[name]
        call, given_inputs = bound(plan, inverse=inverse), inputs_of(plan, 6, torch.float32)
        if given_inputs[1] is None:
            call = lambda x, *p, call=call: call(x, None, *p)  # noqa: E731
            given_inputs = [given_inputs[0], *given_inputs[2:]]
        testing.check_compile(call, given_inputs, backend=compiler, terms=16)
        if compiler == "aot_eager":
            testing.check_compile(call, given_inputs, backend=compiler, gradients=False, terms=16)


@both_directions
def test_compile_with_dynamic_shapes(inverse: bool) -> None:
    plan = PLANS["context"]
    testing.check_compile(
        bound(plan, inverse=inverse), inputs_of(plan, 6, torch.float32), backend="aot_eager", dynamic=True
    )


@needs_cpu
@both_directions
def test_compiled_calls_see_new_weights(inverse: bool) -> None:
    torch.compiler.reset()
    plan = PLANS["natural"]
    x, _, *parameters = inputs_of(plan, 6)
    call = bound(plan, inverse=inverse)
    compiled = torch.compile(lambda: call(x, None, *parameters), fullgraph=True, backend="aot_eager")
    compiled()
    for p in parameters:
        p.mul_(1.5)
    assert_within(list(compiled()), naive(call, [x, None, *parameters], gradients=False))


@needs_cpu  # plain PyTorch's batched products round differently from single ones
@both_directions
def test_vmap_over_samples(inverse: bool) -> None:
    plan = PLANS["context"]
    x, context, *parameters = inputs_of(plan, 6)
    batched = [x.reshape(2, 3, -1), context.reshape(2, 3, -1), *parameters]
    call = bound(plan, inverse=inverse)
    testing.check_vmap(call, batched, [0, 0] + [None] * len(parameters))
    testing.check_vmap(call, [batched[0], context[:3], *parameters], [0] + [None] * (1 + len(parameters)))
    testing.check_vmap(call, [x[:3], batched[1], *parameters], [None, 0] + [None] * len(parameters))
    last = batched[0].permute(1, 2, 0).contiguous()
    testing.check_vmap(call, [last, batched[1], *parameters], [2, 0] + [None] * len(parameters))


@both_directions
def test_jacrev(inverse: bool, backend: str) -> None:
    plan = PLANS["context_residual"]
    x, context, *parameters = inputs_of(plan, 3)
    call = bound(plan, inverse=inverse)
    for i in range(2 + len(parameters)):
        of_one = torch.func.jacrev(lambda *t: call(*t)[0], argnums=i)(x, context, *parameters)

        def output(value: Tensor, i: int = i) -> Tensor:
            given_inputs: list[Any] = [x, context, *parameters]
            given_inputs[i] = value
            with fk.use_backend("reference"):
                return call(*given_inputs)[0]

        expected = torch.autograd.functional.jacobian(output, [x, context, *parameters][i])
        torch.testing.assert_close(of_one, expected, rtol=1e-11, atol=1e-11)


@both_directions
def test_gradients_per_sample(inverse: bool, backend: str) -> None:
    plan = PLANS["context"]
    x, context, *parameters = inputs_of(plan, 4)
    call = bound(plan, inverse=inverse)

    def loss(parameters: tuple[Tensor, ...], x: Tensor, context: Tensor) -> Tensor:
        y, logdet = call(x[None], context[None], *parameters)
        return y.square().sum() + logdet.sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(tuple(parameters), x, context)
    for i in range(4):
        leaves = leaves_of(parameters)
        with fk.use_backend("reference"):
            expected = torch.autograd.grad(loss(tuple(leaves), x[i], context[i]), leaves)
        assert_within([g[i] for g in got], list(expected))


@both_directions
def test_vmap_over_parameters(inverse: bool, backend: str) -> None:
    plan = PLANS["context"]
    x, context, *_ = inputs_of(plan, 5)
    ensemble = [parameters_of(plan, seed=10 * k) for k in range(3)]
    stacked = [torch.stack(p) for p in zip(*ensemble, strict=True)]
    call = bound(plan, inverse=inverse)
    got = torch.func.vmap(call, in_dims=(None, None, *[0] * len(stacked)))(x, context, *stacked)
    for k, parameters in enumerate(ensemble):
        assert_within([t[k] for t in got], naive(call, [x, context, *parameters], gradients=False))

    def loss(x: Tensor, context: Tensor, *parameters: Tensor) -> Tensor:
        y, logdet = call(x, context, *parameters)
        return y.square().sum() + logdet.sum()

    every = tuple(range(2 + len(stacked)))
    dims = (None, None, *[0] * len(stacked))
    grads = torch.func.vmap(torch.func.grad(loss, argnums=every), in_dims=dims)(x, context, *stacked)
    for k, parameters in enumerate(ensemble):
        leaves = leaves_of([x, context, *parameters])
        with fk.use_backend("reference"):
            expected = torch.autograd.grad(loss(*leaves), leaves)
        assert_within([g[k] for g in grads], list(expected))


@both_directions
def test_autocast(inverse: bool, backend: str) -> None:
    """A flow's arithmetic stays in float32: a density in bfloat16 is worth nothing."""
    plan = PLANS["context"]
    given_inputs = inputs_of(plan, 6, torch.float32)
    call = bound(plan, inverse=inverse)
    expected = call(*given_inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(*given_inputs)
        # What comes out of an autocast region around it, a context network's output, has another dtype.
        mixed = call(given_inputs[0], given_inputs[1].bfloat16(), *given_inputs[2:])
    assert [t.dtype for t in got] == [torch.float32, torch.float32]
    if backend == "cpu":
        testing.assert_same_bits(got, expected)
    torch.testing.assert_close(mixed, expected, rtol=0.1, atol=0.1)


@needs_cpu
@both_directions
def test_same_bits_every_time(inverse: bool) -> None:
    for name in ("natural", "context_residual"):
        plan = PLANS[name]
        testing.check_deterministic(bound(plan, inverse=inverse), inputs_of(plan, 100, torch.float32), runs=3)


@needs_cpu
@both_directions
def test_threads(inverse: bool) -> None:
    for plan in (PLANS["context"], made_plan(40, (90, 90))):
        testing.check_threads(bound(plan, inverse=inverse), inputs_of(plan, 200, torch.float32))


@needs_cpu
@both_directions
def test_every_output_is_written(inverse: bool) -> None:
    plan = PLANS["context_residual"]
    for rows in ROWS:
        with testing.poisoned():
            out = values_and_gradients(bound(plan, inverse=inverse), inputs_of(plan, rows, torch.float32))
        testing.assert_written(out)


# ---- packed weights ----------------------------------------------------------------------------


def test_packed_weights_die_with_the_plan_and_do_not_hold_parameters() -> None:
    plan = made_plan(4, (6,))
    x, _, *parameters = inputs_of(plan, 2)
    maf_inverse(x, plan, parameters)
    watch = weakref.ref(parameters[0])
    del parameters
    gc.collect()
    assert watch() is None


def test_two_sets_of_weights_in_turn() -> None:
    plan = made_plan(4, (6,))
    x, _, *one = inputs_of(plan, 3)
    two = parameters_of(plan, seed=20)
    call = bound(plan, inverse=True)
    for _ in range(3):
        for parameters in (one, two):
            assert_within(values_and_gradients(call, [x, None, *parameters]), naive(call, [x, None, *parameters]))


# ---- bad input ---------------------------------------------------------------------------------

PLAN, CONTEXT_PLAN = PLANS["natural"], PLANS["context"]
X = torch.zeros(3, 5)
PARAMETERS = parameters_of(PLAN, torch.float32)
X4, C7 = torch.zeros(3, 4), torch.zeros(3, 7)
WITH_CONTEXT = parameters_of(CONTEXT_PLAN, torch.float32)


def replaced(i: int, value: Any) -> list[Any]:
    return [value if j == i else p for j, p in enumerate(PARAMETERS)]


@pytest.mark.parametrize("run", [maf_forward, maf_inverse], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"NAME must be a torch\.Tensor, got list", lambda run: run([1.0], PLAN, PARAMETERS)),
        (TypeError, r"NAME must be float64, .*got torch\.int64", lambda run: run(X.long(), PLAN, PARAMETERS)),
        (TypeError, r"NAME must be float64, .*got torch\.complex64", lambda run: run(X + 0j, PLAN, PARAMETERS)),
        (ValueError, r"NAME must have shape \(N, 5\), got \(3, 4\)", lambda run: run(X4, PLAN, PARAMETERS)),
        (ValueError, r"NAME must have shape \(N, 5\), got \(5,\)", lambda run: run(X[0], PLAN, PARAMETERS)),
        (ValueError, r"NAME must have shape \(N, 5\), got \(1, 3, 5\)", lambda run: run(X[None], PLAN, PARAMETERS)),
        (
            TypeError,
            r"plan must be a flowkernels\.plan\.Plan, got list",
            lambda run: run(X, list(PLAN.masks), PARAMETERS),
        ),
        (TypeError, r"plan must be a flowkernels\.plan\.Plan, got NoneType", lambda run: run(X, None, PARAMETERS)),
        (
            ValueError,
            r"parameters must hold 6 tensors, a weight and a bias for each of 3 layers, got 5",
            lambda run: run(X, PLAN, PARAMETERS[:5]),
        ),
        (ValueError, r"parameters must hold 6 tensors.*got 0", lambda run: run(X, PLAN, [])),
        (
            ValueError,
            r"parameters\[0\] must have shape \(8, 5\) .*got \(5, 8\)",
            lambda run: run(X, PLAN, replaced(0, torch.zeros(5, 8))),
        ),
        (
            ValueError,
            r"parameters\[3\] must have shape \(7,\) .*got \(1, 7\)",
            lambda run: run(X, PLAN, replaced(3, torch.zeros(1, 7))),
        ),
        (
            TypeError,
            r"parameters\[2\] has dtype torch\.float64, but NAME has torch\.float32",
            lambda run: run(X, PLAN, replaced(2, PARAMETERS[2].double())),
        ),
        (
            TypeError,
            r"parameters\[1\] must be a torch\.Tensor, got NoneType",
            lambda run: run(X, PLAN, replaced(1, None)),
        ),
        (
            TypeError,
            r"parameters\[4\] must be float64, .*got torch\.int64",
            lambda run: run(X, PLAN, replaced(4, PARAMETERS[4].long())),
        ),
        (
            ValueError,
            r"parameters\[5\] is on meta, but NAME is on cpu",
            lambda run: run(X, PLAN, replaced(5, PARAMETERS[5].to("meta"))),
        ),
        (
            ValueError,
            r"parameters\[0\] is on cpu, but NAME is on meta",
            lambda run: run(X.to("meta"), PLAN, PARAMETERS),
        ),
        (
            ValueError,
            r"context is missing: this plan needs one of shape \(N, 7\)",
            lambda run: run(X4, CONTEXT_PLAN, WITH_CONTEXT),
        ),
        (
            ValueError,
            r"context must have shape \(3, 7\) .*got \(3, 6\)",
            lambda run: run(X4, CONTEXT_PLAN, WITH_CONTEXT, context=C7[:, :6]),
        ),
        (
            ValueError,
            r"context must have shape \(3, 7\) .*got \(2, 7\)",
            lambda run: run(X4, CONTEXT_PLAN, WITH_CONTEXT, context=C7[:2]),
        ),
        (
            ValueError,
            r"context must have shape \(3, 7\) .*got \(7,\)",
            lambda run: run(X4, CONTEXT_PLAN, WITH_CONTEXT, context=C7[0]),
        ),
        (
            ValueError,
            r"context was given, but this plan has no context layers",
            lambda run: run(X, PLAN, PARAMETERS, context=C7),
        ),
        (
            TypeError,
            r"context has dtype torch\.float64, but NAME has torch\.float32",
            lambda run: run(X4, CONTEXT_PLAN, WITH_CONTEXT, context=C7.double()),
        ),
        (
            TypeError,
            r"context must be a torch\.Tensor, got float",
            lambda run: run(X4, CONTEXT_PLAN, WITH_CONTEXT, context=1.0),
        ),
        (
            ValueError,
            r"context is on meta, but NAME is on cpu",
            lambda run: run(X4, CONTEXT_PLAN, WITH_CONTEXT, context=C7.to("meta")),
        ),
        (
            ValueError,
            r"law must be one of exp, .*got 'exponential'",
            lambda run: run(X, PLAN, PARAMETERS, law="exponential"),
        ),
        (TypeError, r"law must be a name or a ScaleLaw, got int", lambda run: run(X, PLAN, PARAMETERS, law=3)),
        (
            ValueError,
            r"form must be one of scale_shift, .*got 'shift'",
            lambda run: run(X, PLAN, PARAMETERS, form="shift"),
        ),
        (
            ValueError,
            r"form 'gate' needs law 'sigmoid', got 'exp'",
            lambda run: run(X, PLAN, PARAMETERS, law="exp", form="gate"),
        ),
        (
            ValueError,
            r"plan must have the parameters shift and scale .*got \('a', 'b'\)",
            lambda run: run(X, Plan(PLAN.masks, parameters=("a", "b")), PARAMETERS),
        ),
    ],
)
def test_bad_input(error: type[Exception], message: str, call: Any, run: Any, backend: str) -> None:
    with pytest.raises(error, match=message.replace("NAME", "x" if run is maf_forward else "z")):
        call(run)
