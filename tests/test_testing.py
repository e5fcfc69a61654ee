"""The test kit has to fail when there is something to find: each check meets a planted error."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import flowkernels as fk
from flowkernels import testing


def plain(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return x * u.exp(), u.sum(-1)


def inverse(y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return y * (-u).exp(), -u.sum(-1)


def inputs(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (33, 7)) -> tuple[Tensor, Tensor]:
    return testing.random_tensor(shape, dtype), testing.random_tensor(shape, dtype, seed=1)


# ---- layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape", testing.SHAPES.values(), ids=testing.SHAPES)
def test_layouts_keep_shape_and_values(layout: str, shape: tuple[int, ...]) -> None:
    source = testing.random_tensor(shape)
    before = source.clone()
    t = testing.with_layout(source, layout)
    assert t.shape == source.shape
    assert t.dtype == source.dtype
    assert t.untyped_storage().data_ptr() != source.untyped_storage().data_ptr() or t.numel() == 0
    assert torch.equal(source, before)
    if not layout.startswith("expanded"):
        assert torch.equal(t, source)
    elif t.numel():
        dim = 0 if layout == "expanded_rows" else -1
        assert torch.equal(t, source.narrow(dim, 0, 1).expand_as(source))


def test_layouts_differ() -> None:
    source = testing.random_tensor((6, 4))
    strides = {layout: testing.with_layout(source, layout).stride() for layout in testing.LAYOUTS}
    assert strides["contiguous"] == (4, 1)
    assert strides["transposed"] == (1, 6)
    assert strides["strided"] == (16, 2)
    assert strides["interleaved"] == (8, 2)
    assert strides["padded_rows"] == (7, 1)
    assert strides["expanded_rows"] == (0, 1)
    assert strides["expanded_features"] == (1, 0)
    offset = testing.with_layout(source, "offset")
    assert offset.is_contiguous()
    assert offset.storage_offset() == 1


def test_gaps_of_a_layout_are_nan() -> None:
    t = testing.with_layout(testing.random_tensor((3, 4)), "interleaved")
    assert torch.as_strided(t, (3, 4), (8, 2), 1).isnan().all()


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="layout must be one of contiguous"):
        testing.with_layout(torch.zeros(2), "diagonal")


def test_random_tensor_repeats() -> None:
    assert torch.equal(testing.random_tensor((5, 3)), testing.random_tensor((5, 3)))
    assert not torch.equal(testing.random_tensor((5, 3)), testing.random_tensor((5, 3), seed=1))


# ---- fresh memory ------------------------------------------------------------------------------------------


def test_poisoned_fills_fresh_tensors_and_ends() -> None:
    with testing.poisoned():
        assert torch.empty(1000).isnan().all()
        assert torch.zeros(3).new_empty(1000, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with testing.poisoned():
            pass
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif("cpu" not in fk.available_backends(), reason="needs the compiled library")
@pytest.mark.parametrize("size", [10, 3_000_000])  # the larger one takes the way of the huge pages
def test_poisoned_reaches_the_outputs_of_the_compiled_kernels(size: int) -> None:
    with testing.poisoned():
        assert torch.ops.flowkernels.fresh_output(torch.zeros(size)).isnan().all()


def test_assert_written_sees_what_nobody_wrote() -> None:
    def forgets_the_last_row(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:-1] = x[:-1]
        return y

    x = testing.random_tensor((5, 3))
    with (
        testing.poisoned(),
        pytest.raises(AssertionError, match=r"3 of 15 elements are NaN.*first at \(4, 0\)"),
    ):
        testing.assert_written([x, forgets_the_last_row(x)])
    testing.assert_written([x, x])


# ---- closeness ---------------------------------------------------------------------------------------------


def closeness(dtype: torch.dtype, size: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """(a right output, the plain one, the exact one)."""
    x, u = inputs(dtype, (size,))
    exact = x.double() * u.double().exp()
    return exact.to(dtype), x * u.exp(), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_right_results_pass(dtype: torch.dtype, size: int) -> None:
    right, plain_out, exact = closeness(dtype, size)
    testing.assert_as_close_as_plain(right, plain_out, exact)
    testing.assert_as_close_as_plain(plain_out, plain_out, exact)
    testing.assert_as_close_as_plain([right, None], [plain_out, None], [exact, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_wrong_element_is_found(dtype: torch.dtype) -> None:
    right, plain_out, exact = closeness(dtype)
    wrong = right.clone()
    wrong[777] *= 1 + 16 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"gradient: worst \w+ error .* at \(777,\) of \(1000,\)"):
        testing.assert_as_close_as_plain(wrong, plain_out, exact, name="gradient")


def test_a_wrong_small_element_is_found_beside_large_ones() -> None:
    exact = torch.tensor([1e10, 1e-10], dtype=torch.float64)
    right = exact.float()
    wrong = torch.tensor([1e10, 1.001e-10])
    testing.assert_as_close_as_plain(right, right, exact)
    with pytest.raises(AssertionError, match="relative"):
        testing.assert_as_close_as_plain(wrong, right, exact)


def test_a_large_error_is_not_hidden_by_a_cancelled_element() -> None:
    exact = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    plain_out = torch.tensor([1.0, 2e-9])  # off by 100 % where terms cancel
    testing.assert_as_close_as_plain(plain_out, plain_out, exact)
    with pytest.raises(AssertionError, match="absolute"):
        testing.assert_as_close_as_plain(torch.tensor([1.001, 2e-9]), plain_out, exact)


def test_magnitude_is_the_scale_of_sums() -> None:
    exact = torch.tensor([1e-6], dtype=torch.float64)  # 1 - 0.999999
    off = torch.tensor([1e-6 + 1e-7])
    with pytest.raises(AssertionError):
        testing.assert_as_close_as_plain(off, exact.float(), exact)
    testing.assert_as_close_as_plain(off, exact.float(), exact, magnitude=torch.tensor([2.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_infinities_and_nan_have_to_agree(bad: float) -> None:
    inf = float("inf")
    exact = torch.tensor([1.0, 1e300, float("nan"), -inf], dtype=torch.float64)
    right = torch.tensor([1.0, inf, float("nan"), -inf])
    testing.assert_as_close_as_plain(right, right, exact)
    for i in range(4):
        wrong = right.clone()
        wrong[i] = bad
        if torch.equal(wrong.nan_to_num(7.0, 8.0, 9.0), right.nan_to_num(7.0, 8.0, 9.0)):
            continue
        with pytest.raises(AssertionError):
            testing.assert_as_close_as_plain(wrong, right, exact)


def test_a_plain_version_that_is_nan_excuses_nothing() -> None:
    exact = torch.tensor([0.0], dtype=torch.float64)
    nan = torch.tensor([float("nan")])
    with pytest.raises(AssertionError, match="not finite"):
        testing.assert_as_close_as_plain(nan, nan, exact)
    testing.assert_as_close_as_plain(torch.tensor([0.0]), nan, exact)


def test_missing_outputs_and_shapes_are_found() -> None:
    t = torch.zeros(2)
    with pytest.raises(AssertionError, match=r"output\[1\]: only plain and exact gave it"):
        testing.assert_as_close_as_plain([t, None], [t, t], [t, t])
    with pytest.raises(AssertionError, match="1 outputs, plain has 2"):
        testing.assert_as_close_as_plain([t], [t, t], [t, t])
    with pytest.raises(AssertionError, match=r"shape \(3,\), plain \(2,\)"):
        testing.assert_as_close_as_plain(torch.zeros(3), t, t)


def test_check_against_reference_sees_wrong_values_and_gradients() -> None:
    def bad_on_cpu(factor: float, gradient: float) -> testing.Call:
        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: Tensor) -> Tensor:
                return x * factor

            @staticmethod
            def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
                return g * gradient

        return lambda x: x.clone() if fk._backend.backend() == "reference" else Scaled.apply(x)

    for dtype in testing.DTYPES:
        x = testing.random_tensor((9, 5), dtype)
        off = 1 + 8 * torch.finfo(dtype).eps
        testing.check_against_reference(bad_on_cpu(1.0, 1.0), [x])
        with pytest.raises(AssertionError, match=r"output\[0\]"):
            testing.check_against_reference(bad_on_cpu(off, 1.0), [x])
        with pytest.raises(AssertionError, match="gradient of output by input 0"):
            testing.check_against_reference(bad_on_cpu(1.0, off), [x])
        testing.check_against_reference(bad_on_cpu(1.0, off), [x], gradients=False)


def test_check_against_reference_sees_a_wrong_dtype() -> None:
    def call(x: Tensor) -> Tensor:
        return x * 2 if fk._backend.backend() == "reference" else (x * 2).double()

    with pytest.raises(AssertionError, match=r"dtype torch\.float64, the reference gives torch\.float32"):
        testing.check_against_reference(call, [testing.random_tensor((3,))])


def test_assert_same_bits() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    testing.assert_same_bits(nan, nan.clone())
    with pytest.raises(AssertionError, match=r"1 of 2 elements differ in their bits.*\(1,\): 0\.0 and -0\.0"):
        testing.assert_same_bits(nan, torch.tensor([float("nan"), -0.0]))
    with pytest.raises(AssertionError, match=r"torch\.float32 \(2,\) against torch\.float64 \(2,\)"):
        testing.assert_same_bits(nan, nan.double())


# ---- gradients and laws ------------------------------------------------------------------------------------


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * 3


class WrongSecondGradient(torch.autograd.Function):
    """x^3 whose gradient is right but does not know that it depends on x."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return g * 3 * x.detach() ** 2


def test_check_gradients() -> None:
    x = testing.random_tensor((3, 2), torch.float64)
    testing.check_gradients(plain, inputs(torch.float64, (3, 2)), second=True)
    with pytest.raises(AssertionError, match="first derivative"):
        testing.check_gradients(WrongGradient.apply, [x])
    testing.check_gradients(WrongSecondGradient.apply, [x])
    with pytest.raises(AssertionError, match="second derivative"):
        testing.check_gradients(WrongSecondGradient.apply, [x], second=True)
    with pytest.raises(ValueError, match="float64"):
        testing.check_gradients(plain, inputs(torch.float32))


def test_flow_laws() -> None:
    x, u = inputs(torch.float64, (4, 3))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return plain(x, u)

    def back(y: Tensor) -> tuple[Tensor, Tensor]:
        return inverse(y, u)

    testing.check_flow_laws(forward, back, x)
    with pytest.raises(AssertionError, match="logdet against slogdet"):
        testing.check_logdet(lambda x: (forward(x)[0], -forward(x)[1]), x)
    with pytest.raises(AssertionError, match="logdet against slogdet"):
        testing.check_flow_laws(lambda x: (forward(x)[0], -forward(x)[1]), back, x)
    with pytest.raises(AssertionError, match="minus that of the forward"):
        testing.check_logdets_cancel(forward, lambda y: (back(y)[0], -back(y)[1]), x)
    with pytest.raises(AssertionError, match=r"inverse\(forward\(x\)\) against x: 12 of 12"):
        testing.check_inverse(forward, lambda y: (back(y)[0] + 1e-8, back(y)[1]), x)
    with pytest.raises(AssertionError, match=r"logdet has shape \(4, 3\), the events have \(4,\)"):
        testing.check_logdet(lambda x: (forward(x)[0], u), x)
    with pytest.raises(AssertionError, match="event 1 depends on event 0"):
        testing.check_logdet(lambda x: (forward(x)[0] + x[0].detach() * 0 + x.cumsum(0) - x, forward(x)[1]), x)


def test_flow_laws_of_image_shaped_events() -> None:
    x, u = inputs(torch.float64, (2, 1, 3, 2))

    def forward(x: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
        return x * (sign * u).exp(), sign * u.sum((1, 2, 3))

    testing.check_flow_laws(forward, lambda y: forward(y, -1), x, event_dims=3)


# ---- how PyTorch calls -------------------------------------------------------------------------------------


@pytest.fixture
def library():  # type: ignore[no-untyped-def]
    lib = torch.library.Library("flowkernels_test", "FRAGMENT")
    yield lib
    lib._destroy()


def test_check_opcheck(library: torch.library.Library) -> None:
    library.define("right(Tensor x) -> Tensor")
    library.impl("right", lambda x: x * 2, "CompositeExplicitAutograd")
    testing.check_opcheck(torch.ops.flowkernels_test.right.default, [torch.ones(3)])
    library.define("writes(Tensor x) -> Tensor")
    library.impl("writes", lambda x: x.mul_(2).clone(), "CompositeExplicitAutograd")
    with pytest.raises(AssertionError, match=r"opcheck of flowkernels_test\.writes"):
        testing.check_opcheck(torch.ops.flowkernels_test.writes.default, [torch.ones(3)])


def test_check_compile() -> None:
    testing.check_compile(plain, inputs(), backend="aot_eager")

    def other_when_compiled(x: Tensor) -> Tensor:
        return x * 1.001 if torch.compiler.is_compiling() else x * 1.0

    with pytest.raises(AssertionError, match="compiled output"):
        testing.check_compile(other_when_compiled, inputs()[:1], backend="aot_eager")

    def breaks_the_graph(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * 2

    with pytest.raises(torch._dynamo.exc.Unsupported):
        testing.check_compile(breaks_the_graph, inputs()[:1], backend="aot_eager")


def test_check_vmap() -> None:
    x, u = inputs(torch.float64, (4, 3))
    testing.check_vmap(plain, [x, u], [0, None])
    testing.check_vmap(plain, [x, u], [1, 1])

    class Rows(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * 2

        @staticmethod
        def vmap(info: object, in_dims: object, x: Tensor) -> tuple[Tensor, int]:
            return (x * 2).flip(0), 0

    with pytest.raises(AssertionError, match="output under vmap"):
        testing.check_vmap(Rows.apply, [x], [0], jacobian=False)


def test_check_deterministic() -> None:
    testing.check_deterministic(plain, inputs())
    calls = itertools.count()

    def drifts(x: Tensor) -> Tensor:
        y = x * 1.0
        return torch.where(torch.arange(x.shape[-1]) == 3, y * (1 + 1e-7 * (next(calls) % 2)), y)

    with pytest.raises(AssertionError, match=r"second run's output\[0\]: .* differ in their bits"):
        testing.check_deterministic(drifts, inputs()[:1])


def test_check_threads() -> None:
    testing.check_threads(plain, inputs())

    def depends_on_threads(x: Tensor) -> Tensor:
        return x * (1.0 + torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(AssertionError, match="with one thread"):
            testing.check_threads(depends_on_threads, inputs()[:1])
    finally:
        torch.set_num_threads(before)

    scratch = torch.zeros(33, 7)
    main = {"first": True}

    def shares_memory(x: Tensor) -> Tensor:
        if main.pop("first", False):
            return x * 2
        scratch.add_(x)
        return scratch.clone()

    with pytest.raises(AssertionError, match="among 4 threads"):
        testing.check_threads(shares_memory, inputs()[:1], gradients=False)

    def raises_in_threads(x: Tensor) -> Tensor:
        import threading

        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("only on the main thread")
        return x * 2

    with pytest.raises(AssertionError, match="a call in a thread raised RuntimeError: only on the main"):
        testing.check_threads(raises_in_threads, inputs()[:1])
