"""The random streams: known answers, distributions, seeds."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.checkpoint import checkpoint

import flowkernels as fk
from flowkernels import random as fkr
from flowkernels import testing
from flowkernels.objectives import elbo_discrete

BACKENDS = fk.available_backends()

# Random123's published answers for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def signed(low, high):
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(backend, counter, key, answer):
    op = fkr.reference_noise if backend == "reference" else fkr.noise_op
    words = op(torch.tensor(signed(*key)), signed(*counter[2:]), signed(*counter[:2]), 4, 0, False)
    assert words.tolist() == answer


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("kind", ["bits", "uniform", "normal", "gumbel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 65, 4097, 100_003])
def test_same_noise_on_every_backend(backend, kind, dtype, count):
    source = fkr.Stream(torch.tensor(-(2**40) - 12345), 7 << 32 | 3)
    with fk.use_backend("reference"):
        expected = fkr.noise(kind, source, count, dtype)
        exact = fkr.noise(kind, source, count, torch.float64)
    with fk.use_backend(backend):
        got = fkr.noise(kind, source, count, dtype)
    assert got.shape == (count,)
    if kind in ("bits", "uniform"):
        assert torch.equal(got, expected)
    elif dtype == torch.float64:
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    elif kind == "gumbel":
        # In float32 v itself is rounded, on every backend alike: what is left is a few ulp of E, absolute errors of g.
        torch.testing.assert_close(got, expected, rtol=2e-7, atol=5e-7)
    else:
        # log v0 near v0 = 1 sees the rounding of v0, again alike; sine and cosine err by an ulp of 1 times the radius.
        torch.testing.assert_close(got, expected, rtol=3e-7, atol=1e-6)
        assert (got - exact).abs().max() < 3e-4 if count else True


def test_elements_are_independent_of_the_count(backend):
    long, short = fkr.gumbel(1000, seed=5), fkr.gumbel(77, seed=5)
    assert torch.equal(long[:77], short)


def test_blocks_past_32_bits(backend):
    op = fkr.reference_noise if backend == "reference" else fkr.noise_op
    seed = torch.tensor(9)
    across = op(seed, 0, 2**32 - 1, 8, 0, False)
    assert torch.equal(across[4:], op(seed, 0, 2**32, 4, 0, False))
    assert not torch.equal(across[4:], op(seed, 0, 0, 4, 0, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_words_stay_finite(dtype):
    edge = torch.tensor([0, 1, 2**32 - 2, 2**32 - 1, 2**31])
    v = fkr.uniform_of_words(edge, dtype)
    assert ((v > 0) & (v < 1)).all()
    g = fkr.gumbel_of_words(edge, dtype)
    assert g.isfinite().all()
    assert g[0].item() == pytest.approx(33 * math.log(2), abs=1e-5)  # +22.87
    pairs = torch.cartesian_prod(edge, edge)
    assert fkr.normal_of_words(pairs, dtype).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "law"), [("uniform", stats.uniform), ("normal", stats.norm), ("gumbel", stats.gumbel_r)]
)
def test_distribution(backend, kind, law, dtype):
    n = 1 << 20
    x = getattr(fkr, kind)(n, seed=2024, dtype=dtype).double().numpy()
    # One fixed seed: the test is deterministic, and 1e-3 leaves no luck to hide behind.
    assert stats.kstest(x, law.cdf).pvalue > 1e-3
    # chi-square over 4096 cells of equal probability, which sees unevenness where the KS distance does not.
    cells = np.clip((law.cdf(x) * 4096).astype(int), 0, 4095)
    assert stats.chisquare(np.bincount(cells, minlength=4096)).pvalue > 1e-3
    # Both tails beyond what happens 2^-14 of the time.
    for tail in (law.sf(x), law.cdf(x)):
        assert stats.binomtest(int((tail < 2.0**-14).sum()), n, 2.0**-14).pvalue > 1e-3


def test_neighbours_are_uncorrelated(backend):
    x = fkr.normal(1 << 20, seed=3, dtype=torch.float64)
    for lag in range(1, 9):
        assert (x[lag:] * x[:-lag]).mean().abs() < 4 / 2**10
    squares = x.square() - 1
    for lag in range(1, 9):
        assert (squares[lag:] * squares[:-lag]).mean().abs() < 4 * 2 / 2**10


def test_gumbel_tail_by_enumeration():
    """P(g > t) counted over all 2^32 words: the mapping falls monotonically, so the count is found by bisection."""
    for dtype in (torch.float32, torch.float64):
        for t in (2.0, 5.0, 10.0, 16.7, 19.4, 21.0):
            low, high = 0, 2**32  # words below `low` give g > t
            while low < high:
                middle = (low + high) // 2
                above = fkr.gumbel_of_words(torch.tensor([middle]), dtype).item() > t
                low, high = (middle + 1, high) if above else (low, middle)
            true = -math.expm1(-math.exp(-t))
            # Exact up to the words' granularity of half a word, and float32's rounding of v.
            assert abs(low - true * 2**32) <= 0.5 + 3e-7 * true * 2**32


def test_torch_manual_seed_reproduces(backend):
    torch.manual_seed(11)
    a, b = fkr.normal(100), fkr.normal(100)
    torch.manual_seed(11)
    assert torch.equal(a, fkr.normal(100))
    assert not torch.equal(a, b)
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(a, fkr.normal(100, seed=generator))


def test_explicit_seeds(backend):
    assert torch.equal(fkr.gumbel(9, seed=4), fkr.gumbel(9, seed=torch.tensor(4)))
    assert torch.equal(fkr.gumbel(9, seed=2**64 - 1), fkr.gumbel(9, seed=-1))
    assert not torch.equal(fkr.gumbel(9, seed=4), fkr.gumbel(9, seed=5))


def test_shapes_and_dtypes(backend):
    assert fkr.uniform(2, 3, seed=0).shape == fkr.uniform((2, 3), seed=0).shape == (2, 3)
    assert fkr.uniform(seed=0).shape == ()
    assert fkr.gumbel(5, seed=0, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert fkr.bits(5, seed=0).dtype == torch.int64


def test_ranks_draw_different_streams(monkeypatch):
    def drawn(rank):
        monkeypatch.setattr(fkr, "_rank", lambda: rank)
        torch.manual_seed(0)
        return fkr.normal(64)

    assert not torch.equal(drawn(0), drawn(1))
    assert torch.equal(drawn(1), drawn(1))
    monkeypatch.setattr(fkr, "_rank", lambda: 1)
    explicit = fkr.normal(64, seed=3)
    monkeypatch.setattr(fkr, "_rank", lambda: 0)
    assert torch.equal(explicit, fkr.normal(64, seed=3))  # an explicit seed means the same everywhere


def _worker(rank, world, path, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(0)
    number = fkr.draw_stream().number
    logits, vae, mixture = torch.zeros(32, 4), fk.models.DiscreteVAE(16, 2, 3), fk.models.GaussianMixture(2, 3)
    drawn = {}
    for name, draw in {
        "normal": lambda: fkr.normal(8),
        "gumbel_softmax": lambda: fk.ops.gumbel_softmax(logits),
        "compiled": torch.compile(lambda: fk.ops.gumbel_softmax(logits), fullgraph=True, backend="aot_eager"),
        "gumbel_argmax": lambda: fk.ops.gumbel_argmax(logits)[0],
        "straight_through": lambda: fk.ops.straight_through(logits + 0.5, sample=True),
        "latents of a VAE": lambda: vae.sample(32),
        "components of a mixture": lambda: mixture.sample(32),
        "seeded": lambda: fkr.normal(8, seed=3),
    }.items():
        torch.manual_seed(0)
        drawn[name] = draw().tolist()
    queue.put((rank, number, drawn))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_ranks_of_a_process_group(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(r, 2, tmp_path / "store", queue)) for r in range(2)]
    for w in workers:
        w.start()
    results = sorted(queue.get(timeout=120) for _ in workers)
    for w in workers:
        w.join()
    assert [r[1] >> 32 for r in results] == [0, 1]
    one, other = (r[2] for r in results)
    assert [name for name in one if one[name] == other[name]] == ["seeded"]


def test_compiles_without_a_graph_break():
    @torch.compile(fullgraph=True)
    def noise(x):
        return x + fkr.gumbel(64)

    x = torch.zeros(64)
    torch.manual_seed(5)
    a, b = noise(x), noise(x)
    torch.manual_seed(5)
    assert torch.equal(a, noise(x))
    assert not torch.equal(a, b)


WEIGHT = testing.random_tensor((8, 12), seed=1)
DRAWING = {
    "gumbel_softmax": lambda x: fk.ops.gumbel_softmax(x, 0.5),
    "gumbel_softmax, hard": lambda x: fk.ops.gumbel_softmax(x, 0.5, hard=True),
    "gumbel_argmax": lambda x: fk.ops.gumbel_argmax(x, 12)[1],
    "straight_through": lambda x: x * fk.ops.straight_through(x.softmax(-1), "categorical", sample=True),
    "dequantize": lambda x: x * fk.ops.dequantize(x.detach().abs().floor(), 17)[0],
    "elbo_discrete": lambda x: elbo_discrete(
        x.reshape(8, 3, 4), lambda z: (z.flatten(-2) * WEIGHT).sum(-1).square(), estimator="rebar", tau=0.5
    )[:, None],
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("draw", DRAWING.values(), ids=DRAWING)
def test_recomputation_sees_the_noise_of_the_forward(draw, compiled):
    """Activation checkpointing: values and gradients as without it, for noise drawn from torch's generator."""
    torch.compiler.reset()

    def again(x):
        return checkpoint(lambda x: draw(2 * x), x, use_reentrant=False) * WEIGHT

    x = testing.random_tensor((8, 12)).requires_grad_()
    torch.manual_seed(5)
    value = (torch.compile(again, fullgraph=True, backend="aot_eager") if compiled else again)(x)
    (grad,) = torch.autograd.grad(value.sum(), x)
    torch.manual_seed(5)
    expected = draw(2 * x) * WEIGHT
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_threads_do_not_change_the_noise():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fkr.normal(300_001, seed=1)
        torch.set_num_threads(3)
        assert torch.equal(one, fkr.normal(300_001, seed=1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fkr.normal(3, seed="no"), TypeError, "seed"),
        (lambda: fkr.normal(3, seed=True), TypeError, "seed"),
        (lambda: fkr.normal(3, seed=2**64), ValueError, "seed"),
        (lambda: fkr.normal(3, seed=torch.tensor(1.0)), ValueError, "seed"),
        (lambda: fkr.normal(3, seed=torch.tensor([1, 2])), ValueError, "seed"),
        (lambda: fkr.normal(-3, seed=1), ValueError, "size"),
        (lambda: fkr.normal(3, seed=1, dtype=torch.int64), TypeError, "dtype"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_opcheck():
    torch.library.opcheck(fkr.noise_op, (torch.tensor(3), 1 << 32, 5, 1001, 3, False))
