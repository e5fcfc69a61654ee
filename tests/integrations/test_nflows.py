"""Accelerated nflows transforms give nflows' numbers."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import flowkernels as fk
from flowkernels.integrations import describe
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
from nflows import transforms
from nflows.distributions import StandardNormal
from nflows.flows import Flow

pytestmark = pytest.mark.peers

MAF = transforms.MaskedAffineAutoregressiveTransform
ACTIVATIONS = [
    F.relu,
    torch.relu,
    torch.tanh,
    F.elu,
    F.silu,
    F.leaky_relu,
    F.gelu,
    torch.sigmoid,
    F.softplus,
    nn.ReLU(),
    nn.Tanh(),
    nn.ELU(),
    nn.SiLU(),
    nn.LeakyReLU(),
    nn.GELU(),
]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """nflows draws its noise in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def both(model: Any, inputs: Any) -> Any:
    x, *context = inputs
    return (*model(x, *context), *model.inverse(x, *context))


def there_and_back(model: Any, inputs: Any) -> Any:
    x, z, *context = inputs
    return (*model(x, *context), *model.inverse(z, *context))


def density(model: Any, inputs: Any) -> Any:
    return model(*inputs)


def accelerated(model: nn.Module) -> bool:
    return any(entry.what.startswith("accelerated") for entry in describe(model))


def transform(seed: int = 0, **keywords: Any) -> Any:
    torch.manual_seed(seed)
    made = MAF(**{"features": 5, "hidden_features": 16, **keywords}).double()
    randomise(made, seed)
    return made


def draw(seed: int) -> tuple[dict[str, Any], int]:
    """A random configuration and a batch size."""
    r = random.Random(seed)
    residual = r.random() < 0.5
    return {
        "features": r.choice([1, 2, 3, 4, 7, 12, 20]),
        "hidden_features": r.choice([1, 3, 8, 17, 40, 64]),
        "context_features": r.choice([None, None, 1, 4]),
        "num_blocks": r.choice([0, 1, 2, 3]),
        "use_residual_blocks": residual,
        "random_mask": not residual and r.random() < 0.5,
        "activation": r.choice(ACTIVATIONS),
        "dropout_probability": r.choice([0.0, 0.0, 0.3]),
    }, r.choice([0, 1, 2, 5, 33])


@pytest.mark.parametrize("seed", range(24))
def test_random_configurations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords, batch = draw(seed)
    peer = transform(seed, **keywords).eval()
    fast = fk.accelerate(copy.deepcopy(peer))
    assert accelerated(fast)
    inputs = [torch.randn(batch, keywords["features"], dtype=torch.double)]
    if keywords["context_features"] is not None:
        inputs.append(torch.randn(batch, keywords["context_features"], dtype=torch.double))
    with counting(monkeypatch) as counts:
        got = outcome(fast, both, inputs)
    assert counts == {"forward": 1, "inverse": 1}
    assert_same(got, outcome(peer, both, inputs), str(keywords))
    assert_same(outcome(fast, both, inputs[:1]), outcome(peer, both, inputs[:1]), "without context")
    x, *context = [torch.randn(64, t.shape[1], dtype=torch.double) for t in inputs]
    with torch.no_grad():
        z = peer(x, *context)[0]  # noise that belongs to data: far from it, the inverse magnifies every rounding
    inputs = [t.float() for t in (x, z, *context)]
    assert_close_as_peer(peer.float(), fast.float(), there_and_back, inputs)


def test_many_features() -> None:
    peer = transform(features=200, hidden_features=64, use_residual_blocks=False)
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(3, 200, dtype=torch.double)
    assert_same(outcome(fast, both, [x], grad=False), outcome(peer, both, [x], grad=False))
    assert_same(outcome(fast, density, [x]), outcome(peer, density, [x]))


@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_life(context: int | None, residual: bool) -> None:
    inputs = [torch.randn(6, 5, dtype=torch.double)]
    if context:
        inputs.append(torch.randn(6, context, dtype=torch.double))

    def make() -> nn.Module:
        return transform(context_features=context, use_residual_blocks=residual, random_mask=not residual)

    life(make, both, inputs, accelerated)


def flow(context: int | None = None, features: int = 5, transform_count: int = 3) -> Any:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(transform_count):
        layers += [
            transforms.ReversePermutation(features) if i % 2 else transforms.RandomPermutation(features),
            transforms.LULinear(features, identity_init=True),
            MAF(features, 16, context_features=context, use_residual_blocks=bool(i % 2)),
            transforms.BatchNorm(features),
        ]
    layers.append(transforms.InverseTransform(MAF(features, 8, context_features=context)))
    made = Flow(transforms.CompositeTransform(layers), StandardNormal([features])).double()
    for m in made.modules():
        if isinstance(m, MAF):
            randomise(m)
    return made.eval()


@pytest.mark.parametrize("context", [None, 2])
def test_flow(context: int | None) -> None:
    peer = flow(context)
    model = nn.ModuleDict({"deep": nn.ModuleList([copy.deepcopy(peer)])})  # a flow somewhere inside a user's model
    assert fk.accelerate(model) is model
    fast: Any = model["deep"][0]  # type: ignore[index]
    assert sum(e.what.startswith("accelerated") for e in describe(fast)) == 4
    x = torch.randn(7, 5, dtype=torch.double)
    c = [] if context is None else [torch.randn(7, context, dtype=torch.double)]
    log_prob = lambda m, inputs: [m.log_prob(*inputs)]  # noqa: E731
    assert_same(outcome(fast, log_prob, [x, *c]), outcome(peer, log_prob, [x, *c]))

    def sample(m: Any, inputs: Any) -> Any:
        torch.manual_seed(3)
        return [*m.sample_and_log_prob(4, *inputs), m._sample(3, *(inputs or [None]))]

    assert_same(outcome(fast, sample, c), outcome(peer, sample, c))
    for m in (peer, fast):
        m.train()
    assert_same(outcome(fast, log_prob, [x, *c]), outcome(peer, log_prob, [x, *c]), "BatchNorm between, in training")


def test_context_manager() -> None:
    model = flow()
    kept = model._transform._transforms[2]
    fk.accelerate(kept)
    with fk.accelerated(model) as inside:
        assert inside is model
        assert sum(e.what.startswith("accelerated") for e in describe(model)) == 4
    assert [e.name for e in describe(model) if e.what.startswith("accelerated")] == ["_transform._transforms.2"]
    with pytest.raises(RuntimeError, match="inner"), fk.accelerated(model):
        raise RuntimeError("inner")
    assert sum(e.what.startswith("accelerated") for e in describe(model)) == 1


def test_not_in_place() -> None:
    model = flow()
    fast = fk.accelerate(model, inplace=False)
    assert fast is not model
    assert accelerated(fast)
    assert not accelerated(model)


def test_isinstance_and_hooks_on_the_transform() -> None:
    fast = fk.accelerate(transform())
    assert isinstance(fast, MAF)
    seen = []
    fast.register_forward_hook(lambda *args: seen.append(len(args)))
    fast(torch.randn(2, 5, dtype=torch.double))
    assert seen == [3]


# ---- what stays with nflows, and why -------------------------------------------------------------------------------


class OwnForward(MAF):  # type: ignore[misc, valid-type]
    def _elementwise_forward(self, inputs: Any, autoregressive_params: Any) -> Any:
        y, logdet = super()._elementwise_forward(inputs, autoregressive_params)
        return 2 * y, logdet


class OnlyNamed(MAF):  # type: ignore[misc, valid-type]
    """Changes nothing that is calculated."""


def test_subclasses() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.double)
    peer = OwnForward(5, 8).double()
    assert describe(peer)[0].what == "left: OwnForward has its own _elementwise_forward"
    fast = fk.accelerate(copy.deepcopy(peer))
    assert not accelerated(fast)
    assert_same(fast(x), peer(x))
    peer = OnlyNamed(5, 8).double()
    fast = fk.accelerate(copy.deepcopy(peer))
    assert accelerated(fast)
    assert isinstance(fast, OnlyNamed)
    assert_same(fast(x), peer(x))


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"activation": lambda v: v.clamp(0)}, "no kernel for the activation <lambda>"),
        ({"activation": nn.ELU(alpha=0.5)}, "activation ELU(alpha=0.5) has alpha other than 1.0"),
        ({"activation": nn.GELU("tanh")}, "activation GELU(approximate='tanh') has approximate other than none"),
        ({"activation": nn.ReLU(inplace=True)}, "activation ReLU(inplace=True) works in place"),
        ({"use_batch_norm": True}, "batch norm inside the network"),
        ({"use_batch_norm": True, "use_residual_blocks": False}, "batch norm inside the network"),
    ],
)
def test_left(keywords: dict[str, Any], reason: str) -> None:
    peer = transform(**keywords)
    assert describe(peer)[0].what == f"left: {reason}"
    fast = fk.accelerate(copy.deepcopy(peer))
    assert not accelerated(fast)
    x = torch.randn(4, 5, dtype=torch.double)
    assert_same(fast(x), peer(x))


def test_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fk.accelerate(transform(dropout_probability=0.5))
    peer = fk.deaccelerate(copy.deepcopy(fast))
    x = torch.randn(4, 5, dtype=torch.double)
    with counting(monkeypatch) as counts:
        torch.manual_seed(0)
        got = fast(x)
        assert counts["forward"] == 0
        assert describe(fast)[0].what == "accelerated, but for now left: dropout in training mode"
        torch.manual_seed(0)
        assert_same(got, peer(x))
        fast.eval()
        assert_same(fast(x), peer.eval()(x))
        assert counts["forward"] == 1


def test_hooks_on_inner_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fk.accelerate(transform())
    peer = fk.deaccelerate(copy.deepcopy(fast))
    x = torch.randn(4, 5, dtype=torch.double)
    calls = []
    handle = fast.autoregressive_net.blocks[0].linear_layers[0].register_forward_hook(lambda m, a, y: calls.append(m))
    with counting(monkeypatch) as counts:
        assert_same(both(fast, [x]), both(peer, [x]))
        assert len(calls) == 6  # once for the density, and once per pass of the inverse
        assert counts == {"forward": 0, "inverse": 0}
        assert "hooks" in describe(fast)[0].what
        handle.remove()
        assert_same(both(fast, [x]), both(peer, [x]))
        assert counts == {"forward": 1, "inverse": 1}
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: calls.append(m))
        try:
            both(fast, [x])
        finally:
            handle.remove()
        assert counts == {"forward": 1, "inverse": 1}


def test_changes_after_acceleration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is done to the inside of the network afterwards, the numbers stay nflows'."""
    x = torch.randn(4, 5, dtype=torch.double)

    def changed(change: Any, runs: int) -> None:
        fast = fk.accelerate(transform(seed=1, use_residual_blocks=False, random_mask=True))
        both(fast, [x])
        change(fast)
        with counting(monkeypatch) as counts:
            got = both(fast, [x])
        assert counts["forward"] == runs, change.__name__
        assert_same(got, both(fk.deaccelerate(fast), [x]), change.__name__)

    def swap_linear(t: Any) -> None:
        t.autoregressive_net.final_layer = copy.deepcopy(t.autoregressive_net.final_layer)
        randomise(t.autoregressive_net.final_layer, 9)

    def swap_weight(t: Any) -> None:
        t.autoregressive_net.final_layer.weight = nn.Parameter(torch.randn(10, 16, dtype=torch.double))

    def swap_data(t: Any) -> None:
        t.autoregressive_net.final_layer.weight.data = torch.randn(10, 16, dtype=torch.double)

    def mask_in_place(t: Any) -> None:
        t.autoregressive_net.initial_layer.mask[3] = 0

    def other_masks(t: Any) -> None:
        t.load_state_dict(transform(seed=2, use_residual_blocks=False, random_mask=True).state_dict())

    def more_blocks(t: Any) -> None:
        t.autoregressive_net.blocks.append(copy.deepcopy(t.autoregressive_net.blocks[-1]))
        t.autoregressive_net.blocks[-1].linear.mask.fill_(0).fill_diagonal_(1)

    def not_autoregressive(t: Any) -> None:
        t.autoregressive_net.final_layer.mask.fill_(1)

    def other_activation(t: Any) -> None:
        t.autoregressive_net.blocks[0].activation = torch.tanh

    def unknown_activation(t: Any) -> None:
        t.autoregressive_net.blocks[0].activation = torch.sin

    def own_forward(t: Any) -> None:
        net = t.autoregressive_net
        net.forward = lambda inputs, context=None: 2 * type(net).forward(net, inputs, context)

    def pruned(t: Any) -> None:
        prune.l1_unstructured(t.autoregressive_net.final_layer, "weight", 0.5)

    def weight_norm(t: Any) -> None:
        nn.utils.parametrizations.weight_norm(t.autoregressive_net.final_layer)

    for change, runs in [
        (swap_linear, 1),
        (swap_weight, 1),
        (swap_data, 1),
        (mask_in_place, 1),
        (other_masks, 1),
        (more_blocks, 1),
        (not_autoregressive, 0),
        (other_activation, 1),
        (unknown_activation, 0),
        (pruned, 0),
        (weight_norm, 0),
    ]:
        changed(change, runs)
    fast = fk.accelerate(transform())
    own_forward(fast)
    expected = MAF.forward(fast, x)
    assert_same(fast(x), expected)


def test_odd_input() -> None:
    peer = transform(context_features=2)
    fast = fk.accelerate(copy.deepcopy(peer))
    x, c = torch.randn(4, 5, dtype=torch.double), torch.randn(4, 2, dtype=torch.double)
    plain, fast_plain = transform(), fk.accelerate(transform())
    for name in ("forward", "inverse"):
        for args in [
            (x[:, :4], c),
            (x[0], c),
            (x[None], c[None]),
            (x.float(), c),
            (x, c.float()),
            (x, c[:1]),
            (x, c[:3]),
            (x, c[:, :1]),
            (x.long(), c),
            ("x", c),
            (None,),
            (),
            (x, c, c),
            (x.t().contiguous().t(), c),
            (x.expand(4, 5), c.double()),
            (x[:0], c[:0]),
        ]:
            assert_same_error(peer, fast, lambda m, name=name, args=args: getattr(m, name)(*args))
        assert_same_error(plain, fast_plain, lambda m, name=name: getattr(m, name)(x, c))
    assert_same_error(peer, fast, lambda m: m(inputs=x, context=c))
    assert_same_error(peer, fast, lambda m: m.inverse(inputs=x))


def test_frozen_parameters() -> None:
    peer = transform()
    for p in list(peer.parameters())[:3]:
        p.requires_grad_(False)
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(4, 5, dtype=torch.double)
    assert_same(outcome(fast, both, [x]), outcome(peer, both, [x]))


def test_moved_to_another_dtype() -> None:
    peer = transform()
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(64, 5, dtype=torch.double)
    with torch.no_grad():
        z = peer(x)[0]
    assert_close_as_peer(peer.float(), fast.float(), there_and_back, [x.float(), z.float()], grad=True)
    assert_same(both(fast.double(), [x]), both(peer.double(), [x]))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_every_kind_of_optimizer(options: dict[str, bool]) -> None:
    """Fused ones change parameters without saying so."""
    peer = transform()
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(4, 5, dtype=torch.double)
    for model in (peer, fast):
        with torch.no_grad():
            both(model, [x])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, **options)
        model(x)[0].sum().backward()
        optimizer.step()
    assert_same(both(fast, [x]), both(peer, [x]))


def test_second_derivatives_are_refused() -> None:
    """Better an error than a term that is silently missing from a gradient."""
    fast = fk.accelerate(transform())
    x = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    for inputs in ([x], list(fast.parameters())):
        grads = torch.autograd.grad(fast(x)[1].sum(), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="not twice differentiable"):
            sum(g.square().sum() for g in grads).backward()


def test_functional_transforms() -> None:
    """torch.func and forward-mode derivatives go nflows' own way and give its numbers."""
    peer = transform()
    fast = fk.accelerate(copy.deepcopy(peer))
    x = torch.randn(3, 5, dtype=torch.double)
    for derivative in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        got, expected = (derivative(lambda v, m=m: m(v)[1].sum())(x) for m in (fast, peer))
        assert_same([got], [expected])
    state = {name: p.detach() * 2 for name, p in peer.named_parameters()}
    got, expected = (torch.func.functional_call(m, state, (x,)) for m in (fast, peer))
    assert_same(got, expected)
    assert_same(fast(x), peer(x))


@pytest.mark.slow
def test_compile() -> None:
    peer = transform(context_features=2)
    fast = fk.accelerate(copy.deepcopy(peer))
    x, c = torch.randn(4, 5, dtype=torch.double), torch.randn(4, 2, dtype=torch.double)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_same(outcome(fast, lambda m, i: compiled(*i), [x, c]), outcome(peer, density, [x, c]))


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_not_a_module() -> None:
    for bad in (None, 3, "flow", [transform()], transform):
        for function in (fk.accelerate, fk.deaccelerate, describe):
            with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
                function(bad)
        with pytest.raises(TypeError, match="model must be"), fk.accelerated(bad):
            pass


def test_nothing_to_accelerate() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert fk.accelerate(model) is model
    assert type(model) is nn.Sequential
    assert fk.deaccelerate(model) is model
    assert [e.what for e in describe(model)] == ["left: not a flow of nflows, zuko, normflows, pyro"]


def test_untested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowkernels import integrations

    real = integrations.importlib.metadata.version
    monkeypatch.setattr(
        integrations.importlib.metadata, "version", lambda name: "0.99.1" if name == "nflows" else real(name)
    )
    monkeypatch.delitem(integrations._common.adapters, "nflows", raising=False)
    with pytest.warns(UserWarning, match=r"nflows 0\.99\.1 is installed; flowkernels was tested with 0\.14 up to"):
        fk.accelerate(transform())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.accelerate(transform())


def test_explain() -> None:
    """`fk.explain` prints what `describe` says."""
    text = fk.explain(fk.accelerate(nn.Sequential(flow())))
    assert "accelerated: forward by maf_forward, inverse by maf_inverse" in text
