"""gumbel_softmax: distribution, gradients, drop-in for torch's, and how PyTorch may call it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import flowkernels as fk
from flowkernels import testing
from flowkernels.ops import gumbel_argmax, gumbel_softmax
from flowkernels.ops.gumbel_softmax.autograd import backward_op, forward_op

SHAPES = {name: shape for name, shape in testing.SHAPES.items() if shape != ()} | {
    "long": (3, 4097),
    "longer": (2, 9001),
}
every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
hard_and_soft = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])


def bound(**options: object) -> testing.Call:
    return lambda logits, *tau: gumbel_softmax(logits, *tau, seed=7, **options)


# ---- values and gradients against the reference --------------------------------------------------------------


@hard_and_soft
@every_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, hard: bool) -> None:
    logits = testing.random_tensor(shape, dtype, spread=2.0)
    testing.check_against_reference(bound(hard=hard), [logits], gradients=not hard)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_layouts_and_dims(layout: str, dim: int) -> None:
    logits = testing.random_tensor((5, 6, 19), layout=layout)
    testing.check_against_reference(bound(dim=dim, tau=0.7), [logits])


@every_dtype
def test_temperature_per_row(dtype: torch.dtype) -> None:
    logits = testing.random_tensor((33, 20), dtype)
    tau = testing.random_tensor((33, 1), dtype, seed=1).exp()
    testing.check_against_reference(bound(), [logits, tau])
    once = gumbel_softmax(logits, tau, seed=7)
    assert torch.equal(once, gumbel_softmax(logits, tau[:, 0], seed=7))
    rows = [gumbel_softmax(logits, float(t), seed=7)[i] for i, t in enumerate(tau)]
    assert torch.equal(once, torch.stack(rows))


@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 70),
    tau=st.floats(0.05, 20),
    spread=st.floats(0.1, 30),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_shape(rows: int, classes: int, tau: float, spread: float, seed: int) -> None:
    logits = testing.random_tensor((rows, classes), torch.float64, spread=spread, seed=seed % 1000)
    y = gumbel_softmax(logits, tau, seed=seed)
    with fk.use_backend("reference"):
        expected = gumbel_softmax(logits, tau, seed=seed)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(y.sum(-1), torch.ones(rows, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4)])
def test_gradcheck_for_fixed_noise(shape: tuple[int, ...]) -> None:
    logits = testing.random_tensor(shape, torch.float64)
    tau = testing.random_tensor((*shape[:-1], 1), torch.float64, seed=1).exp()
    testing.check_gradients(bound(), [logits, tau], second=True)
    testing.check_gradients(bound(tau=0.3, dim=0), [logits], second=True)


def test_gradient_of_a_scalar_temperature() -> None:
    tau = torch.tensor(0.8, dtype=torch.float64)
    testing.check_gradients(lambda t: gumbel_softmax(testing.random_tensor((6, 5), torch.float64), t, seed=1), [tau])


def test_hard_backward_is_exactly_the_soft_one(backend: str) -> None:
    logits = testing.random_tensor((64, 33)).requires_grad_()
    tau = testing.random_tensor((64, 1), seed=1).exp().requires_grad_()
    weight = testing.random_tensor((64, 33), seed=2)
    soft, hard = (
        torch.autograd.grad((gumbel_softmax(logits, tau, h, seed=3) * weight).sum(), (logits, tau))
        for h in (False, True)
    )
    for s, h in zip(soft, hard, strict=True):
        assert torch.equal(s, h)


def test_hard_is_twice_differentiable_like_soft() -> None:
    logits = testing.random_tensor((4, 5), torch.float64).requires_grad_()
    weight = testing.random_tensor((4, 5), torch.float64, seed=2)
    seconds = []
    for hard in (False, True):
        y = gumbel_softmax(logits, 0.7, hard, seed=3)
        (first,) = torch.autograd.grad((y * weight).sum(), logits, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), logits)[0])
    assert torch.equal(*seconds)
    assert seconds[0].abs().max() > 1e-3


def test_gradient_against_torch_formula() -> None:
    """With the noise handed over, torch's own softmax has to have the same gradient."""
    logits = testing.random_tensor((32, 10), torch.float64).requires_grad_()
    noise = fk.random.gumbel(32, 10, seed=5, dtype=torch.float64)
    weight = testing.random_tensor((32, 10), torch.float64, seed=2)
    theirs = ((logits + noise) / 0.6).softmax(-1)
    ours = gumbel_softmax(logits, 0.6, seed=5)
    torch.testing.assert_close(ours, theirs)
    got, expected = (torch.autograd.grad((y * weight).sum(), logits)[0] for y in (ours, theirs))
    torch.testing.assert_close(got, expected)


# ---- distribution --------------------------------------------------------------------------------------------


@hard_and_soft
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_argmax_frequencies(backend: str, dtype: torch.dtype, hard: bool) -> None:
    """chi-square of what is drawn; the temperature does not matter to the argmax."""
    n = 200_000
    logits = torch.tensor([0.3, -1.0, 2.0, -4.0, 0.0, -math.inf, 1.1], dtype=dtype)
    drawn = gumbel_softmax(logits.expand(n, 7), 0.4, hard, seed=12).argmax(-1).bincount(minlength=7)
    assert drawn[5] == 0
    possible = logits.isfinite()
    expected = logits.double().softmax(-1)[possible] * n
    assert stats.chisquare(drawn[possible], expected).pvalue > 1e-3


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_values_follow_the_concrete_distribution(backend: str, tau: float) -> None:
    """Two categories: logit(y_0) tau - (l_0 - l_1) is standard logistic noise. Kolmogorov-Smirnov."""
    logits = torch.tensor([0.7, -0.4], dtype=torch.float64).expand(100_000, 2)
    y = gumbel_softmax(logits, tau, seed=4)
    noise = tau * (y[:, 0].log() - y[:, 1].log()) - 1.1
    assert stats.kstest(noise.numpy(), stats.logistic.cdf).pvalue > 1e-3


def test_two_calls_draw_different_noise_and_seeds_repeat_it(backend: str) -> None:
    logits = testing.random_tensor((8, 9))
    torch.manual_seed(3)
    a, b = gumbel_softmax(logits), gumbel_softmax(logits)
    torch.manual_seed(3)
    assert torch.equal(a, gumbel_softmax(logits))
    assert not torch.equal(a, b)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(a, gumbel_softmax(logits, seed=generator))


def test_same_seed_same_sample_on_every_backend() -> None:
    logits = testing.random_tensor((500, 50))
    with fk.use_backend("reference"):
        expected = gumbel_softmax(logits, hard=True, seed=2)
    for name in fk.available_backends():
        with fk.use_backend(name):
            assert torch.equal(gumbel_softmax(logits, hard=True, seed=2), expected)


def test_noise_belongs_to_the_element() -> None:
    """Rows and thread splits do not matter: the first rows of a larger batch are drawn as they are alone."""
    logits = testing.random_tensor((3000, 13))
    assert torch.equal(gumbel_softmax(logits, seed=1)[:7], gumbel_softmax(logits[:7], seed=1))
    moved = gumbel_softmax(logits.t().contiguous(), dim=0, seed=1)
    assert torch.equal(moved.t(), gumbel_softmax(logits, seed=1))


# ---- what PyTorch expects of its own ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dim", "count"),
    [((5,), 0, 1), ((5,), -1, 1), ((5, 4), 1, 5), ((5, 4, 3), 1, 15), ((5, 4, 3), -1, 20), ((5, 4, 3), -2, 15)],
)
@every_dtype
def test_one_hot_counts(backend: str, shape: tuple[int, ...], dim: int, count: int, dtype: torch.dtype) -> None:
    logits = testing.random_tensor(shape, dtype)
    y = gumbel_softmax(logits, hard=True, dim=dim)
    assert y.min() == 0
    assert y.max() == 1
    assert y.sum() == count
    assert y.dtype == dtype
    assert y.shape == logits.shape
    assert ((y == 0) | (y == 1)).all()


def test_frequencies_as_torch_tests_them() -> None:
    probs, n = torch.tensor([0.2, 0.2, 0.6]), 1000
    counts = torch.zeros(3)
    for _ in range(n):
        counts += gumbel_softmax(probs.log(), hard=True)
    z = (counts - n * probs) / (n * probs * (1 - probs)).sqrt()
    assert z.abs().max() < 2.58 * 1.5


def test_takes_torchs_arguments() -> None:
    logits = testing.random_tensor((3, 4))
    for function in (F.gumbel_softmax, gumbel_softmax):
        assert function(logits=logits, tau=2, hard=False, eps=1e-10, dim=0).shape == (3, 4)


def test_once_forbidden_values_of_the_bug_list() -> None:
    """inf and NaN that torch's had over the years (its issues 22442, 41663, 101620): a million draws have none."""
    for dtype in testing.DTYPES:
        y = gumbel_softmax(torch.zeros(4096, 256, dtype=dtype), 0.1)
        assert y.isfinite().all()
        assert ((y >= 0) & (y <= 1)).all()


# ---- extremes --------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("tau", [1e-40, 1e-3, 1.0, 1e6])
def test_extreme_temperatures(backend: str, dtype: torch.dtype, tau: float) -> None:
    logits = testing.random_tensor((64, 20), dtype, spread=5.0)
    y = gumbel_softmax(logits, tau, seed=1)
    assert y.isfinite().all()
    if tau <= 1e-3:
        assert (y.amax(-1) > 0.5).float().mean() > 0.95
    if tau >= 1e6:
        torch.testing.assert_close(y, torch.full_like(y, 1 / 20), rtol=1e-2, atol=0)


@hard_and_soft
def test_masked_logits(backend: str, hard: bool) -> None:
    logits = testing.random_tensor((200, 9)).requires_grad_()
    mask = testing.random_tensor((200, 9), seed=1) > 0
    mask[:, 4] = False
    y = gumbel_softmax(logits.masked_fill(mask, -math.inf), 0.5, hard, seed=1)
    assert (y[mask] == 0).all()
    torch.testing.assert_close(y.sum(-1), torch.ones(200))
    (grad,) = torch.autograd.grad(y.square().sum() if not hard else (y * logits.detach()).sum(), logits)
    assert grad.isfinite().all()
    assert (grad[mask] == 0).all()


@hard_and_soft
def test_nan_and_inf_logits_give_nan_rows_only(backend: str, hard: bool) -> None:
    logits = testing.random_tensor((4, 40))
    logits[1, 3], logits[2, 37] = math.nan, math.inf
    y = gumbel_softmax(logits, hard=hard, seed=1)
    assert y.isnan().all(-1).tolist() == [False, True, True, False]
    assert not y[[0, 3]].isnan().any()


# ---- how PyTorch may call it -------------------------------------------------------------------------------------


@hard_and_soft
def test_compiles_without_a_graph_break(hard: bool) -> None:
    logits = testing.random_tensor((16, 20))
    tau = testing.random_tensor((16, 1), seed=1).exp()
    testing.check_compile(bound(hard=hard), [logits, tau])


def test_compiled_calls_draw_from_torchs_generator() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda x: gumbel_softmax(x, 0.5, hard=True), fullgraph=True)
    logits = testing.random_tensor((64, 20))
    torch.manual_seed(1)
    a, b = compiled(logits), compiled(logits)
    torch.manual_seed(1)
    assert torch.equal(a, compiled(logits))
    assert not torch.equal(a, b)


def test_compiled_hard_backward_sees_the_noise_of_its_forward() -> None:
    """The gradient under torch.compile is that of the sample which the forward drew, as eager mode has it."""
    torch.compiler.reset()
    compiled = torch.compile(lambda x, w, s: (gumbel_softmax(x, 0.5, hard=True, seed=s) * w).sum(), fullgraph=True)
    logits = testing.random_tensor((64, 20)).requires_grad_()
    weight, seed = testing.random_tensor((64, 20), seed=1), torch.tensor(77)
    (got,) = torch.autograd.grad(compiled(logits, weight, seed), logits)
    (expected,) = torch.autograd.grad((gumbel_softmax(logits, 0.5, hard=True, seed=seed) * weight).sum(), logits)
    torch.testing.assert_close(got, expected)


@hard_and_soft
def test_checkpointing_draws_the_same_noise_again(backend: str, hard: bool) -> None:
    logits = testing.random_tensor((32, 12)).requires_grad_()
    weight = testing.random_tensor((32, 12), seed=1)
    seen: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        y = gumbel_softmax(x, 0.5, hard)
        seen.append(y.detach())
        return y

    torch.manual_seed(5)
    with set_checkpoint_early_stop(False):
        y = checkpoint(run, logits, use_reentrant=False)
        (grad,) = torch.autograd.grad((y * weight).sum(), logits)
    assert len(seen) == 2
    assert torch.equal(*seen)
    torch.manual_seed(5)
    (expected,) = torch.autograd.grad((gumbel_softmax(logits, 0.5, hard) * weight).sum(), logits)
    assert torch.equal(grad, expected)


def test_opcheck() -> None:
    logits = testing.random_tensor((6, 9))
    tau, seed = torch.full((6,), 0.5), torch.tensor(3)
    for hard in (False, True):
        testing.check_opcheck(forward_op, (logits, tau, seed, 5, hard))
    y = forward_op(logits, tau, seed, 5, False)
    for for_tau in (False, True):
        testing.check_opcheck(backward_op, (logits, y, tau, for_tau))


def test_vmap() -> None:
    logits = testing.random_tensor((3, 4, 5), torch.float64)
    testing.check_vmap(bound(tau=0.7), [logits], [0])
    testing.check_vmap(bound(), [logits, testing.random_tensor((4, 1), torch.float64, seed=1).exp()], [0, None])


def test_vmap_over_seeds_draws_different_noise() -> None:
    logits = testing.random_tensor((4, 5))
    together = torch.func.vmap(lambda s: gumbel_softmax(logits, seed=s))(torch.arange(3))
    assert torch.equal(together, torch.stack([gumbel_softmax(logits, seed=s) for s in range(3)]))
    random = torch.func.vmap(lambda x: gumbel_softmax(x), randomness="different")(logits.expand(3, 4, 5))
    assert not torch.equal(random[0], random[1])


def test_deterministic_and_the_same_on_every_thread_count() -> None:
    logits = testing.random_tensor((700, 129))
    tau = testing.random_tensor((700, 1), seed=1).exp()
    testing.check_deterministic(bound(), [logits, tau])
    testing.check_threads(bound(), [logits, tau])


def test_autocast() -> None:
    logits = testing.random_tensor((8, 5), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert gumbel_softmax(logits, seed=1).dtype == torch.bfloat16


# ---- bad input ---------------------------------------------------------------------------------------------------


GOOD = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0],), TypeError, "logits must be a torch.Tensor, got list"),
        ((torch.zeros(3, 4, dtype=torch.int64),), TypeError, "logits must be float64.*got torch.int64"),
        ((torch.zeros(3, dtype=torch.bool),), TypeError, "logits must be float64.*got torch.bool"),
        ((torch.tensor(1.0),), ValueError, "logits must have at least one dimension"),
        ((GOOD, 0.0), ValueError, "tau must be positive and finite, got 0.0"),
        ((GOOD, -1), ValueError, "tau must be positive and finite, got -1"),
        ((GOOD, math.nan), ValueError, "tau must be positive and finite, got nan"),
        ((GOOD, math.inf), ValueError, "tau must be positive and finite, got inf"),
        ((GOOD, "1"), TypeError, "tau must be a number or a tensor, got str"),
        ((GOOD, torch.tensor([[1.0], [0.0], [2.0]])), ValueError, "tau must be positive and finite, got 0.0"),
        (
            (GOOD, torch.tensor([[1.0], [math.nan], [2.0]])),
            ValueError,
            "tau must be positive and finite, got nan",
        ),
        ((GOOD, torch.tensor(-1.0)), ValueError, "tau must be positive"),
        ((GOOD, torch.ones(3, 4)), ValueError, "tau must have size 1 in dimension 1"),
        ((GOOD, torch.ones(5)), ValueError, "tau must broadcast to one temperature per row"),
        ((GOOD, torch.ones(3, 1, dtype=torch.int64)), TypeError, "tau must be float64"),
        ((GOOD, 1.0, False, 2), ValueError, r"dim must lie in \[-2, 1\].*got 2"),
        ((GOOD, 1.0, False, -3), ValueError, r"dim must lie in \[-2, 1\].*got -3"),
        ((GOOD, 1.0, False, 1.0), TypeError, "dim must be an int, got float"),
        (
            (torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]]),),
            ValueError,
            "1 rows of -inf alone, the first is row 1",
        ),
        ((torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]]), 1.0, True), ValueError, "1 rows of -inf alone"),
    ],
)
def test_bad_input(backend: str, arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gumbel_softmax(*arguments)


def test_bad_seed() -> None:
    with pytest.raises(TypeError, match="seed must be None, an int"):
        gumbel_softmax(GOOD, seed="x")


def test_argmax_agrees_with_gumbel_argmax() -> None:
    logits = testing.random_tensor((100, 11))
    index, _ = gumbel_argmax(logits, seed=9)
    assert torch.equal(gumbel_softmax(logits, hard=True, seed=9).argmax(-1, keepdim=True), index)
