"""Transforms that follow one another go in one call: nflows' composites and zuko's composed transforms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.integrations import _chain, describe
from tests.integrations.harness import (
    assert_close_as_peer,
    assert_same,
    assert_same_error,
    counting,
    life,
    outcome,
    randomise,
)

pytest.importorskip("nflows")
pytest.importorskip("zuko")
import zuko
from nflows import transforms
from nflows.distributions import StandardNormal
from nflows.flows import Flow

pytestmark = pytest.mark.peers

MAF = transforms.MaskedAffineAutoregressiveTransform
NSF = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many transforms each call of the operator from a chain stood for."""
    lengths: list[int] = []
    original = _chain.run_chain

    def counted(x: Tensor, steps: Any) -> Any:
        lengths.append(len(steps))
        return original(x, steps)

    monkeypatch.setattr(_chain, "run_chain", counted)
    return lengths


def composite(*parts: str, features: int = 5, context: int | None = None, seed: int = 0) -> Any:
    """A composite of: m a MAF, s a spline, p a random permutation, r a reversal, b batch norm, i an inverse, c a
    composite of two."""
    torch.manual_seed(seed)

    def made(part: str) -> nn.Module:
        if part == "s":
            return NSF(features, 12, num_bins=4, tails="linear", tail_bound=3.0, context_features=context)
        return MAF(features, 12, context_features=context, use_residual_blocks=False, num_blocks=1)

    kinds: dict[str, Any] = {
        "m": lambda: made("m"),
        "s": lambda: made("s"),
        "p": lambda: transforms.RandomPermutation(features),
        "r": lambda: transforms.ReversePermutation(features),
        "b": lambda: transforms.BatchNorm(features),
        "i": lambda: transforms.InverseTransform(made("m")),
        "c": lambda: transforms.CompositeTransform([made("m"), transforms.RandomPermutation(features), made("m")]),
    }
    model = transforms.CompositeTransform([kinds[part]() for part in parts]).double()
    randomise(model, seed)
    return model.eval()


def ways(m: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [*m(*inputs), *m.inverse(*inputs)]


def there_and_back(m: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [*m(inputs[0]), *m.inverse(inputs[1])]


@pytest.mark.parametrize(
    ("parts", "lengths"),
    [
        ("mm", [2]),
        ("pm", [1]),
        ("mr", [1]),
        ("pmpmp", [2]),
        ("rmrmrm", [3]),
        ("mprmppm", [3]),  # permutations that follow one another
        ("msm", [3]),
        ("pspms", [3]),
        ("bmpmbpmb", [2, 1]),  # runs between what stays
        ("imm", [2]),
        ("mcpm", [2, 1]),  # a composite inside
    ],
)
@pytest.mark.parametrize("context", [None, 3])
def test_runs(parts: str, lengths: list[int], context: int | None, calls: list[int]) -> None:
    peer = composite(*parts, context=context)
    fast = fk.accelerate(copy.deepcopy(peer))
    x = [torch.randn(6, 5, dtype=torch.double)]
    if context:
        x.append(torch.randn(6, context, dtype=torch.double))
    assert_same(outcome(fast, ways, x), outcome(peer, ways, x))
    assert sorted(calls) == sorted(2 * lengths)
    assert_same(outcome(fast, ways, x, grad=False), outcome(peer, ways, x, grad=False))


def test_float32() -> None:
    peer = composite(*"pmrmpm", features=20).float()
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(64, 20)
    with torch.no_grad():
        z = peer(x)[0]
    assert_close_as_peer(peer, fast, there_and_back, [x, z])


def test_another_device_leaves_the_order_alone(calls: list[int]) -> None:
    peer = composite(*"mpm")
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(6, 5, dtype=torch.double)
    assert_same_error(peer, fast, lambda m: m(x.to("meta")))
    assert_same(fast(x), peer(x))
    assert calls == [2]


def test_what_is_the_identity_costs_nothing(calls: list[int]) -> None:
    """Two reversals undo each other: nothing is permuted at the end."""
    fast = fk.accelerate(composite(*"rmrm"))
    fast(torch.randn(3, 5, dtype=torch.double))
    (run,) = fast._flowkernels.data.parts
    assert run.order is None
    assert calls == [2]


def test_life() -> None:
    life(
        lambda: composite(*"pmrsm"),
        ways,
        [torch.randn(4, 5, dtype=torch.double)],
        lambda m: hasattr(m, "_flowkernels"),
    )


def test_explained() -> None:
    entries = describe(composite(*"rmrm"))
    assert entries[0].what.startswith("can be accelerated: autoregressive transforms that follow one another")
    assert [e.name for e in entries if e.what.startswith("can")] == ["", "_transforms.1", "_transforms.3"]
    entries = describe(composite(*"mbm"))
    assert entries[0].what == "left: no autoregressive transform or permutation follows another in it"


def test_children_that_change(calls: list[int]) -> None:
    peer = composite(*"mpmpm")
    fast: Any = fk.accelerate(copy.deepcopy(peer))
    x = [torch.randn(4, 5, dtype=torch.double)]
    assert_same(outcome(fast, ways, x), outcome(peer, ways, x))

    def check(expected: list[int], what: str) -> None:
        calls.clear()
        assert_same(outcome(fast, ways, x), outcome(peer, ways, x), what)
        assert sorted(calls) == sorted(2 * expected), what

    for m in (peer, fast):
        m._transforms[1]._permutation.copy_(torch.tensor([4, 2, 0, 1, 3]))
    check([3], "a permutation written to")
    for m in (peer, fast):
        m._transforms[3] = transforms.ReversePermutation(5)
    check([3], "a permutation replaced")
    other = composite("m", seed=5)._transforms[0]
    for m in (peer, fast):
        m._transforms[2] = copy.deepcopy(other)
    check([1, 1], "a child that is not accelerated")
    fk.accelerate(fast)
    check([3], "accelerated again")
    fk.deaccelerate(fast._transforms[0])
    check([2], "one child restored")
    for m in (peer, fast):
        m._transforms.append(transforms.BatchNorm(5).double().eval())
    check([2], "one child more")
    del fast._transforms[0], peer._transforms[0]
    check([2], "one child less")
    for m in (peer, fast):
        m._transforms.append(copy.deepcopy(other))
    fk.accelerate(fast)
    check([2], "one more after one less")
    whole = composite(*"rmm", seed=6)
    for m in (peer, fast):
        m._transforms = copy.deepcopy(whole._transforms)
    fk.accelerate(fast)
    check([2], "another list of children")


def test_hooks_of_children_run() -> None:
    fast: Any = fk.accelerate(composite(*"mpm"))
    peer = composite(*"mpm")
    x = torch.randn(4, 5, dtype=torch.double)
    for child in (0, 1):
        seen: list[Any] = []
        handle = fast._transforms[child].register_forward_hook(lambda *a, seen=seen: seen.append(a[2][0]))
        assert_same(fast(x), peer(x))
        assert len(seen) == 1
        handle.remove()


def test_batch_norm_in_training_sees_each_batch_once(calls: list[int]) -> None:
    peer = composite(*"mpmbmpm").train()
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(8, 5, dtype=torch.double)
    assert_same(fast(x), peer(x))
    assert calls == [2, 2]
    assert_same(list(fast.state_dict().values()), list(peer.state_dict().values()))


def test_bad_input() -> None:
    peer = composite(*"pmrm")
    fast = fk.accelerate(copy.deepcopy(peer))
    for x in (
        torch.randn(3, 4, dtype=torch.double),
        torch.randn(3, 5),
        torch.randn(5, dtype=torch.double),
        torch.randn(3, 5, 2, dtype=torch.double),
        torch.ones(3, 5, dtype=torch.long),
        None,
    ):
        assert_same_error(peer, fast, lambda m, x=x: m(x))
        assert_same_error(peer, fast, lambda m, x=x: m.inverse(x))
    peer._transforms.insert(1, transforms.ReversePermutation(7))
    fast._transforms.insert(1, transforms.ReversePermutation(7))
    assert_same_error(peer, fast, lambda m: m(torch.randn(3, 5, dtype=torch.double)))


def test_other_dtypes_and_transforms_of_functions() -> None:
    peer = composite(*"pmrm")
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(3, 5, dtype=torch.double)
    assert_same(
        [torch.func.vmap(lambda row: fast(row[None])[0])(x)], [torch.func.vmap(lambda row: peer(row[None])[0])(x)]
    )
    half, rows = fast.bfloat16(), x.bfloat16()
    assert half(rows)[0].dtype == torch.bfloat16


def test_a_flow_of_permutations_and_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    peer = Flow(composite(*"mrmrm"), StandardNormal([5])).double()
    fast: Any = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(7, 5, dtype=torch.double)
    with counting(monkeypatch) as counts:
        assert_same([fast.log_prob(x)], [peer.log_prob(x)])
        assert counts == {"forward": 3, "inverse": 0}
    drawn = []
    for m in (fast, peer):
        torch.manual_seed(1)
        drawn.append(m.double()._transform.inverse(torch.randn(6, 5, dtype=torch.double)))
    assert_same(*drawn)


# ---- zuko ----------------------------------------------------------------------------------------------------------


def zuko_flow(kind: str, context: int = 0) -> Any:
    torch.manual_seed(0)
    made = getattr(zuko.flows, kind)(4, context, transforms=3, hidden_features=(16, 16)).double()
    randomise(made)
    return made


def zuko_ways(m: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    x, *context = inputs
    flow = m(*context)
    transform = flow.transform
    z, ladj = transform.call_and_ladj(x)
    back, ladj_back = transform.inv.call_and_ladj(x)
    torch.manual_seed(2)
    return [
        *(z, ladj, back, ladj_back, transform(x), transform.inv(x), transform._inverse(x)),
        *(transform.log_abs_det_jacobian(x, z), transform.inv.inv(x), flow.log_prob(x)),
        *(flow.rsample((2,)), *flow.rsample_and_log_prob((3,))),
    ]


@pytest.mark.parametrize("kind", ["MAF", "NSF"])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("batch", [(6,), (), (3, 2)])
def test_zuko(kind: str, context: int, batch: tuple[int, ...], calls: list[int]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        peer = zuko_flow(kind, context)
        fast = fk.accelerate(copy.deepcopy(peer))
        inputs = [torch.randn(*batch, 4, dtype=torch.double)]
        if context:
            inputs.append(torch.randn(*batch, context, dtype=torch.double))
        assert_same(outcome(fast, zuko_ways, inputs), outcome(peer, zuko_ways, inputs))
        assert set(calls) == {3}
        assert type(fast(*inputs[1:]).transform).__name__ == "ComposedTransform"
        assert repr(fast(*inputs[1:]).transform) == repr(peer(*inputs[1:]).transform)
        assert isinstance(fast(*inputs[1:]).transform, zuko.transforms.ComposedTransform)
    finally:
        torch.set_default_dtype(torch.float32)


def test_zuko_with_other_parts(calls: list[int]) -> None:
    """A composed transform that holds anything else goes part by part."""
    peer = zuko_flow("MAF")
    peer.transform.transforms.insert(1, zuko.lazy.UnconditionalTransform(zuko.transforms.SoftclipTransform))
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(5, 4, dtype=torch.double)
    assert_same([fast().log_prob(x)], [peer().log_prob(x)])
    assert calls == []


# ---- normflows -----------------------------------------------------------------------------------------------------


def normflows_model(parts: str, features: int = 5) -> Any:
    """A normalizing flow of: m a MAF, p a shuffle, w a swap of halves, a an ActNorm."""
    normflows = pytest.importorskip("normflows")
    torch.manual_seed(0)
    flows = normflows.flows
    kinds: dict[str, Any] = {
        "m": lambda: flows.MaskedAffineAutoregressive(features, 12, num_blocks=1, use_residual_blocks=False),
        "p": lambda: flows.Permute(features),
        "w": lambda: flows.Permute(features, mode="swap"),
        "a": lambda: flows.AffineConstFlow(features),
    }
    base = normflows.distributions.DiagGaussian(features, trainable=False)
    model = normflows.NormalizingFlow(base, [kinds[part]() for part in parts]).double()
    randomise(model)
    return model


def normflows_ways(m: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    (x,) = inputs
    torch.manual_seed(2)
    return [
        *(*m.forward_and_log_det(x), *m.inverse_and_log_det(x), m(x), m.inverse(x), m.log_prob(x), m.forward_kld(x)),
        *m.sample(3),
    ]


@pytest.mark.parametrize(("parts", "lengths"), [("mm", [2]), ("mpmpm", [3]), ("pmwmm", [1, 2]), ("amam", [])])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_normflows(parts: str, lengths: list[int], default: torch.dtype, calls: list[int]) -> None:
    torch.set_default_dtype(torch.float64)
    peer = normflows_model(parts)
    torch.set_default_dtype(default)
    try:
        fast = fk.accelerate(copy.deepcopy(peer))
        x = [torch.randn(6, 5, dtype=torch.double)]
        if default == torch.float64:
            assert_same(outcome(fast, normflows_ways, x), outcome(peer, normflows_ways, x))
            assert sorted(calls) == sorted(6 * lengths)
            life(
                lambda: normflows_model(parts),
                normflows_ways,
                x,
                lambda m: any(hasattr(child, "_flowkernels") for child in m.modules()),
            )
        else:  # log-dets come in the default dtype, whatever x has
            for name in ("forward_and_log_det", "inverse_and_log_det"):
                ours, theirs = getattr(fast, name)(*x), getattr(peer, name)(*x)
                assert_same(ours[:1], theirs[:1])
                assert ours[1].dtype == theirs[1].dtype == torch.float32
                torch.testing.assert_close(ours[1], theirs[1])
            for name in ("log_prob", "forward_kld"):
                torch.testing.assert_close(getattr(fast, name)(*x), getattr(peer, name)(*x))
    finally:
        torch.set_default_dtype(torch.float32)


def test_normflows_bad_input() -> None:
    peer = normflows_model("mpm")
    fast = fk.accelerate(copy.deepcopy(peer))
    for x in (torch.randn(3, 4, dtype=torch.double), torch.randn(3, 5), None):
        for name in ("forward", "inverse", "log_prob", "forward_kld"):
            assert_same_error(peer, fast, lambda m, x=x, name=name: getattr(m, name)(x))
