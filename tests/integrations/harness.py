"""What the tests of every integration share: a peer's module and its accelerated copy, run on the same input."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.integrations import _chain, _common

TOLERANCE = 1e-10  # float64, relative to the largest entry; single entries may cancel

Call = Callable[[Any, Sequence[Tensor]], Sequence[Tensor]]

pytestmark = pytest.mark.peers


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights in the range of a trained network: every unit matters, and nothing explodes over many transforms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.3 if p.dim() < 2 else 1.0 / p.shape[-1] ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)


def outcome(model: nn.Module, call: Call, inputs: Sequence[Tensor], *, grad: bool = True) -> list[Tensor]:
    """What `call` gives, then the gradients of a random combination of it: of every input and every parameter."""
    inputs = [t.detach().clone().requires_grad_(grad) for t in inputs]
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.set_grad_enabled(grad):
        outputs = list(call(model, inputs))
    if not grad:
        return outputs
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum() for o in outputs)
    leaves = [*inputs, *parameters]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [o.detach() for o in outputs] + [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)
    ]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], what: str = "") -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, f"{what} result {i}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{what} result {i}: {a.dtype}, expected {b.dtype}"
        if a.numel():
            error = (a - b).abs().max() / b.abs().max().clamp_min(1.0)
            assert error <= TOLERANCE, f"{what} result {i} differs by {error:.2e}"


def assert_close_as_peer(
    peer: nn.Module, fast: nn.Module, call: Call, inputs: Sequence[Tensor], *, grad: bool = False
) -> None:
    """float32: the error against float64 may be twice the peer's own, plus one rounding of the result.

    Both are sums of roundings that happen to differ, so it is their root mean square over the batch that is compared.
    """
    exact = fk.deaccelerate(copy.deepcopy(peer)).double()
    truth = outcome(exact, call, [t.double() for t in inputs], grad=grad)
    theirs, ours = outcome(peer, call, inputs, grad=grad), outcome(fast, call, inputs, grad=grad)
    for i, (a, b, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert a.dtype == b.dtype == torch.float32
        if not a.numel():
            continue
        error, allowed = _rms(a - t), 2 * _rms(b - t) + torch.finfo(torch.float32).eps * _rms(t)
        assert error <= allowed, f"result {i}: error {error:.2e}, allowed {allowed:.2e}"


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts the calls of the operators, so that a test sees whether the kernels ran."""
    counts = {"forward": 0, "inverse": 0}
    original = _common.run_chain

    def counted(x: Tensor, steps: Any) -> Any:
        for step in steps:
            counts["inverse" if step.inverse else "forward"] += 1
        return original(x, steps)

    with monkeypatch.context() as patch:
        for module in (_common, _chain):
            patch.setattr(module, "run_chain", counted)
        yield counts


def life(
    make: Callable[[], nn.Module], call: Call, inputs: Sequence[Tensor], accelerated: Callable[[nn.Module], bool]
) -> None:
    """Through training, state_dict, deepcopy, pickle and back: always the peer's numbers."""
    peer = make()
    fast = fk.accelerate(copy.deepcopy(peer))
    parameters = list(fast.parameters())
    assert accelerated(fast)
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in peer.named_parameters()]
    assert list(fast.state_dict()) == list(peer.state_dict())
    assert repr(fast) == repr(peer)

    def same(a: nn.Module, b: nn.Module, what: str) -> None:
        assert_same(outcome(a, call, inputs), outcome(b, call, inputs), what)
        assert_same(outcome(a, call, inputs, grad=False), outcome(b, call, inputs, grad=False), what)

    same(fast, peer, "before training")
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        for model in (peer, fast):
            step = optimizer(model.parameters(), lr=1e-2)
            sum(o.mean() for o in call(model, inputs)).backward()
            step.step()
            step.zero_grad()
        same(fast, peer, f"after a step of {optimizer.__name__}")
    assert all(a is b for a, b in zip(fast.parameters(), parameters, strict=True))

    other = make()
    randomise(other, seed=7)
    fast.load_state_dict(other.state_dict())
    same(fast, other, "after load_state_dict")
    peer.load_state_dict(fast.state_dict())
    same(fast, peer, "state_dict back")

    twin = copy.deepcopy(fast)
    assert accelerated(twin)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in fast.parameters()}
    same(twin, peer, "deepcopy")
    randomise(twin, seed=8)
    same(fast, peer, "after its deepcopy was changed")

    for reread in (pickle.loads(pickle.dumps(fast)), _torch_round_trip(fast)):
        assert not accelerated(reread)
        assert [type(m) for m in reread.modules()] == [type(m) for m in peer.modules()]
        same(reread, peer, "pickle")
        assert accelerated(fk.accelerate(reread))
        same(reread, peer, "pickle, accelerated")

    assert fk.accelerate(fast) is fast
    same(fast, peer, "accelerated twice")
    classes = [type(m) for m in fast.modules()]
    assert fk.deaccelerate(fast) is fast
    assert not accelerated(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in peer.modules()] != classes
    assert [sorted(vars(m)) for m in fast.modules()] == [sorted(vars(m)) for m in peer.modules()]
    same(fast, peer, "deaccelerated")


def _torch_round_trip(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def assert_same_error(peer: nn.Module, fast: nn.Module, call: Callable[[Any], Any]) -> None:
    """The accelerated module refuses what the peer refuses, in the same words, or does what the peer does."""
    expected, theirs = _attempt(call, peer)
    got, ours = _attempt(call, fast)
    assert type(ours) is type(theirs), f"{ours!r}, expected {theirs!r}"
    assert str(ours) == str(theirs)
    if theirs is None:
        assert_same(got, expected, "odd input")
    else:
        assert ours is not None
        assert ours.__context__ is None


def _attempt(call: Callable[[Any], Any], model: nn.Module) -> tuple[Any, Exception | None]:
    try:
        return call(model), None
    except Exception as error:
        return None, error
