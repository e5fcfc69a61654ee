"""straight_through: hard values, identity gradients."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

import flowkernels as fk
from flowkernels import testing
from flowkernels.ops import straight_through
from flowkernels.ops.straight_through.autograd import forward_op

KINDS = ("threshold", "categorical")
every_kind = pytest.mark.parametrize("kind", KINDS)
sampled = pytest.mark.parametrize("sample", [False, True], ids=["rounded", "sampled"])
SHAPES = dict(testing.SHAPES) | {"long": (3, 4097), "longer": (2, 9001)}


@every_kind
@sampled
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, kind: str, sample: bool) -> None:
    x = testing.random_tensor(shape, dtype).sigmoid().requires_grad_()
    with testing.poisoned():
        y = straight_through(x, kind, sample=sample, seed=3)
    with fk.use_backend("reference"):
        expected = straight_through(x, kind, sample=sample, seed=3)
    assert torch.equal(y, expected)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert ((y == 0) | (y == 1)).all()
    weight = testing.random_tensor(shape, dtype, seed=1)
    (grad,) = torch.autograd.grad(y, x, weight)
    assert torch.equal(grad, weight)


@every_kind
@sampled
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_and_dims(kind: str, sample: bool, layout: str) -> None:
    x = testing.with_layout(testing.random_tensor((5, 6, 19)).sigmoid(), layout)
    for dim in (0, 1, -1):
        y = straight_through(x, kind, sample=sample, dim=dim, seed=1)
        with fk.use_backend("reference"):
            assert torch.equal(y, straight_through(x, kind, sample=sample, dim=dim, seed=1))
        if kind == "categorical":
            assert (y.sum(dim) == 1).all()


def test_threshold_and_ties(backend: str) -> None:
    x = torch.tensor([0.2, 0.5, 0.50001, -1.0, math.inf, -math.inf])
    assert straight_through(x).tolist() == [0, 0, 1, 0, 1, 0]
    assert straight_through(x, threshold=-2.0).tolist() == [1, 1, 1, 1, 1, 0]
    ties = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert straight_through(ties, "categorical").tolist() == [[0, 1, 0], [1, 0, 0]]


def test_frequencies(backend: str) -> None:
    p = torch.tensor([0.0, 0.1, 0.5, 0.93, 1.0])
    n = 100_000
    hits = straight_through(p.expand(n, 5), sample=True, seed=4).sum(0)
    assert hits[0] == 0
    assert hits[4] == n
    for count, chance in zip(hits[1:4], p[1:4], strict=True):
        assert stats.binomtest(int(count), n, float(chance)).pvalue > 1e-3
    weights = torch.tensor([1.0, 5.0, 0.0, 3.0])  # not normalised
    drawn = straight_through(weights.expand(n, 4), "categorical", sample=True, seed=4).sum(0)
    assert drawn[2] == 0
    assert stats.chisquare(drawn[[0, 1, 3]], n * weights[[0, 1, 3]] / 9).pvalue > 1e-3


@every_kind
def test_nan_stays_visible(backend: str, kind: str) -> None:
    x = testing.random_tensor((3, 20)).sigmoid()
    x[1, 18] = math.nan
    for sample in (False, True):
        bad = straight_through(x, kind, sample=sample, seed=1).isnan()
        assert bad[1, 18]
        assert not bad[[0, 2]].any()


def test_a_row_without_a_distribution_is_nan(backend: str) -> None:
    assert straight_through(torch.zeros(2, 3), "categorical", sample=True, seed=1).isnan().all()


@every_kind
@sampled
def test_how_pytorch_may_call_it(kind: str, sample: bool) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return straight_through(x, kind, sample=sample, seed=1)

    x = testing.random_tensor((40, 33)).sigmoid()
    testing.check_compile(call, [x])
    testing.check_deterministic(call, [x])
    testing.check_threads(call, [x])
    testing.check_vmap(call, [testing.random_tensor((2, 3, 4), torch.float64).sigmoid()], [0])
    seed = torch.tensor(1) if sample else None
    testing.check_opcheck(forward_op, (x, seed, 0, KINDS.index(kind), 0.5))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(3, dtype=torch.int64),), {}, TypeError, "x must be float64"),
        (
            (torch.zeros(3), "round"),
            {},
            ValueError,
            "kind must be one of threshold, categorical, got 'round'",
        ),
        ((torch.zeros(3),), {"threshold": math.nan}, ValueError, "threshold must be a number"),
        ((torch.zeros(3), "categorical"), {"dim": 1}, ValueError, r"dim must lie in \[-1, 0\]"),
        ((torch.zeros(3, 0), "categorical"), {}, ValueError, "x must have a category"),
        ((torch.zeros(()), "categorical"), {}, ValueError, "at least one dimension"),
    ],
)
def test_bad_input(backend: str, arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        straight_through(*arguments, **options)
