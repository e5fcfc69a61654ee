"""actnorm: a shift and a scale per channel, both directions, with and without padding, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowkernels as fk
from flowkernels import testing
from flowkernels.ops import actnorm
from flowkernels.ops.actnorm.autograd import backward_op, forward_op

every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# channels, positions
SIZES = {
    "vector": (5, 1),
    "image": (3, 16),
    "one_channel": (1, 7),
    "wide": (33, 1),
    "odd": (7, 5),
    "single": (1, 1),
    "large_image": (3, 75),
}
# None, a mask of positions, a mask of rows
MASKS = ("none", "positions", "rows")


def inputs(
    events: tuple[int, ...],
    channels: int,
    positions: int,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
) -> list[Tensor]:
    """x, shift, log_scale and a running log-det."""
    running = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        testing.random_tensor((*events, channels * positions), dtype, layout=layout, spread=2.0),
        testing.random_tensor((channels,), dtype, layout="expanded_rows" if "expanded" in layout else layout, seed=1),
        testing.random_tensor((channels,), dtype, seed=2, spread=0.7),
        testing.random_tensor(events, running, seed=3),
    ]


def mask_of(kind: str, events: tuple[int, ...], positions: int) -> Tensor | None:
    shape = {"none": None, "positions": (*events, positions), "rows": events}[kind]
    return None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.6


def bound(**options: Any) -> testing.Call:
    def call(x: Tensor, shift: Tensor, log_scale: Tensor, logdet: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return actnorm(x, shift, log_scale, logdet=logdet, **options)

    return call


# ---- values and gradients ----------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_values_and_gradients(size: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    for events, inverse in (((70,), False), ((70,), True), ((0,), False), ((), True), ((2, 3), True)):
        mask = mask_of(kind, events, size[1])
        testing.check_against_reference(bound(inverse=inverse, mask=mask), inputs(events, *size, dtype))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout: str) -> None:
    for dtype in testing.DTYPES:
        testing.check_against_reference(bound(), inputs((9,), 5, 3, dtype, layout))
        given = inputs((9,), 5, 1, dtype, layout)[:3]
        testing.check_against_reference(bound(inverse=True, mask=mask_of("rows", (9,), 1)), given)


def test_it_is_the_affine_coupling_of_expanded_parameters(backend: str) -> None:
    x, shift, log_scale, running = inputs((6,), 3, 4)
    spread = [t.repeat_interleave(4).expand(6, 12) for t in (shift, log_scale)]
    for inverse in (False, True):
        expected = fk.ops.affine_coupling(x, *spread, form="shift_scale", inverse=inverse, logdet=running)
        got = actnorm(x, shift, log_scale, inverse=inverse, logdet=running)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_only_the_gradients_that_are_needed(backend: str) -> None:
    for wanted in range(1, 16):
        leaves = [t.requires_grad_(bool(wanted & 1 << i)) for i, t in enumerate(inputs((6,), 5, 2))]
        y, logdet = bound()(*leaves)
        (y.square().sum() + logdet.square().sum()).backward()
        whole = [t.detach().clone().requires_grad_() for t in leaves]
        y, logdet = bound()(*whole)
        (y.square().sum() + logdet.square().sum()).backward()
        for leaf, full in zip(leaves, whole, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.requires_grad:
                testing.assert_same_bits(leaf.grad, full.grad)


# ---- derivatives and laws ----------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_gradcheck(kind: str, inverse: bool, backend: str) -> None:
    call = bound(inverse=inverse, mask=mask_of(kind, (3,), 2))
    testing.check_gradients(call, inputs((3,), 2, 2), second=True)
    x, shift, log_scale, _ = inputs((3,), 2, 2)
    testing.check_gradients(lambda t: call(x, t, log_scale), [shift], second=True)


@pytest.mark.parametrize("kind", MASKS)
def test_laws_of_a_flow(kind: str, backend: str) -> None:
    x, shift, log_scale, _ = inputs((2, 2), 3, 2)
    mask = mask_of(kind, (2, 2), 2)

    def run(t: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return actnorm(t, shift, log_scale, mask=mask, inverse=inverse)

    testing.check_flow_laws(lambda t: run(t, False), lambda t: run(t, True), x)


def test_padding_goes_through_and_nowhere_else(backend: str) -> None:
    mask = mask_of("positions", (4,), 6)
    assert mask is not None
    padding = ~mask[:, None].expand(4, 3, 6).reshape(4, 18)
    for inverse in (False, True):
        results = []
        for value in (0.5, math.inf, math.nan):
            x, shift, log_scale, running = inputs((4,), 3, 6)
            x[padding] = value
            leaves = [t.requires_grad_() for t in (x, shift, log_scale, running)]
            y, logdet = bound(mask=mask, inverse=inverse)(*leaves)
            testing.assert_same_bits(y[padding], x[padding])
            (y[~padding].square().sum() + logdet.square().sum()).backward()
            results.append([logdet, *(t.grad for t in leaves)])
        for other in results[1:]:
            testing.assert_same_bits(results[0], other)
        assert (results[0][1][padding] == 0).all()


def test_extremes_and_nan(backend: str) -> None:
    for u in (50.0, -50.0, 1000.0, -1000.0):
        for inverse in (False, True):
            x, scale = torch.tensor([[3.0]]), torch.tensor([u])
            y, logdet = actnorm(x, torch.zeros(1), scale, inverse=inverse)
            grown = -u if inverse else u
            assert float(logdet) == grown
            assert float(y) == (math.inf if grown > 90 else 0.0 if grown < -110 else pytest.approx(3 * math.exp(grown)))
    x, shift, log_scale, _ = inputs((4,), 3, 2)
    x[1, 3] = math.nan
    y, logdet = actnorm(x, shift, log_scale)
    assert y.isnan().nonzero().tolist() == [[1, 3]]
    assert not logdet.isnan().any()


# ---- the ways PyTorch calls --------------------------------------------------------------------


def test_opcheck() -> None:
    x, shift, log_scale, running = inputs((3,), 2, 3)
    mask = mask_of("positions", (3,), 3)
    for m, logdet in ((None, running), (mask, None)):
        testing.check_opcheck(forward_op, [x, shift, log_scale, logdet, m, True])
        testing.check_opcheck(backward_op, [x, running, x, shift, log_scale, m, False, True])
        testing.check_opcheck(backward_op, [x, running, x, shift, log_scale, m, True, False])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(compiler: str, backend: str) -> None:
    given = inputs((6,), 2, 3, torch.float32)
    testing.check_compile(bound(), given, backend=compiler, terms=18)
    mask = mask_of("positions", (6,), 3)
    testing.check_compile(bound(inverse=True, mask=mask), given[:3], backend=compiler, terms=18)


def test_vmap(backend: str) -> None:
    x, shift, log_scale, running = inputs((3, 4), 2, 3)
    shifts = torch.stack([shift, shift + 1, shift - 1])
    testing.check_vmap(bound(), [x, shift, log_scale, running], [0, None, None, 0], terms=12)
    testing.check_vmap(bound(inverse=True), [x, shifts, log_scale, None], [0, 0, None, None], terms=12)
    testing.check_vmap(bound(mask=mask_of("rows", (), 3)), [x[0], shift, log_scale, None], [0, None, None, None])


def test_autocast(backend: str) -> None:
    x, shift, log_scale, _ = inputs((4,), 3, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, logdet = actnorm(x.bfloat16(), shift, log_scale)
    assert y.dtype == logdet.dtype == torch.float32
    expected = actnorm(x.bfloat16().float(), shift, log_scale)
    testing.assert_same_bits((y, logdet), expected)


@every_dtype
def test_determinism_and_threads(dtype: torch.dtype, backend: str) -> None:
    given = inputs((3001,), 3, 11, dtype)  # more than one block of rows, and no multiple of one
    testing.check_deterministic(bound(), given)
    if backend == "cpu":
        testing.check_threads(bound(mask=mask_of("positions", (3001,), 11)), given)


def test_many_rows() -> None:
    for dtype in (torch.float32, torch.float64):
        testing.check_against_reference(bound(mask=mask_of("rows", (9001,), 2)), inputs((9001,), 3, 2, dtype))


def test_inputs_are_not_written_to(backend: str) -> None:
    given = [t.requires_grad_() for t in inputs((5,), 3, 2)]
    before = [t.detach().clone() for t in given]
    y, logdet = bound()(*given)
    torch.autograd.backward([y, logdet], [torch.ones_like(y), torch.ones_like(logdet)])
    testing.assert_same_bits([t.detach() for t in given], before)


# ---- properties --------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    channels, positions = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    events = tuple(draw(st.lists(st.integers(0, 9), max_size=2)))
    given = inputs(events, channels, positions, draw(st.sampled_from(testing.DTYPES)))
    given[0] = testing.with_layout(given[0], draw(st.sampled_from(testing.LAYOUTS)))
    return given, {"inverse": draw(st.booleans()), "mask": mask_of(draw(st.sampled_from(MASKS)), events, positions)}


@given(calls())
def test_any_call_is_as_close_as_plain_pytorch(call: tuple[list[Tensor], dict[str, Any]]) -> None:
    given_inputs, options = call
    testing.check_against_reference(bound(**options), given_inputs)


# ---- bad input ---------------------------------------------------------------------------------

X, C = torch.zeros(3, 4), torch.zeros(2)


@pytest.mark.parametrize(
    ("error", "message", "run"),
    [
        (TypeError, r"x must be a torch\.Tensor, got list", lambda: actnorm([1.0], C, C)),
        (TypeError, r"x must be float64, .*got torch\.int64", lambda: actnorm(X.long(), C, C)),
        (TypeError, r"shift has dtype torch\.float64, but x has torch\.float32", lambda: actnorm(X, C.double(), C)),
        (TypeError, r"log_scale must be a torch\.Tensor, got float", lambda: actnorm(X, C, 0.5)),
        (ValueError, r"shift must have shape \(channels,\), got \(1, 2\)", lambda: actnorm(X, C[None], C)),
        (ValueError, r"shift must have shape \(channels,\), got \(0,\)", lambda: actnorm(X, C[:0], C)),
        (ValueError, r"log_scale must have shape \(2,\) .*got \(1,\)", lambda: actnorm(X, C, C[:1])),
        (ValueError, r"x must have a multiple of 3 features.*\(3, 4\)", lambda: actnorm(X, X[:, 0], X[:, 0])),
        (ValueError, r"x must have a multiple of 2 features.*\(3, 0\)", lambda: actnorm(X[:, :0], C, C)),
        (ValueError, r"x must have a multiple of 2 features.*\(\)", lambda: actnorm(X[0, 0], C, C)),
        (ValueError, r"log_scale is on meta, but x is on cpu", lambda: actnorm(X, C, C.to("meta"))),
        (ValueError, r"logdet must have shape \(3,\) .*got \(4,\)", lambda: actnorm(X, C, C, logdet=X[0])),
        (TypeError, r"logdet must be float64, .*got torch\.int64",
         lambda: actnorm(X, C, C, logdet=X[:, 0].long())),
        (TypeError, r"mask must be boolean, got torch\.float32", lambda: actnorm(X, C, C, mask=X[:, 0])),
        (TypeError, r"mask must be a torch\.Tensor, got list", lambda: actnorm(X, C, C, mask=[True] * 3)),
        (ValueError, r"mask must have shape \(3,\) or \(3, 2\), got \(3, 4\)",
         lambda: actnorm(X, C, C, mask=X.bool())),
        (ValueError, r"mask is on meta, but x is on cpu",
         lambda: actnorm(X, C, C, mask=X[:, 0].bool().to("meta"))),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, run: Any, backend: str) -> None:
    with pytest.raises(error, match=message):
        run()
