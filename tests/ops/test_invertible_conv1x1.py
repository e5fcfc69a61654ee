"""invertible_conv1x1: by its LU factors, both directions, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowkernels import testing
from flowkernels.ops import invertible_conv1x1
from flowkernels.ops.invertible_conv1x1.autograd import backward_op, forward_op

every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# channels, positions
SIZES = {"scalar": (1, 1), "one_channel": (1, 7), "vector": (5, 1), "image": (8, 16), "odd": (7, 5), "wide": (37, 3)}


def fixed(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Signs in turn, and a permutation that is not its own inverse."""
    every = torch.arange(channels)
    return (1 - 2 * (every % 2)).to(dtype), every.roll(1)


def inputs(
    events: tuple[int, ...],
    channels: int,
    positions: int,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
) -> list[Tensor]:
    """x, lower, upper, log_diagonal and a running log-det; what must not be read is large."""
    running = torch.float64 if dtype == torch.float64 else torch.float32
    factors = [testing.random_tensor((channels, channels), dtype, seed=i, spread=0.5 / channels**0.5) for i in (1, 2)]
    factors[0][torch.ones(channels, channels, dtype=torch.bool).triu()] = 1e4
    factors[1][torch.ones(channels, channels, dtype=torch.bool).tril()] = -1e4
    return [
        testing.random_tensor((*events, channels * positions), dtype, layout=layout),
        *(f if layout == "contiguous" else testing.with_layout(f, "transposed") for f in factors),
        testing.random_tensor((channels,), dtype, seed=3, spread=0.3),
        testing.random_tensor(events, running, seed=4),
    ]


def bound(inverse: bool = False) -> testing.Call:
    def call(x: Tensor, lower: Tensor, upper: Tensor, diagonal: Tensor, logdet: Tensor | None = None) -> Any:
        sign, permutation = fixed(diagonal.shape[-1], diagonal.dtype)
        return invertible_conv1x1(x, lower, upper, diagonal, sign, permutation, inverse=inverse, logdet=logdet)

    return call


# ---- values and gradients ----------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_values_and_gradients(size: tuple[int, int], dtype: torch.dtype) -> None:
    for events, inverse in (((40,), False), ((40,), True), ((0,), True), ((), False), ((2, 3), True)):
        testing.check_against_reference(bound(inverse), inputs(events, *size, dtype))


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("channels", [3, 4, 12, 16, 17, 64, 70])
def test_values_of_several_tiles(channels: int, positions: int) -> None:
    for dtype in (torch.float64, torch.float32):
        for inverse in (False, True):
            testing.check_against_reference(bound(inverse), inputs((141,), channels, positions, dtype))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout: str) -> None:
    for dtype in (torch.float64, torch.float32):
        testing.check_against_reference(bound(), inputs((9,), 5, 3, dtype, layout))
        testing.check_against_reference(bound(inverse=True), inputs((9,), 5, 1, dtype, layout)[:4])


def test_it_is_the_convolution_with_the_matrix_of_its_factors(backend: str) -> None:
    x, lower, upper, diagonal, running = inputs((4,), 6, 10)
    sign, permutation = fixed(6)
    y, logdet = bound()(x, lower, upper, diagonal, running)
    left, right = lower.tril(-1) + torch.eye(6), upper.triu(1) + torch.diag(sign * diagonal.exp())
    rows = torch.zeros(6, 6, dtype=torch.float64)
    rows[torch.arange(6), permutation] = 1.0  # P: row i of P M is row permutation[i] of M
    weight = rows @ left @ right
    expected = torch.nn.functional.conv2d(x.reshape(4, 6, 2, 5), weight[:, :, None, None])
    torch.testing.assert_close(y, expected.reshape(4, 60), rtol=1e-12, atol=1e-12)
    own = 10 * torch.linalg.slogdet(weight)[1]
    torch.testing.assert_close(logdet, running + own, rtol=1e-12, atol=1e-12)
    back, minus = bound(inverse=True)(y, lower, upper, diagonal, logdet)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(minus, running, rtol=1e-12, atol=1e-12)


def test_only_the_gradients_that_are_needed(backend: str) -> None:
    for inverse in (False, True):
        for wanted in range(1, 32):
            leaves = [t.requires_grad_(bool(wanted & 1 << i)) for i, t in enumerate(inputs((6,), 3, 2))]
            y, logdet = bound(inverse)(*leaves)
            (y.square().sum() + logdet.square().sum()).backward()
            whole = [t.detach().clone().requires_grad_() for t in leaves]
            y, logdet = bound(inverse)(*whole)
            (y.square().sum() + logdet.square().sum()).backward()
            for leaf, full in zip(leaves, whole, strict=True):
                assert (leaf.grad is not None) == leaf.requires_grad
                if leaf.requires_grad:
                    testing.assert_same_bits(leaf.grad, full.grad)


# ---- derivatives and laws ----------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(inverse: bool, backend: str) -> None:
    given = inputs((2,), 3, 2)
    for factor in given[1:3]:
        factor[factor.abs() > 100] = 0.0  # so that finite differences see their zeros
    testing.check_gradients(bound(inverse), given, second=True)


@pytest.mark.parametrize("size", [(4, 3), (5, 1)])
def test_laws_of_a_flow(size: tuple[int, int], backend: str) -> None:
    x, *factors, _ = inputs((2, 2), *size)
    testing.check_flow_laws(lambda t: bound()(t, *factors), lambda t: bound(inverse=True)(t, *factors), x)


# ---- the ways PyTorch calls --------------------------------------------------------------------


def test_opcheck() -> None:
    x, lower, upper, diagonal, running = inputs((3,), 2, 3)
    weight = [lower, upper, diagonal, *fixed(2)]
    for logdet, inverse in ((running, False), (None, True)):
        testing.check_opcheck(forward_op, [x, *weight, logdet, inverse])
        testing.check_opcheck(backward_op, [x, running, x, *weight, inverse])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(compiler: str, backend: str) -> None:
    x, lower, upper, diagonal, running = inputs((6,), 3, 4, torch.float32)
    sign, permutation = fixed(3, torch.float32)
    for inverse in (False, True):

        def call(*given: Tensor, inverse: bool = inverse) -> Any:
            return invertible_conv1x1(*given[:4], sign, permutation, logdet=given[4], inverse=inverse)

        testing.check_compile(call, [x, lower, upper, diagonal, running], backend=compiler, terms=24)


def test_vmap(backend: str) -> None:
    x, lower, upper, diagonal, running = inputs((3, 4), 2, 3)
    testing.check_vmap(bound(), [x, lower, upper, diagonal, running], [0, None, None, None, 0], terms=12)
    diagonals = torch.stack([diagonal, diagonal + 0.1, diagonal - 0.1])
    testing.check_vmap(bound(inverse=True), [x, lower, upper, diagonals, None], [0, None, None, 0, None], terms=12)


def test_autocast(backend: str) -> None:
    given = inputs((4,), 3, 2, torch.float32)[:4]
    with torch.autocast("cpu", torch.bfloat16):
        y, logdet = bound()(given[0].bfloat16(), *given[1:])
    assert y.dtype == logdet.dtype == torch.float32
    testing.assert_same_bits((y, logdet), bound()(given[0].bfloat16().float(), *given[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_determinism_and_threads(dtype: torch.dtype, backend: str) -> None:
    for inverse in (False, True):
        given = inputs((2003,), 3, 11, dtype)  # more than one block of positions, and no multiple of one
        testing.check_deterministic(bound(inverse), given)
        if backend == "cpu":
            testing.check_threads(bound(inverse), given)


def test_many_positions() -> None:
    for inverse in (False, True):
        testing.check_against_reference(bound(inverse), inputs((3001,), 5, 7, torch.float32))


# ---- properties --------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], bool]:
    channels, positions = draw(st.integers(1, 40)), draw(st.integers(1, 70))
    events = tuple(draw(st.lists(st.integers(0, 9), max_size=2)))
    given = inputs(events, channels, positions, draw(st.sampled_from(testing.DTYPES)))
    given[0] = testing.with_layout(given[0], draw(st.sampled_from(testing.LAYOUTS)))
    return given, draw(st.booleans())


@given(calls())
def test_any_call_is_as_close_as_plain_pytorch(call: tuple[list[Tensor], bool]) -> None:
    given_inputs, inverse = call
    testing.check_against_reference(bound(inverse), given_inputs)


# ---- bad input ---------------------------------------------------------------------------------

X, W, D = torch.zeros(3, 4), torch.zeros(2, 2), torch.zeros(2)
ORDER = torch.tensor([1, 0])
call = invertible_conv1x1


@pytest.mark.parametrize(
    ("error", "message", "run"),
    [
        (TypeError, r"x must be a torch\.Tensor, got list", lambda: call([1.0], W, W, D, D, ORDER)),
        (TypeError, r"x must be float64, .*got torch\.int64", lambda: call(X.long(), W, W, D, D, ORDER)),
        (TypeError, r"upper has dtype torch\.float64, but x has torch\.float32",
         lambda: call(X, W, W.double(), D, D, ORDER)),
        (TypeError, r"sign must be a torch\.Tensor, got int", lambda: call(X, W, W, D, 1, ORDER)),
        (ValueError, r"lower must have shape \(channels, channels\), got \(2,\)",
         lambda: call(X, D, W, D, D, ORDER)),
        (ValueError, r"lower must have shape \(2, 2\).*got \(2, 3\)",
         lambda: call(X, torch.zeros(2, 3), W, D, D, ORDER)),
        (ValueError, r"upper must have shape \(2, 2\).*got \(2,\)", lambda: call(X, W, D, D, D, ORDER)),
        (ValueError, r"log_diagonal must have shape \(2,\).*got \(3,\)", lambda: call(X, W, W, X[:, 0], D, ORDER)),
        (ValueError, r"log_diagonal is on meta, but x is on cpu", lambda: call(X, W, W, D.to("meta"), D, ORDER)),
        (TypeError, r"permutation must be an int64 tensor, got torch\.float32", lambda: call(X, W, W, D, D, D)),
        (TypeError, r"permutation must be an int64 tensor, got list", lambda: call(X, W, W, D, D, [1, 0])),
        (ValueError, r"permutation must have shape \(2,\).*got \(1,\)",
         lambda: call(X, W, W, D, D, ORDER[:1])),
        (ValueError, r"x must have a multiple of 2 features.*\(3, 3\)",
         lambda: call(X[:, :3], W, W, D, D, ORDER)),
        (ValueError, r"x must have a multiple of 2 features.*\(\)", lambda: call(X[0, 0], W, W, D, D, ORDER)),
        (ValueError, r"logdet must have shape \(3,\) .*got \(4,\)",
         lambda: call(X, W, W, D, D, ORDER, logdet=X[0])),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, run: Any, backend: str) -> None:
    with pytest.raises(error, match=message):
        run()
