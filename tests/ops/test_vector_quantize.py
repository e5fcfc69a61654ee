"""vector_quantize: the nearest code, its gradients, and codes that follow their vectors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowkernels as fk
from flowkernels import testing
from flowkernels.nn import VectorQuantizer
from flowkernels.ops import nearest_code, vector_quantize, vector_quantize_ema_
from flowkernels.ops.vector_quantize import code_sums
from flowkernels.ops.vector_quantize.autograd import backward_op, forward_op, nearest_op, sums_op

every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SIZES = [
    (0, 3, 4),
    (1, 1, 1),
    (5, 7, 1),
    (33, 20, 17),
    (64, 16, 32),
    (100, 1000, 3),
    (17, 33, 129),
    (1031, 5, 64),
]


def data(n: int, k: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return testing.random_tensor((n, d), dtype), testing.random_tensor((k, d), dtype, seed=1)


def gaps(x: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    """How much farther than the nearest code the chosen one is, in squared distance, calculated in float64."""
    distance = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    return distance.gather(-1, index[..., None])[..., 0] - distance.amin(-1)


@every_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_nearest(backend: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, codebook = data(*sizes, dtype)
    with testing.poisoned():
        out = vector_quantize(x, codebook)
    assert torch.equal(out.quantized, codebook[out.index])
    assert torch.equal(out.index, nearest_code(x, codebook))
    # |e|^2/2 - x.e of D products is rounded by about sqrt(D) eps of its terms: codes that near may change places.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    scale = (x.double().square().sum(-1).amax() if sizes[0] else torch.tensor(0.0)) + codebook.double().square().sum(
        -1
    ).amax()
    assert (gaps(x, codebook, out.index) <= 2 * eps * math.sqrt(sizes[2]) * scale).all()


@every_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, codebook = data(*sizes, dtype)
    with fk.use_backend("reference"):
        fixed = nearest_code(x.double(), codebook.double())
    if not torch.equal(nearest_code(x, codebook), fixed):
        pytest.skip("two codes are equally near in this dtype")
    testing.check_against_reference(
        lambda x, c: vector_quantize(x, c, commitment=0.3, codebook_weight=0.7)[::2], [x, codebook]
    )


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_and_dims(backend: str, layout: str) -> None:
    x = testing.random_tensor((4, 6, 5, 9), layout=layout)
    for dim in range(4):
        codebook = testing.random_tensor((11, x.shape[dim]), seed=1)
        out = vector_quantize(x, codebook, dim=dim)
        flat = vector_quantize(x.movedim(dim, -1).contiguous(), codebook.contiguous())
        assert torch.equal(out.index, flat.index)
        assert torch.equal(out.quantized, flat.quantized.movedim(-1, dim))
        torch.testing.assert_close(out.loss, flat.loss)
    strided = testing.with_layout(testing.random_tensor((11, 9), seed=1), layout)
    assert torch.equal(vector_quantize(x, strided).index, vector_quantize(x, strided.contiguous()).index)


def test_gradients_are_those_of_the_paper(backend: str) -> None:
    x, codebook = (t.requires_grad_() for t in data(40, 9, 5))
    out = vector_quantize(x, codebook, commitment=0.25)
    e = codebook[out.index]
    loss = (x.detach() - e).square().sum(-1) + 0.25 * (x - e.detach()).square().sum(-1)
    torch.testing.assert_close(out.loss, loss)
    weight = testing.random_tensor((40, 5), torch.float64, seed=3)
    got = torch.autograd.grad((out.quantized * weight).sum() + out.loss.square().sum(), (x, codebook))
    expected = torch.autograd.grad((x * weight).sum() + loss.square().sum(), (x, codebook))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_second_derivative_is_plain_pytorchs() -> None:
    results = []
    for name in ("auto", "reference"):
        x, codebook = (t.requires_grad_() for t in data(20, 6, 4))
        with fk.use_backend(name):
            out = vector_quantize(x, codebook)
            first = torch.autograd.grad(out.loss.square().sum(), (x, codebook), create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, codebook)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_equal_codes_take_the_first(backend: str) -> None:
    codebook = torch.zeros(40, 3)
    codebook[5:] = 1.0
    assert nearest_code(torch.tensor([[0.1, 0, 0], [0.9, 1, 1]]), codebook).tolist() == [0, 5]


def test_nan_shows_in_the_loss(backend: str) -> None:
    x, codebook = data(6, 4, 3)
    x[2, 1] = math.nan
    assert vector_quantize(x, codebook).loss.isnan().tolist() == [False, False, True, False, False, False]


def test_how_pytorch_may_call_it() -> None:
    x, codebook = data(50, 20, 7, torch.float32)
    call = lambda x, c: vector_quantize(x, c)  # noqa: E731
    testing.check_compile(lambda x, c: vector_quantize(x, c)[::2], [x, codebook])
    testing.check_deterministic(call, [x, codebook])
    testing.check_threads(call, [x, codebook])
    batch = testing.random_tensor((3, 4, 7), torch.float64)
    testing.check_vmap(lambda x, c: vector_quantize(x, c)[::2], [batch, codebook.double()], [0, None])
    _, index, distance = forward_op(x, codebook)
    testing.check_opcheck(forward_op, (x, codebook))
    testing.check_opcheck(nearest_op, (x, codebook))
    testing.check_opcheck(backward_op, (x, distance, x, codebook, index, 0.25, 1.0, True))
    testing.check_opcheck(sums_op, (x, index, 20))


def test_sums_and_moving_average(backend: str) -> None:
    x, codebook = data(300, 12, 5)
    index = nearest_code(x, codebook)
    sums, counts = code_sums(x, index, 12)
    for k in range(12):
        torch.testing.assert_close(sums[k], x[index == k].sum(0))
        assert counts[k] == (index == k).sum()
    # Without memory, every code with vectors lands on their mean: a step of k-means.
    moved, n, s = codebook.clone(), torch.zeros(12, dtype=torch.float64), torch.zeros_like(codebook)
    vector_quantize_ema_(moved, n, s, x, index, decay=0.0, epsilon=0.0)
    for k in range(12):
        if counts[k]:
            torch.testing.assert_close(moved[k], x[index == k].mean(0))
    # With memory, by the formula.
    n, s = torch.ones(12, dtype=torch.float64), codebook.clone()
    vector_quantize_ema_(moved, n, s, x, index, decay=0.9, epsilon=1e-5)
    torch.testing.assert_close(n, 0.9 + 0.1 * counts)
    torch.testing.assert_close(s, 0.9 * codebook + 0.1 * sums)
    smoothed = (n + 1e-5) / (n.sum() + 12e-5) * n.sum()
    torch.testing.assert_close(moved, s / smoothed[:, None])


@pytest.mark.parametrize("decay", [0.9, None])
def test_quantizer_finds_clusters(decay: float | None) -> None:
    centres = 5 * testing.random_tensor((8, 3), seed=2)
    quantizer = VectorQuantizer(8, 3, decay=decay, revive=0.5)
    with torch.no_grad():
        quantizer.codebook.copy_(centres + 0.3 * testing.random_tensor((8, 3), seed=3))
        if decay:
            quantizer.sums.copy_(quantizer.codebook)
    optimizer = None if decay else torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for step in range(150):
        x = centres.repeat(20, 1) + 0.05 * testing.random_tensor((160, 3), seed=step)
        loss = quantizer(x).loss.mean()
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.cdist(centres, quantizer.codebook).amin(-1).max() < 0.1
    assert quantizer.perplexity() > 7.5


def test_quantizer_revives_dead_codes_and_rests_in_eval() -> None:
    quantizer = VectorQuantizer(4, 2, decay=0.5, revive=0.1)
    quantizer.codebook[3] = 1e6
    x = testing.random_tensor((64, 2))
    for _ in range(8):
        quantizer(x)
    assert quantizer.codebook[3].abs().max() < 10
    quantizer.eval()
    before = quantizer.codebook.clone()
    quantizer(x)
    assert torch.equal(before, quantizer.codebook)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), quantizer(x).quantized)


def _batches(rank: int) -> list[Tensor]:
    """Of different sizes, and from different places."""
    return [
        testing.random_tensor((40 + 20 * rank, 3), torch.float64, seed=10 * step + rank) + 3 * rank for step in range(4)
    ]


def _quantizers(synchronize: bool = True) -> dict[str, VectorQuantizer]:
    torch.manual_seed(0)
    kinds: dict[str, dict[str, Any]] = {"follows": {}, "revives": {"revive": 0.9}, "learns": {"decay": None}}
    return {
        kind: VectorQuantizer(50, 3, **{"decay": 0.5, **options}, synchronize=synchronize).double()
        for kind, options in kinds.items()
    }


def _rank(rank: int, world: int, path: Path, queue: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    results = {}
    for synchronize in (True, False):
        for kind, quantizer in _quantizers(synchronize).items():
            for x in _batches(rank):
                quantizer(x)
            results[kind, synchronize] = {name: t.tolist() for name, t in quantizer.state_dict().items()}
    queue.put((rank, results))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_codes_follow_the_vectors_of_all_ranks(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_rank, args=(r, 2, tmp_path / "store", queue)) for r in range(2)]
    for w in workers:
        w.start()
    ranks = [result for _, result in sorted((queue.get(timeout=120) for _ in workers), key=lambda r: r[0])]
    for w in workers:
        w.join()
    alone = _quantizers()
    for kind, quantizer in alone.items():
        assert ranks[0][kind, True] == ranks[1][kind, True]
        assert ranks[0][kind, False] != ranks[1][kind, False]
        for batches in zip(_batches(0), _batches(1), strict=True):
            quantizer(torch.cat(batches))
        if kind != "revives":  # that draws
            for name, expected in quantizer.state_dict().items():
                torch.testing.assert_close(torch.tensor(ranks[0][kind, True][name], dtype=torch.float64), expected)


GOOD, BOOK = torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(3, 4, dtype=torch.int64), BOOK), {}, TypeError, "x must be float64"),
        ((GOOD, BOOK.double()), {}, TypeError, "codebook has dtype torch.float64, but x has torch.float32"),
        ((GOOD, torch.zeros(4)), {}, ValueError, "codebook must have shape"),
        ((GOOD, torch.zeros(0, 4)), {}, ValueError, "codebook must have shape"),
        ((GOOD, torch.zeros(5, 3)), {}, ValueError, r"codebook must have shape \(5, 4\)"),
        ((GOOD, BOOK), {"dim": 2}, ValueError, "dim must lie in"),
        ((GOOD, BOOK), {"commitment": -1.0}, ValueError, "commitment must be at least 0"),
        ((GOOD, BOOK), {"codebook_weight": math.nan}, ValueError, "codebook_weight must be at least 0"),
        ((GOOD, BOOK), {"commitment": "1"}, TypeError, "commitment must be a number"),
    ],
)
def test_bad_input(backend: str, arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vector_quantize(*arguments, **options)


def test_memory_holds_no_distances() -> None:
    x, codebook = data(8192, 1024, 64, torch.float32)

    def allocated(call) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())

    theirs = allocated(lambda: torch.cdist(x, codebook).argmin(-1))
    assert allocated(lambda: nearest_code(x, codebook)) <= theirs / 20
