"""affine_coupling: every law, form and direction, with and without masks, on every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowkernels as fk
from flowkernels import testing
from flowkernels.nn.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask
from flowkernels.ops import affine_coupling
from flowkernels.ops.affine_coupling.autograd import backward_op, forward_op
from flowkernels.scales import NAMES, ScaleLaw

LAWS = [
    *NAMES,
    ScaleLaw("softplus", floor=0.0),
    ScaleLaw("sigmoid", floor=0.0),
    ScaleLaw("clip", pass_gradient=0.0),
]
TRANSFORMS: list[dict[str, Any]] = [
    {"law": law, "form": form, "inverse": inverse}
    for law, form, inverse in itertools.product(LAWS, ("scale_shift", "shift_scale", "gate"), (False, True))
    if form != "gate" or "sigmoid" in str(law)
]


def name_of(transform: dict[str, Any]) -> str:
    return f"{transform['law']}-{transform['form']}-{'inverse' if transform['inverse'] else 'forward'}"


every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))

FEATURES = 37
MASKS: dict[str, Any] = {
    "half": half_mask(FEATURES),
    "first_half": half_mask(FEATURES, first=True),
    "aligned_tail": torch.arange(FEATURES) >= 16,
    "alternating": alternating_mask(FEATURES, 1),
    "random": torch.rand(FEATURES, generator=torch.Generator().manual_seed(3)) < 0.4,
    "all_but_one": torch.arange(FEATURES) != 20,
    "indices": torch.tensor([5, 3, 36, 0, 17]),
    "int32_indices": torch.tensor([4, 5, 6], dtype=torch.int32),
    "list": [1, 2, 9],
    "list_of_bool": [i % 3 == 0 for i in range(FEATURES)],
    "one": [4],
}


def selected(mask: Any) -> list[int]:
    """The transformed features, in the order of compact parameters."""
    mask = torch.as_tensor(mask)
    return (mask.nonzero()[:, 0] if mask.dtype == torch.bool else mask).tolist()


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    width: int | None = None,
) -> list[Tensor]:
    """x, shift, scale and a running log-det."""
    parameters = (*shape[:-1], shape[-1] if width is None else width)
    running = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        testing.random_tensor(shape, dtype, layout=layout, spread=2.0),
        testing.random_tensor(parameters, dtype, layout=layout, seed=1),
        testing.random_tensor(parameters, dtype, layout=layout, seed=2, spread=1.5),
        testing.random_tensor(shape[:-1], running, layout=layout, seed=3),
    ]


def bound(**options: Any) -> testing.Call:
    def call(x: Tensor, shift: Tensor, scale: Tensor, logdet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return affine_coupling(x, shift, scale, logdet=logdet, **options)

    return call


# ---- values and gradients ----------------------------------------------------------------------


@every_dtype
@every_transform
def test_values_and_gradients(transform: dict[str, Any], dtype: torch.dtype) -> None:
    testing.check_against_reference(bound(**transform), inputs((33, 21), dtype))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", testing.SHAPES.values(), ids=testing.SHAPES)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str) -> None:
    for dtype in testing.DTYPES:
        testing.check_against_reference(bound(), inputs(shape, dtype, layout))
        testing.check_against_reference(bound(law="softplus", inverse=True), inputs(shape, dtype, layout)[:3])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("full", [True, False], ids=["full", "compact"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks(mask: Any, full: bool, layout: str) -> None:
    width = FEATURES if full else len(selected(mask))
    for dtype in testing.DTYPES:
        given = inputs((9, FEATURES), dtype, layout, width)
        testing.check_against_reference(bound(mask=mask), given)
        testing.check_against_reference(bound(mask=mask, law="sigmoid", form="gate", inverse=True), given[:3])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_is_the_unmasked_transform_of_the_selected(mask: Any, backend: str) -> None:
    x, shift, scale, running = inputs((5, FEATURES))
    features = selected(mask)
    y, logdet = affine_coupling(x, shift, scale, mask=mask, logdet=running)
    part, part_logdet = affine_coupling(x[:, features], shift[:, features], scale[:, features], logdet=running)
    expected = x.clone()
    expected[:, features] = part
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(logdet, part_logdet, rtol=1e-13, atol=1e-13)
    kept = [i for i in range(FEATURES) if i not in features]
    assert torch.equal(y[:, kept], x[:, kept])
    compact = affine_coupling(x, shift[:, features], scale[:, features], mask=mask, logdet=running)
    testing.assert_same_bits(compact, (y, logdet))


def test_kept_features_are_copied_bit_by_bit_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = bits[~bits.isnan()].reshape(-1, 2)
        y, _ = affine_coupling(x, x, x, mask=[1])
        assert torch.equal(y[:, 0], x[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_rounded_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].reshape(-1, 2)
    zero = torch.zeros_like(every)
    testing.assert_same_bits(affine_coupling(every, zero, zero, law="unit")[0], every + 0)
    # y = x * 1 + t in float32, rounded once.
    for seed in range(3):
        x = testing.random_tensor((1000, 33), dtype, seed=seed, spread=10.0 ** (3 * seed - 4))
        t = testing.random_tensor((1000, 33), dtype, seed=50 + seed, spread=10.0 ** (2 * seed - 4))
        y, _ = affine_coupling(x, t, torch.zeros_like(t), law="unit")
        assert torch.equal(y, (x.float() + t.float()).to(dtype))


def test_parameters_broadcast(backend: str) -> None:
    x, shift, scale, _ = inputs((4, 3, 5))
    whole = affine_coupling(x, shift[0, 0].expand(4, 3, 5), scale[:, :1].expand(4, 3, 5))
    testing.assert_same_bits(affine_coupling(x, shift[0, 0], scale[:, :1]), whole)
    scalar = torch.tensor(0.5, dtype=torch.float64)
    testing.assert_same_bits(affine_coupling(x, scalar, scalar), affine_coupling(x, scalar.expand(5), scalar.expand(5)))
    testing.assert_same_bits(
        affine_coupling(x, scalar, scalar, mask=[0, 2]),
        affine_coupling(x, scalar.expand(2), scalar.expand(2), mask=[0, 2]),
    )
    with fk.use_backend("auto"):
        testing.check_gradients(bound(), [x, shift[0, 0], scale[:, :1]])


def test_only_the_gradients_that_are_needed() -> None:
    for mask in (None, half_mask(5)):
        for wanted in itertools.product([False, True], repeat=3):
            if not any(wanted):
                continue
            leaves = [t.requires_grad_(w) for t, w in zip(inputs((6, 5))[:3], wanted, strict=True)]
            y, logdet = affine_coupling(*leaves, mask=mask)
            (y.square().sum() + logdet.sum()).backward()
            copies = [t.detach().clone().requires_grad_() for t in leaves]
            y, logdet = affine_coupling(*copies, mask=mask)
            (y.square().sum() + logdet.sum()).backward()
            for leaf, copy, w in zip(leaves, copies, wanted, strict=True):
                assert (leaf.grad is not None) == w
                if w:
                    testing.assert_same_bits(leaf.grad, copy.grad)


@pytest.mark.parametrize("form", ["scale_shift", "shift_scale"])
def test_gradients_that_are_equal_are_still_of_their_own(form: str) -> None:
    """The shift's gradient is handed on as y's or x's own; what somebody does to one must not reach the other."""
    leaves = [t.requires_grad_() for t in inputs((6, 5))[:3]]
    cotangent = testing.random_tensor((6, 5), torch.float64, seed=9)
    kept = cotangent.clone()
    y, _ = affine_coupling(*leaves, form=form)
    y.backward(cotangent)
    x, shift, _ = leaves
    before = shift.grad.clone()
    x.grad.zero_()
    torch.testing.assert_close(shift.grad, before)
    shift.grad.zero_()
    assert torch.equal(cotangent, kept)


# ---- derivatives and laws ----------------------------------------------------------------------


@every_transform
def test_gradcheck(transform: dict[str, Any], backend: str) -> None:
    given = inputs((2, 3))
    given[2] = given[2] / 2  # inside the clip law's bounds: outside, the gradient passed through is not the derivative
    testing.check_gradients(bound(**transform), given, second=True)


@pytest.mark.parametrize("name", ["half", "random", "indices"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "compact"])
def test_gradcheck_with_masks(name: str, full: bool, backend: str) -> None:
    mask = {"half": half_mask(5), "random": torch.tensor([1, 0, 0, 1, 1]).bool(), "indices": [4, 0]}[name]
    width = 5 if full else len(selected(mask))
    given = inputs((2, 5), width=width)
    testing.check_gradients(bound(mask=mask, law="sigmoid", form="gate"), given, second=True)
    testing.check_gradients(bound(mask=mask, inverse=True), given, second=True)


def test_second_derivative_of_some_inputs_only() -> None:
    x, shift, scale, _ = inputs((2, 3))
    testing.check_gradients(lambda t: affine_coupling(x, t, scale), [shift], second=True)
    testing.check_gradients(lambda u: affine_coupling(x, shift, u), [scale], second=True)


@every_transform
def test_laws_of_a_flow(transform: dict[str, Any], backend: str) -> None:
    for mask in (None, alternating_mask(7)):
        x, shift, scale, _ = inputs((4, 7))

        def run(t: Tensor, inverse: bool, mask: Tensor | None = mask, p: Any = (shift, scale)) -> Any:
            return affine_coupling(t, *p, **{**transform, "inverse": inverse}, mask=mask)

        testing.check_flow_laws(lambda t: run(t, transform["inverse"]), lambda t: run(t, not transform["inverse"]), x)


def test_running_logdet_is_added(backend: str) -> None:
    x, shift, scale, running = inputs((2, 4, 3))
    _, own = affine_coupling(x, shift, scale)
    _, both = affine_coupling(x, shift, scale, logdet=running)
    torch.testing.assert_close(both, own + running, rtol=1e-14, atol=1e-14)
    x16 = x.half()
    _, half = affine_coupling(x16, x16, x16, logdet=running.half())
    assert half.dtype == torch.float32


@every_dtype
def test_dtypes_of_the_outputs(dtype: torch.dtype, backend: str) -> None:
    y, logdet = affine_coupling(*inputs((3, 4), dtype)[:3])
    assert y.dtype == dtype
    assert logdet.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# ---- the ways PyTorch calls --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, shift, scale, running = inputs((3, 5), dtype)
    for positions, width in ((None, 5), (torch.tensor([-1, 0, -1, 1, -1]), 2)):
        p = [
            shift[:, :width],
            scale[:, :width],
        ]
        options = [positions, 0, [1.0, 0.0, 0.0], 0, False]
        testing.check_opcheck(forward_op, [x, *p, running, *options])
        testing.check_opcheck(forward_op, [x, *p, None, *options])
        testing.check_opcheck(backward_op, [x, running, x, *p, *options, 7])
        testing.check_opcheck(backward_op, [x, running, x, *p, *options, 2])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(compiler: str, backend: str) -> None:
    given = inputs((6, 5), torch.float32)
    testing.check_compile(bound(), given, backend=compiler)
    testing.check_compile(bound(law="softplus", inverse=True), given[:3], gradients=False, backend=compiler)
    mask = half_mask(5)
    testing.check_compile(bound(mask=mask), given, backend=compiler)
    testing.check_compile(
        bound(mask=[3, 1]), [t[..., :2] if i in (1, 2) else t for i, t in enumerate(given)], backend=compiler
    )
    testing.check_compile(lambda x, t, u, m: affine_coupling(x, t, u, mask=m), [*given[:3], mask], backend=compiler)


def test_compile_with_dynamic_shapes() -> None:
    testing.check_compile(bound(), inputs((6, 5), torch.float32), backend="aot_eager", dynamic=True)


def test_vmap(backend: str) -> None:
    x, shift, scale, running = inputs((3, 2, 5))
    testing.check_vmap(bound(), [x, shift, scale, running], [0, 0, 0, 0])
    testing.check_vmap(bound(inverse=True), [x, shift[0], scale, None], [0, None, 0, None])
    testing.check_vmap(bound(mask=half_mask(5)), [x, shift, scale, running], [0, 0, 0, 0])
    testing.check_vmap(bound(mask=[0, 3]), [x, shift[..., :2], scale[..., :2], None], [0, 0, 0, None])
    # Single events: no rows are left under vmap.
    testing.check_vmap(bound(), [x[0], shift[0], scale[0], None], [0, 0, 0, None])


def test_autocast(backend: str) -> None:
    x, shift, scale, _ = inputs((4, 6), torch.float32)
    exact = affine_coupling(x.bfloat16().double(), shift.bfloat16().double(), scale.bfloat16().double())
    with torch.autocast("cpu", torch.bfloat16):
        results = [
            affine_coupling(x.bfloat16(), shift.bfloat16(), scale.bfloat16()),
            affine_coupling(x.bfloat16().float(), shift.bfloat16(), scale.bfloat16().float()),
            affine_coupling(x.bfloat16().float(), shift.bfloat16(), scale.bfloat16()),
        ]
        double = affine_coupling(x.double(), shift.double(), scale.double())
        with pytest.raises(TypeError, match="shift has dtype"):
            affine_coupling(x.double(), shift, scale.double())
    for y, logdet in results:
        assert y.dtype == logdet.dtype == torch.float32
        torch.testing.assert_close(y.double(), exact[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logdet.double(), exact[1], rtol=1e-5, atol=1e-5)
    assert double[0].dtype == torch.float64


def test_autocast_gradients_keep_their_dtypes() -> None:
    x, shift, scale, _ = inputs((4, 6), torch.float32)
    leaves = [x.requires_grad_(), shift.bfloat16().requires_grad_(), scale.bfloat16().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        y, logdet = affine_coupling(*leaves)
        loss = y.square().sum() + logdet.sum()
    loss.backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32, torch.bfloat16, torch.bfloat16]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, logdet = affine_coupling(*exact)
    (y.square().sum() + logdet.sum()).backward()
    for t, e in zip(leaves, exact, strict=True):
        torch.testing.assert_close(t.grad.double(), e.grad, rtol=8e-3, atol=1e-4)


@every_dtype
def test_determinism_and_threads(dtype: torch.dtype, backend: str) -> None:
    given = inputs((700, 33), dtype)  # enough rows for more than one thread
    testing.check_deterministic(bound(), given)
    if backend == "cpu":
        testing.check_threads(bound(mask=half_mask(33)), given)


def test_a_row_does_not_depend_on_its_batch() -> None:
    given = inputs((300, 100), torch.float32)
    whole = affine_coupling(*given[:3])
    for i in (0, 1, 299):
        testing.assert_same_bits(affine_coupling(*(t[i : i + 1] for t in given[:3])), [t[i : i + 1] for t in whole])


def test_inputs_are_not_written_to(backend: str) -> None:
    given = [t.requires_grad_() for t in inputs((5, 6))]
    before = [t.detach().clone() for t in given]
    y, logdet = bound(mask=half_mask(6))(*given)
    cotangents = torch.ones_like(y), torch.ones_like(logdet)
    torch.autograd.backward([y, logdet], cotangents)
    testing.assert_same_bits([t.detach() for t in given], before)
    assert all((c == 1).all() for c in cotangents)


# ---- extremes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_transform
def test_extremes_match_the_reference(transform: dict[str, Any], dtype: torch.dtype) -> None:
    values = torch.tensor(testing.EXTREMES, dtype=dtype)
    x, shift, scale = (t.reshape(-1, 1) for t in torch.meshgrid(values, values, values, indexing="ij"))
    y, logdet = affine_coupling(x, shift, scale, **transform)
    with fk.use_backend("reference"):
        plain = affine_coupling(x, shift, scale, **transform)
        exact = affine_coupling(x.double(), shift.double(), scale.double(), **transform)
    # The kernels' exp has no subnormal results: there, infinity times sigma may be NaN instead of infinity.
    sigma = ScaleLaw(transform["law"])(scale)[0] if isinstance(transform["law"], str) else transform["law"](scale)[0]
    flushed = ((sigma > 0) & (sigma < torch.finfo(dtype).tiny)).squeeze(-1)
    for got, p, e in zip((y.squeeze(-1), logdet), plain, exact, strict=True):
        p, e = p.reshape(got.shape), e.reshape(got.shape)
        assert not (got.isnan() & ~e.isnan() & ~p.isnan() & ~flushed).any()
    assert not logdet[scale.squeeze(-1).isfinite()].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["scale_shift", "shift_scale"])
def test_large_log_sigma_gives_infinity_or_zero_never_nan(form: str, dtype: torch.dtype, backend: str) -> None:
    for u in (50.0, -50.0, 100.0, -100.0, 1000.0, -1000.0):
        for inverse in (False, True):
            x = torch.tensor([[3.0]], dtype=dtype)
            y, logdet = affine_coupling(x, torch.zeros_like(x), torch.full_like(x, u), form=form, inverse=inverse)
            grown = u * (-1 if inverse else 1)
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            assert float(logdet) == grown
            assert not y.isnan().any()
            if grown > math.log(torch.finfo(compute).max):
                assert float(y) == math.inf
            elif grown < math.log(torch.finfo(compute).tiny) - 40:
                assert float(y) == 0.0
            else:
                assert 0 < float(y) < math.inf or abs(grown) == 100


def test_nan_flows_through_and_stays_in_its_row(backend: str) -> None:
    for transform in TRANSFORMS:
        for i in range(3):
            given = inputs((4, 6))[:3]
            given[i][2, 3] = math.nan
            y, logdet = affine_coupling(*given, **transform)
            unused = transform["law"] == "unit" and i == 2
            expected = torch.zeros(4, 6, dtype=torch.bool)
            expected[2, 3] = not unused
            assert torch.equal(y.isnan(), expected)
            assert torch.equal(logdet.isnan(), expected.any(-1) & (i == 2))


def test_infinities_of_kept_features_go_nowhere(backend: str) -> None:
    x, shift, scale, _ = inputs((3, 4))
    clean = [t.clone().requires_grad_() for t in (x, shift, scale)]
    dirty = [t.clone() for t in (x, shift, scale)]
    for t, value in zip(dirty, (math.inf, math.nan, 1e9), strict=True):
        t[:, 1] = value
        t.requires_grad_()
    mask = torch.tensor([True, False, True, True])
    for leaves in (clean, dirty):
        y, logdet = affine_coupling(*leaves, mask=mask)
        (y[:, mask].sum() + logdet.sum()).backward()
    for a, b in zip(clean, dirty, strict=True):
        testing.assert_same_bits(a.grad, b.grad)
    assert y[0, 1] == math.inf


# ---- properties --------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    features = draw(st.integers(1, 70))
    shape = (*draw(st.lists(st.integers(0, 6), max_size=2)), features)
    mask = None
    width = features
    if features > 1 and draw(st.booleans()):
        mask = draw(st.lists(st.booleans(), min_size=features, max_size=features).filter(lambda m: 0 < sum(m) < len(m)))
        if draw(st.booleans()):
            mask = draw(st.permutations([i for i, m in enumerate(mask) if m]))
        if draw(st.booleans()):
            width = len(selected(mask))
    dtype = draw(st.sampled_from(testing.DTYPES))
    given = [
        testing.random_tensor(size, dtype, layout=draw(st.sampled_from(testing.LAYOUTS)), seed=draw(st.integers(0, 99)))
        for size in (shape, (*shape[:-1], width), (*shape[:-1], width))
    ]
    return given, {**draw(st.sampled_from(TRANSFORMS)), "mask": mask}


@given(calls())
def test_any_call_is_as_close_as_plain_pytorch(call: tuple[list[Tensor], dict[str, Any]]) -> None:
    given_inputs, options = call
    testing.check_against_reference(bound(**options), given_inputs)


@given(calls())
def test_any_call_is_undone_by_its_inverse(call: tuple[list[Tensor], dict[str, Any]]) -> None:
    (x, shift, scale), options = call
    x, shift, scale = x.double(), shift.double(), scale.double()

    def run(t: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return affine_coupling(t, shift, scale, **{**options, "inverse": inverse})

    testing.check_inverse(lambda t: run(t, False), lambda t: run(t, True), x)
    testing.check_logdets_cancel(lambda t: run(t, False), lambda t: run(t, True), x)
    if x.numel() <= 200:
        testing.check_logdet(lambda t: run(t, options["inverse"]), x)


# ---- masks of images ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [checkerboard_mask(4, 5), checkerboard_mask(4, 4, 1, channels=3), channel_mask(4, 3, 3, first=True)],
)
def test_image_masks(mask: Tensor) -> None:
    for width in (mask.numel(), int(mask.sum())):
        testing.check_against_reference(bound(mask=mask), inputs((3, mask.numel()), torch.float32, width=width))


def test_a_mask_changed_in_place_is_looked_at_again() -> None:
    x, shift, scale, _ = inputs((2, 4))
    mask = torch.tensor([True, False, False, True])
    affine_coupling(x, shift, scale, mask=mask)
    mask[3] = False
    y, _ = affine_coupling(x, shift, scale, mask=mask)
    assert torch.equal(y[:, 1:], x[:, 1:])
    mask[0] = False
    with pytest.raises(ValueError, match="selects none"):
        affine_coupling(x, shift, scale, mask=mask)


# ---- bad input ---------------------------------------------------------------------------------

X = torch.zeros(3, 4)
call = affine_coupling


@pytest.mark.parametrize(
    ("error", "message", "run"),
    [
        (TypeError, r"x must be a torch\.Tensor, got list", lambda: call([1.0], X, X)),
        (TypeError, r"x must be float64, .*got torch\.int64", lambda: call(X.long(), X, X)),
        (TypeError, r"shift must be float64, .*got torch\.int32", lambda: call(X, X.int(), X)),
        (TypeError, r"scale must be a torch\.Tensor, got float", lambda: call(X, X, 0.5)),
        (TypeError, r"scale has dtype torch\.float64, but x has torch\.float32",
         lambda: call(X, X, X.double())),
        (ValueError, r"x must have at least one feature, .*got shape \(\)", lambda: call(X[0, 0], X, X)),
        (ValueError, r"x must have at least one feature, .*got shape \(3, 0\)", lambda: call(X[:, :0], X, X)),
        (ValueError, r"shift must broadcast to x's shape \(3, 4\), got \(3, 5\)",
         lambda: call(X, torch.zeros(3, 5), X)),
        (ValueError, r"scale must broadcast to x's shape \(3, 4\), got \(2, 3, 4\)",
         lambda: call(X, X, torch.zeros(2, 3, 4))),
        (ValueError, r"scale is on meta, but x is on cpu", lambda: call(X, X, X.to("meta"))),
        (ValueError, r"logdet must have shape \(3,\) .*got \(4,\)", lambda: call(X, X, X, logdet=X[0])),
        (TypeError, r"logdet must be float64, .*got torch\.int64",
         lambda: call(X, X, X, logdet=X[:, 0].long())),
        (ValueError, r"logdet is on meta, but x is on cpu", lambda: call(X, X, X, logdet=X[:, 0].to("meta"))),
        (ValueError, r"law must be one of exp, .*got 'exponential'",
         lambda: call(X, X, X, law="exponential")),
        (TypeError, r"law must be a name or a ScaleLaw, got int", lambda: call(X, X, X, law=3)),
        (ValueError, r"form must be one of scale_shift, .*got 'shift'", lambda: call(X, X, X, form="shift")),
        (ValueError, r"form 'gate' needs law 'sigmoid', got 'exp'", lambda: call(X, X, X, form="gate")),
        (ValueError, r"mask selects none of the 4 features",
         lambda: call(X, X, X, mask=torch.zeros(4).bool())),
        (ValueError, r"mask selects none of the 4 features", lambda: call(X, X, X, mask=[])),
        (ValueError, r"mask selects none of the 4 features", lambda: call(X, X, X, mask=[False] * 4)),
        (ValueError, r"mask selects all of the 4 features", lambda: call(X, X, X, mask=torch.ones(4).bool())),
        (ValueError, r"mask selects all of the 4 features", lambda: call(X, X, X, mask=[0, 1, 2, 3])),
        (ValueError, r"one entry for each of x's 4 features, got 5", lambda: call(X, X, X, mask=[True] * 5)),
        (ValueError, r"one entry for each of x's 4 features, got 3",
         lambda: call(X, X, X, mask=torch.ones(3).bool())),
        (ValueError, r"mask must have one dimension, .*got shape \(3, 4\)",
         lambda: call(X, X, X, mask=X.bool())),
        (ValueError, r"mask has index 4, but x has features 0 to 3", lambda: call(X, X, X, mask=[1, 4])),
        (ValueError, r"mask has index -1, but", lambda: call(X, X, X, mask=torch.tensor([-1]))),
        (ValueError, r"mask has index 2 twice", lambda: call(X, X, X, mask=[2, 0, 2])),
        (TypeError, r"mask must be boolean, .*got torch\.float32", lambda: call(X, X, X, mask=X[0])),
        (TypeError, r"mask must hold booleans or indices only, got 1\.5", lambda: call(X, X, X, mask=[1.5])),
        (TypeError, r"mask must hold booleans or indices only, got True",
         lambda: call(X, X, X, mask=[True, 1])),
        (TypeError, r"mask must be a tensor or a list of booleans or indices, got int",
         lambda: call(X, X, X, mask=3)),
        (ValueError, r"mask is on meta, but x is on cpu",
         lambda: call(X, X, X, mask=half_mask(4).to("meta"))),
        (ValueError, r"shift has 3 columns; .*need 4 .* or 2 ",
         lambda: call(X, X[:, :3], X[:, :3], mask=[0, 1])),
        (ValueError, r"scale has 2 columns; .*both the same", lambda: call(X, X, X[:, :2], mask=[0, 1])),
        (ValueError, r"shift must broadcast .* with 2 columns, .*got \(2, 2\)",
         lambda: call(X, X[:2, :2], X[:, :2], mask=[0, 1])),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, run: Any, backend: str) -> None:
    with pytest.raises(error, match=message):
        run()
