"""masked_linear against the product with an explicit mask."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flowkernels as fk
from flowkernels import testing
from flowkernels.ops import masked_linear
from flowkernels.ops.masked_linear.autograd import backward_op, forward_op
from flowkernels.plan import ACTIVATIONS

SMOOTH = ("identity", "tanh", "elu", "silu", "gelu", "sigmoid", "softplus")

every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# The weight is read as it lies, and packed.
few_and_many = pytest.mark.parametrize("rows", [7, 40])
needs_cpu = pytest.mark.skipif("cpu" not in fk.available_backends(), reason="needs the compiled library")


def degrees(seed: int, count: int, most: int = 9) -> Tensor:
    return torch.randint(0, most + 1, (count,), generator=torch.Generator().manual_seed(seed))


def inputs(
    shape: tuple[int, ...], out: int, dtype: torch.dtype = torch.float64, layout: str = "contiguous"
) -> list[Tensor]:
    """x, weight, bias."""
    return [
        testing.random_tensor(shape, dtype, layout=layout),
        testing.random_tensor((out, shape[-1]), dtype, layout=layout, seed=1, spread=shape[-1] ** -0.5),
        testing.random_tensor((out,), dtype, layout=layout, seed=2),
    ]


def bound(in_degrees: Tensor, out_degrees: Tensor, **options: Any) -> testing.Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return masked_linear(x, weight, bias, in_degrees=in_degrees, out_degrees=out_degrees, **options)

    return call


# ---- values and gradients ----------------------------------------------------------------------


def test_the_formula(backend: str) -> None:
    x, weight, bias = inputs((4, 5), 3)
    ins, outs = torch.tensor([3, 1, 2, 2, 0]), torch.tensor([2, 0, 7])
    for strict in (False, True):
        mask = torch.tensor([[(i < o) if strict else (i <= o) for i in ins.tolist()] for o in outs.tolist()])
        expected = x @ (weight * mask).T + bias
        torch.testing.assert_close(
            masked_linear(x, weight, bias, in_degrees=ins, out_degrees=outs, strict=strict), expected
        )
        torch.testing.assert_close(
            masked_linear(x, weight, in_degrees=ins, out_degrees=outs, strict=strict, activation="tanh"),
            (expected - bias).tanh(),
        )


@every_dtype
@few_and_many
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_values_and_gradients(activation: str | None, strict: bool, rows: int, dtype: torch.dtype) -> None:
    call = bound(degrees(1, 21), degrees(2, 37), strict=strict, activation=activation)
    testing.check_against_reference(call, inputs((rows, 21), 37, dtype))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", testing.SHAPES.values(), ids=testing.SHAPES)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str) -> None:
    call = bound(degrees(1, shape[-1]), degrees(2, 19))
    for dtype in (torch.float64, torch.float32):
        testing.check_against_reference(call, inputs(shape, 19, dtype, layout))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 100])
def test_batch_sizes_without_a_bias(rows: int) -> None:
    call = bound(degrees(3, 33), degrees(4, 50), strict=True)
    for dtype in (torch.float64, torch.float32):
        x, weight, _ = inputs((rows, 33), 50, dtype)
        testing.check_against_reference(call, [x, weight, None])


# Not expanded features: how a sum of 300 equal numbers rounds is a matter of the number of its parts.
@pytest.mark.parametrize("layout", [layout for layout in testing.LAYOUTS if layout != "expanded_features"])
@few_and_many
@pytest.mark.parametrize("order", ["natural", "cyclic", "random"])
def test_widths_of_several_blocks(order: str, rows: int, layout: str) -> None:
    ins = {"natural": torch.arange(300), "cyclic": torch.arange(300) % 43, "random": degrees(1, 300, 400)}[order]
    call = bound(ins, ins[torch.arange(0, 600, 3) % 300].flip(0)[:77] - 40)
    for dtype in testing.DTYPES:
        testing.check_against_reference(call, inputs((rows, 300), 77, dtype, layout))


@few_and_many
@pytest.mark.parametrize("width", range(1, 18))
def test_narrow_weights(width: int, rows: int) -> None:
    call = bound(degrees(1, width, 3), degrees(2, 5, 3))
    for dtype in (torch.float64, torch.float32):
        testing.check_against_reference(call, inputs((rows, width), 5, dtype))


@few_and_many
def test_strided_degrees(rows: int) -> None:
    ins, outs = degrees(1, 42)[::2], degrees(2, 74)[::2]
    given_inputs = inputs((rows, 21), 37)
    testing.check_against_reference(bound(ins, outs), given_inputs)


@pytest.mark.parametrize(
    ("ins", "outs"),
    [
        (torch.zeros(7).long(), torch.zeros(6).long()),
        (torch.ones(7).long(), torch.zeros(6).long()),
        (torch.arange(40), torch.arange(40)),
        (torch.arange(40).flip(0), torch.arange(40)),
        (torch.arange(40), torch.tensor([3])),
        (torch.tensor([3]), torch.arange(40)),
        (torch.tensor([-(2**62), 0, 2**62]), torch.tensor([2**62, -1, -(2**62)])),
        (torch.tensor([-(2**31), 5, 2**31 - 1]), torch.tensor([2**31 - 1, 2**31 - 2, -(2**31) + 1, -(2**31)])),
        (torch.arange(5), torch.zeros(0).long()),
        (torch.arange(5, dtype=torch.int32), torch.arange(4, dtype=torch.uint8)),
    ],
    ids=["all", "none", "triangle", "reversed", "one_out", "one_in", "huge", "32_bits", "no_outputs", "small_types"],
)
@few_and_many
@pytest.mark.parametrize("strict", [False, True])
def test_degrees(ins: Tensor, outs: Tensor, strict: bool, rows: int) -> None:
    for dtype in (torch.float64, torch.float32):
        testing.check_against_reference(bound(ins, outs, strict=strict), inputs((rows, len(ins)), len(outs), dtype))


@settings(max_examples=60)
@given(st.data())
def test_any_call_is_as_close_as_plain_pytorch(data: st.DataObject) -> None:
    features, out = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    shape = (*data.draw(st.lists(st.integers(0, 9), max_size=2)), features)
    most = data.draw(st.integers(0, 20))
    call = bound(
        degrees(data.draw(st.integers(0, 99)), features, most),
        degrees(data.draw(st.integers(0, 99)), out, most),
        strict=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from([None, *ACTIVATIONS])),
    )
    dtype, layout = data.draw(st.sampled_from(testing.DTYPES)), data.draw(st.sampled_from(testing.LAYOUTS))
    x, weight, bias = inputs(shape, out, dtype, layout)
    testing.check_against_reference(call, [x, weight, bias if data.draw(st.booleans()) else None])


@few_and_many
def test_what_the_mask_hides_is_not_read_and_gets_no_gradient(rows: int) -> None:
    x, weight, bias = inputs((rows, 21), 37)
    ins, outs = degrees(1, 21), degrees(2, 37)
    hidden = ins[None, :] > outs[:, None]
    dirty = weight.clone()
    dirty[hidden] = float("nan")
    call = bound(ins, outs)
    results = []
    for w in (weight, dirty):
        leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
        y = call(*leaves)
        y.square().sum().backward()
        assert leaves[1].grad[hidden].count_nonzero() == 0
        results.append([y, *(t.grad for t in leaves)])
    if "cpu" in fk.available_backends():
        testing.assert_same_bits(*results)


def test_only_the_gradients_that_are_needed() -> None:
    call = bound(degrees(1, 5), degrees(2, 6))
    full = [t.requires_grad_() for t in inputs((4, 5), 6)]
    call(*full).square().sum().backward()
    for chosen in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):
        leaves = [t.requires_grad_(i in chosen) for i, t in enumerate(inputs((4, 5), 6))]
        call(*leaves).square().sum().backward()
        for i, (leaf, expected) in enumerate(zip(leaves, full, strict=True)):
            assert (leaf.grad is not None) == (i in chosen)
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("activation", [None, *SMOOTH])
def test_gradcheck(activation: str | None, backend: str) -> None:
    call = bound(degrees(1, 4), degrees(2, 3), activation=activation)
    testing.check_gradients(call, inputs((2, 4), 3), second=True)
    testing.check_gradients(call, [*inputs((2, 4), 3)[:2], None], second=True)


# ---- the ways PyTorch calls --------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 5])
def test_opcheck(rows: int) -> None:
    for dtype in (torch.float64, torch.float32):
        x, weight, bias = inputs((rows, 6), 4, dtype)
        options = [degrees(1, 6), degrees(2, 4), False]
        testing.check_opcheck(forward_op, [x, weight, bias, *options, 1])
        testing.check_opcheck(forward_op, [x, weight, None, *options, 0])
        grad = testing.random_tensor((rows, 4), dtype)
        for wanted in ((True, True), (True, False), (False, True)):
            testing.check_opcheck(backward_op, [grad, x, weight, *options, *wanted])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(compiler: str, backend: str) -> None:
    call = bound(degrees(1, 5), degrees(2, 7), activation="gelu")
    testing.check_compile(call, inputs((6, 5), 7, torch.float32), backend=compiler, terms=7)
    testing.check_compile(call, inputs((6, 5), 7, torch.float32), gradients=False, backend=compiler, terms=7)


def test_compile_with_dynamic_shapes() -> None:
    call = bound(degrees(1, 5), degrees(2, 7))
    testing.check_compile(call, inputs((2, 6, 5), 7, torch.float32), backend="aot_eager", dynamic=True, terms=12)


def test_vmap(backend: str) -> None:
    x, weight, bias = inputs((3, 2, 5), 4)
    weights, biases = torch.stack([weight, 2 * weight, -weight]), torch.stack([bias, -bias, bias])
    for strict in (False, True):
        call = bound(degrees(1, 5), degrees(2, 4), strict=strict, activation="tanh")
        testing.check_vmap(call, [x, weight, bias], [0, None, None], terms=5)
        testing.check_vmap(call, [x[0], weights, biases], [None, 0, 0], terms=5)
        testing.check_vmap(call, [x, weights, biases], [0, 0, 0], terms=5)
        testing.check_vmap(call, [x[0], weight, None], [0, None, None], terms=5)


def test_gradients_per_sample(backend: str) -> None:
    x, weight, bias = inputs((3, 5), 4)
    call = bound(degrees(1, 5), degrees(2, 4))
    per_sample = torch.func.vmap(
        torch.func.grad(lambda w, b, row: call(row, w, b).square().sum(), argnums=(0, 1)), in_dims=(None, None, 0)
    )(weight, bias, x)
    for i in range(3):
        leaves = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        expected = torch.autograd.grad(call(x[i], *leaves).square().sum(), leaves)
        torch.testing.assert_close([g[i] for g in per_sample], list(expected))


def test_autocast(backend: str) -> None:
    given_inputs = inputs((4, 5), 6, torch.float32)
    call = bound(degrees(1, 5), degrees(2, 6), activation="relu")
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*given_inputs)
        mixed = call(given_inputs[0].bfloat16(), *given_inputs[1:])
    assert y.dtype == torch.bfloat16
    testing.assert_same_bits(y, call(*(t.bfloat16() for t in given_inputs)))
    testing.assert_same_bits(mixed, y)
    leaves = [t.requires_grad_() for t in given_inputs]
    with torch.autocast("cpu", torch.bfloat16):
        call(*leaves).float().square().sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 3


@pytest.mark.parametrize(("rows", "width"), [(200, 63), (4, 300)])
def test_same_bits_every_time_and_in_every_thread(rows: int, width: int) -> None:
    call = bound(degrees(1, width), degrees(2, 500))
    testing.check_deterministic(call, inputs((rows, width), 500, torch.float32))
    if "cpu" in fk.available_backends():
        testing.check_threads(call, inputs((rows, width), 500, torch.float32))


@few_and_many
def test_nan_weights_flow_through(rows: int) -> None:
    x, weight, bias = inputs((rows, 5), 6)
    ins = outs = torch.zeros(6).long()
    weight[2, 3] = float("nan")
    y = masked_linear(x, weight, bias, in_degrees=ins[:5], out_degrees=outs)
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3, 4, 5]].isfinite().all()


@few_and_many
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_wrong_with_one_sample_stays_with_it(bad: float, rows: int) -> None:
    leaves = [t.requires_grad_() for t in inputs((rows, 21), 37, torch.float32)]
    with torch.no_grad():
        leaves[0][1] = bad
    y = bound(degrees(1, 21), degrees(2, 37))(*leaves)
    others = [i for i in range(rows) if i != 1]
    assert y[others].isfinite().all()
    y[others].square().sum().backward()
    assert leaves[0].grad[others].isfinite().all()


@needs_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("shape", [(9, 21), (37, 1), (5, 130), (8, 48)])
def test_nothing_is_read_beyond_the_weight(shape: tuple[int, int]) -> None:
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page)
    numbers = torch.frombuffer(memory, dtype=torch.float32)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(numbers.data_ptr() + 3 * page)
    assert libc.mprotect(guard, page, 0) == 0  # PROT_NONE: whoever reads there dies
    try:
        weight = numbers[: 3 * page // 4][-shape[0] * shape[1] :].view(shape)
        x = testing.random_tensor((3, shape[1]), torch.float32).requires_grad_()
        bound(degrees(1, shape[1]), degrees(2, shape[0]))(x, weight).sum().backward()
    finally:
        assert libc.mprotect(guard, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0


# ---- bad input ---------------------------------------------------------------------------------

X, W, B = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
I4, O5 = torch.arange(4), torch.arange(5)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, r"x must be a torch\.Tensor, got list", {"x": [1.0]}),
        (TypeError, r"x must be float64, .*got torch\.int64", {"x": X.long()}),
        (ValueError, r"x must have at least one dimension", {"x": X[0, 0]}),
        (ValueError, r"x must have shape \(3, 4\) .*got \(3, 3\)", {"x": X[:, :3]}),
        (TypeError, r"weight must be a torch\.Tensor, got NoneType", {"weight": None}),
        (TypeError, r"weight has dtype torch\.float64, but x has torch\.float32", {"weight": W.double()}),
        (ValueError, r"weight must have shape \(5, 4\) .*got \(4, 5\)", {"weight": W.T}),
        (ValueError, r"weight is on meta, but x is on cpu", {"weight": W.to("meta")}),
        (ValueError, r"bias must have shape \(5,\) .*got \(4,\)", {"bias": B[:4]}),
        (ValueError, r"bias must have shape \(5,\) .*got \(1, 5\)", {"bias": B[None]}),
        (TypeError, r"bias has dtype torch\.float16, but x has torch\.float32", {"bias": B.half()}),
        (ValueError, r"bias is on meta, but x is on cpu", {"bias": B.to("meta")}),
        (TypeError, r"bias must be a torch\.Tensor, got float", {"bias": 0.5}),
        (TypeError, r"in_degrees must be a torch\.Tensor, got list", {"in_degrees": [0, 1, 2, 3]}),
        (ValueError, r"in_degrees must be a vector of integers, got torch\.float32", {"in_degrees": I4.float()}),
        (ValueError, r"out_degrees must be a vector of integers, got torch\.bool", {"out_degrees": O5 > 1}),
        (ValueError, r"out_degrees must be a vector of integers, .*shape \(1, 5\)", {"out_degrees": O5[None]}),
        (ValueError, r"in_degrees is on meta, but x is on cpu", {"in_degrees": I4.to("meta")}),
        (ValueError, r"weight must have shape \(4, 4\)", {"out_degrees": O5[:4]}),
        (ValueError, r"activation must be one of identity, .*got 'swish'", {"activation": "swish"}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, changes: dict[str, Any], backend: str) -> None:
    arguments = {"x": X, "weight": W, "bias": B, "in_degrees": I4, "out_degrees": O5, **changes}
    with pytest.raises(error, match=message):
        masked_linear(**arguments)
