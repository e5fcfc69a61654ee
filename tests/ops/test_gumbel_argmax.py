"""gumbel_argmax: exact categorical samples, down to categories that float32 uniforms never reach."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import flowkernels as fk
from flowkernels import testing
from flowkernels.ops import gumbel_argmax
from flowkernels.ops.gumbel_argmax.autograd import backward_op, forward_op
from flowkernels.random import gumbel_of_words, uniform_of_pairs

SHAPES = dict(testing.SHAPES) | {"long": (3, 4097), "longer": (2, 9001)}
every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@every_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = testing.random_tensor(shape, dtype, spread=2.0)
    index, _ = gumbel_argmax(logits, 3, seed=1)
    with fk.use_backend("reference"):
        expected, _ = gumbel_argmax(logits, 3, seed=1)
    assert torch.equal(index, expected)
    assert index.shape == (*shape[:-1], 3)
    testing.check_against_reference(lambda x: gumbel_argmax(x, 3, seed=1)[1], [logits])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_layouts_and_dims(layout: str, dim: int) -> None:
    logits = testing.random_tensor((5, 6, 19), layout=layout)
    index, log_prob = gumbel_argmax(logits, 4, dim, seed=1)
    assert index.shape == tuple(4 if i == dim else n for i, n in enumerate(logits.shape))
    torch.testing.assert_close(log_prob, logits.log_softmax(dim).gather(dim, index))
    testing.check_against_reference(lambda x: gumbel_argmax(x, 4, dim, seed=1)[1], [logits])


@given(rows=st.integers(1, 40), classes=st.integers(1, 300), k=st.integers(1, 200), seed=st.integers(0, 2**64 - 1))
def test_any_shape(rows: int, classes: int, k: int, seed: int) -> None:
    logits = testing.random_tensor((rows, classes), torch.float64, spread=2.0, seed=seed % 1000)
    index, _ = gumbel_argmax(logits, k, seed=seed)
    with fk.use_backend("reference"):
        expected, _ = gumbel_argmax(logits, k, seed=seed)
    assert torch.equal(index, expected)


def test_more_samples_than_are_drawn_at_once() -> None:
    logits = testing.random_tensor((5, 1001))
    index, log_prob = gumbel_argmax(logits, 7001, seed=4)
    with fk.use_backend("reference"):
        expected, _ = gumbel_argmax(logits, 7001, seed=4)
    assert torch.equal(index, expected)
    torch.testing.assert_close(log_prob, logits.log_softmax(-1).gather(-1, index))


def test_uniform_of_pairs_at_its_ends() -> None:
    pairs = torch.tensor([[0, 0], [0, 1], [2**32 - 1, 2**32 - 1]])
    assert uniform_of_pairs(pairs).tolist() == [0.0, 2.0**-64, 1 - 2.0**-53]


@pytest.mark.parametrize(("rows", "k"), [(200_000, 1), (4000, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies(backend: str, dtype: torch.dtype, rows: int, k: int) -> None:
    logits = testing.random_tensor((1, 23), dtype, spread=1.5).expand(rows, 23)
    index, _ = gumbel_argmax(logits, k, seed=3)
    probs = logits[0].double().softmax(-1)
    assert stats.chisquare(index.flatten().bincount(minlength=23), probs * index.numel()).pvalue > 1e-3


def test_samples_of_a_row_are_independent(backend: str) -> None:
    logits = torch.tensor([0.0, 0.5, -0.5]).expand(60_000, 3)
    index, _ = gumbel_argmax(logits, 2, seed=8)
    pairs = (index[:, 0] * 3 + index[:, 1]).bincount(minlength=9)
    probs = logits[0].double().softmax(-1)
    assert stats.chisquare(pairs, torch.outer(probs, probs).flatten() * 60_000).pvalue > 1e-3


def test_rare_category_by_enumeration() -> None:
    """Two categories of probability 2^-28 and 1 - 2^-28: the rare one's chance, counted over its 2^32 words.

    Given the common one's noise g, the rare one wins for every word below some number, found by bisection in the
    mapping that the kernels use; averaged over many g that has to give 2^-28. Uniforms of 24 bits give 0 here.
    """
    gap = 28 * math.log(2)
    words = fk.random.bits(4000, seed=6)
    for dtype in (torch.float32, torch.float64):
        common = gumbel_of_words(words, dtype).double()
        low, high = torch.zeros(4000, dtype=torch.int64), torch.full((4000,), 2**32)
        while (low < high).any():
            middle = (low + high) // 2
            wins = gumbel_of_words(middle, dtype).double() > common + gap
            low, high = torch.where(wins, middle + 1, low), torch.where(wins, high, middle)
        chance = low.double() / 2**32
        error = chance.std() / math.sqrt(4000)
        assert abs(chance.mean() - 2.0**-28) < 4 * error
        assert error < 0.02 * 2.0**-28


@pytest.mark.slow
def test_rare_category_is_drawn() -> None:
    """4095 categories of probability about 2^-28 beside a common one: 2^20 draws find as many as they should."""
    rare, rows, draws = 4095, 1024, 1024
    logits = torch.full((1, rare + 1), -28 * math.log(2))
    logits[0, 17] = 0.0
    hits = 0
    for seed in range(4):
        index, _ = gumbel_argmax(logits.expand(rows, rare + 1), draws // 4, seed=seed)
        hits += int((index != 17).sum())
    expected = rows * draws * rare * 2.0**-28  # 16
    assert stats.poisson.cdf(hits, expected) > 1e-3
    assert stats.poisson.sf(hits - 1, expected) > 1e-3


@pytest.mark.parametrize("k", [1, 20])
def test_impossible_categories_are_never_drawn(backend: str, k: int) -> None:
    logits = testing.random_tensor((500, 9))
    logits[:, [0, 3, 8]] = -math.inf
    index, log_prob = gumbel_argmax(logits, k, seed=1)
    assert not torch.isin(index, torch.tensor([0, 3, 8])).any()
    assert log_prob.isfinite().all()


def test_gradcheck() -> None:
    logits = testing.random_tensor((4, 6), torch.float64)
    testing.check_gradients(lambda x: gumbel_argmax(x, 3, seed=1)[1], [logits], second=True)


def test_log_prob_is_the_score() -> None:
    """The mean of d log p over the distribution is zero."""
    logits = testing.random_tensor((1, 6), torch.float64).requires_grad_()
    _, log_prob = gumbel_argmax(logits.expand(20_000, 6), 5, seed=1)
    (score,) = torch.autograd.grad(log_prob.mean(), logits)
    assert score.abs().max() < 4 / math.sqrt(100_000)


def test_compile() -> None:
    testing.check_compile(lambda x: gumbel_argmax(x, 3, seed=1)[1], [testing.random_tensor((16, 20))])


def test_opcheck() -> None:
    logits, seed = testing.random_tensor((6, 9)), torch.tensor(3)
    testing.check_opcheck(forward_op, (logits, seed, 5, 3))
    index, log_prob, normaliser = forward_op(logits, seed, 5, 3)
    testing.check_opcheck(backward_op, (log_prob, logits, normaliser, index))


def test_vmap() -> None:
    testing.check_vmap(lambda x: gumbel_argmax(x, 3, seed=1)[1], [testing.random_tensor((3, 4, 5), torch.float64)], [0])


def test_deterministic_and_the_same_on_every_thread_count() -> None:
    logits = testing.random_tensor((700, 129))
    testing.check_deterministic(lambda x: gumbel_argmax(x, 3, seed=1), [logits])
    testing.check_threads(lambda x: gumbel_argmax(x, 3, seed=1), [logits])


GOOD = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 4, dtype=torch.int32),), TypeError, "logits must be float64.*got torch.int32"),
        ((GOOD, 0), ValueError, "k must be at least 1, got 0"),
        ((GOOD, -2), ValueError, "k must be at least 1, got -2"),
        ((GOOD, 1.5), TypeError, "k must be an int, got float"),
        ((GOOD, 1, 2), ValueError, r"dim must lie in \[-2, 1\].*got 2"),
        ((torch.zeros(3, 0),), ValueError, "logits must have a category in dimension 1"),
        ((torch.full((2, 3), -math.inf),), ValueError, "2 rows of -inf alone, the first is row 0"),
        ((torch.tensor(0.0),), ValueError, "at least one dimension"),
    ],
)
def test_bad_input(backend: str, arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gumbel_argmax(*arguments)


def test_memory_is_that_of_the_result() -> None:
    """64 samples of each of 2000 rows over 4000 categories: the noise alone would be 2 GB."""
    logits: Tensor = testing.random_tensor((2000, 4000))
    with torch.profiler.profile(profile_memory=True) as profile:
        gumbel_argmax(logits, 64, seed=1)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < 8 * 2000 * 64 * 4
