"""MADE, MAF and IAF: the five methods, their laws, and everything that one does with a module."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flowkernels as fk
from flowkernels import testing
from flowkernels.models import IAF, MADE, MAF, Flow
from flowkernels.scales import ScaleLaw

FLOWS: dict[str, Callable[..., Flow]] = {
    "made": lambda d=4, **k: MADE(d, (12, 10), **k),
    "maf": lambda d=4, **k: MAF(d, (12, 10), 3, **k),
    "maf_residual": lambda d=4, **k: MAF(d, (12, 12), 2, residual=True, activation="silu", **k),
    "maf_random": lambda d=4, **k: MAF(d, (12, 10), 2, order="random", degrees="random", **k),
    "maf_orders": lambda d=4, **k: MAF(d, (12,), 2, order=[list(range(d))[::-1], "random"], law="exp", **k),
    "maf_no_hidden": lambda d=4, **k: MAF(d, (), 2, law=ScaleLaw("softclip"), **k),
    "iaf": lambda d=4, **k: IAF(d, (12, 10), 2, **k),
    "iaf_gate": lambda d=4, **k: IAF(d, (12, 10), 2, form="gate", activation="elu", **k),
}
every_flow = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
with_and_without_context = pytest.mark.parametrize("context_features", [0, 3], ids=["plain", "context"])


def given(flow: Flow, rows: int = 6, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    dtype = next(flow.parameters()).dtype
    context = None
    if flow.context_features:
        context = testing.random_tensor((rows, flow.context_features), dtype, seed=seed + 1)
    return testing.random_tensor((rows, flow.features), dtype, seed=seed), context


# ---- the five methods --------------------------------------------------------------------------


@every_flow
@with_and_without_context
@pytest.mark.parametrize("rows", [0, 1, 6])
@pytest.mark.parametrize("features", [1, 4])
def test_shapes(make: Any, context_features: int, rows: int, features: int, backend: str) -> None:
    flow = make(features, context_features=context_features)
    x, context = given(flow, rows)
    for y, logdet in (flow.transform(x, context), flow.inverse(x, context)):
        assert y.shape == (rows, features)
        assert logdet.shape == (rows,)
    assert flow.log_prob(x, context).shape == (rows,)
    for n in (0, 1, 5):
        shape = (rows, n) if context_features else (n,)
        assert flow.sample(n, context).shape == (*shape, features)
        assert flow.rsample(n, context).shape == (*shape, features)
        samples, log_prob = flow.sample_and_log_prob(n, context)
        assert samples.shape == (*shape, features)
        assert log_prob.shape == shape


@every_flow
@with_and_without_context
def test_flow_laws(make: Any, context_features: int, backend: str) -> None:
    flow = make(context_features=context_features).double()
    x, context = given(flow, 3)
    testing.check_flow_laws(lambda t: flow.transform(t, context), lambda t: flow.inverse(t, context), x)


@every_flow
@with_and_without_context
def test_log_prob_is_the_formula(make: Any, context_features: int) -> None:
    flow = make(context_features=context_features).double()
    x, context = given(flow)
    z, logdet = flow.transform(x, context)
    normal = torch.distributions.Normal(torch.zeros((), dtype=z.dtype), 1.0)
    torch.testing.assert_close(flow.log_prob(x, context), normal.log_prob(z).sum(-1) + logdet)


@every_flow
@with_and_without_context
def test_sample_and_log_prob_is_log_prob(make: Any, context_features: int) -> None:
    flow = make(context_features=context_features).double()
    _, context = given(flow, 3)
    x, log_prob = flow.sample_and_log_prob(7, context, seed=3)
    rows = None if context is None else context.repeat_interleave(7, 0)
    again = flow.log_prob(x.reshape(-1, 4), rows).reshape(log_prob.shape)
    torch.testing.assert_close(log_prob, again, rtol=1e-9, atol=1e-9)
    testing.assert_same_bits(x, flow.sample(7, context, seed=3))
    testing.assert_same_bits(x, flow.rsample(7, context, seed=3))


@every_flow
def test_each_row_of_context_gets_its_samples(make: Any) -> None:
    flow = make(context_features=3).double()
    _, context = given(flow, 3)
    x = flow.sample(5, context, seed=1)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(15, 4, dtype=torch.float64, generator=generator).reshape(3, 5, 4)
    for i in range(3):
        expected, _ = flow.inverse(noise[i], context[i].expand(5, 3))
        torch.testing.assert_close(x[i], expected)


@every_flow
def test_seed(make: Any) -> None:
    flow = make()
    state = torch.get_rng_state()
    first = flow.sample(5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    testing.assert_same_bits(flow.sample(5, seed=1), first)
    assert not torch.equal(flow.sample(5, seed=2), first)
    torch.manual_seed(4)
    own = flow.sample(5)
    assert not torch.equal(flow.sample(5), own)
    torch.manual_seed(4)
    testing.assert_same_bits(flow.sample(5), own)


def test_sample_has_no_gradient_and_rsample_has() -> None:
    flow = MAF(3, (8,), 2, context_features=2)
    context = torch.randn(2, 2, requires_grad=True)
    assert not flow.sample(4, context).requires_grad
    flow.rsample(4, context).square().sum().backward()
    assert context.grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


@every_flow
@with_and_without_context
def test_gradients_of_every_method(make: Any, context_features: int) -> None:
    """Against the naive loops, in float64, for every parameter."""
    flow = make(context_features=context_features).double()
    x, context = given(flow, 5)

    def losses() -> list[Tensor]:
        samples, log_prob = flow.sample_and_log_prob(4, context, seed=1)
        return [
            -flow.log_prob(x, context).mean(),
            flow.rsample(4, context, seed=2).square().sum(),
            samples.sum() + log_prob.square().sum(),
        ]

    parameters = list(flow.parameters())
    fast = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses()]
    with fk.use_backend("reference"):
        plain = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses()]
    for ours, theirs in zip(fast, plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_density_integrates_to_one() -> None:
    flow = MADE(2, (16,), activation="tanh").double()
    grid = torch.linspace(-12, 12, 481, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        mass = flow.log_prob(points).exp().sum() * (grid[1] - grid[0]) ** 2
    assert abs(float(mass) - 1) < 1e-3


def test_samples_have_the_density_s_entropy() -> None:
    """E[-log p] over samples of p, two ways: the sweep's own density and log_prob of independent samples."""
    flow = MAF(3, (16,), 2).double()
    with torch.no_grad():
        _, own = flow.sample_and_log_prob(20000, seed=0)
        other = flow.log_prob(flow.sample(20000, seed=1))
    deviation = float((own.std() + other.std()) / math.sqrt(20000))
    assert abs(float(own.mean() - other.mean())) < 5 * deviation


def test_iaf_forms_are_the_formulas() -> None:
    flow = IAF(3, (8,), 1, order="natural").double()
    z = testing.random_tensor((5, 3), torch.float64)
    shift, scale = flow.layers[0].conditioner(z).unbind(-1)
    x, logdet = flow.inverse(z)
    # Sampling is one pass of its network, over the noise.
    expected, expected_logdet = flow.layers[0].inverse(z)
    torch.testing.assert_close(x, scale.exp() * z + shift)
    torch.testing.assert_close(logdet, scale.sum(-1))
    torch.testing.assert_close((x, logdet), (expected, expected_logdet))
    gate = IAF(3, (8,), 1, order="natural", form="gate").double()
    shift, scale = gate.layers[0].conditioner(z).unbind(-1)
    v = torch.sigmoid(scale + 2)
    x, logdet = gate.inverse(z)
    torch.testing.assert_close(x, v * z + (1 - v) * shift)
    torch.testing.assert_close(logdet, v.log().sum(-1))


def test_maf_is_the_formula() -> None:
    flow = MAF(3, (8,), 1, order="natural").double()
    x = testing.random_tensor((5, 3), torch.float64)
    shift, scale = flow.layers[0].conditioner(x).unbind(-1)
    sigma = torch.nn.functional.softplus(scale) + 1e-3
    z, logdet = flow.transform(x)
    torch.testing.assert_close(z, sigma * x + shift)
    torch.testing.assert_close(logdet, sigma.log().sum(-1))


@every_flow
def test_each_direction_is_autoregressive(make: Any) -> None:
    flow = make().double()
    for layer in flow.layers:
        place = layer.conditioner.in_degrees
        later = place[None, :] > place[:, None]
        x = testing.random_tensor((4,), torch.float64)
        for run in (layer.forward, layer.inverse):
            jacobian = torch.autograd.functional.jacobian(lambda t, run=run: run(t[None])[0][0], x)
            assert jacobian[later].count_nonzero() == 0
            assert (jacobian.diagonal() > 0).all()


# ---- as a module -------------------------------------------------------------------------------


def outputs(flow: Flow, seed: int = 0) -> list[Tensor]:
    x, context = given(flow, 5, seed)
    with torch.no_grad():
        return [*flow.transform(x, context), *flow.inverse(x, context), flow.sample(3, context, seed=1)]


@every_flow
@with_and_without_context
def test_state_dict_round_trip(make: Any, context_features: int) -> None:
    torch.manual_seed(1)
    one = make(context_features=context_features)
    torch.manual_seed(2)
    other = make(context_features=context_features)
    outputs(other)  # whatever it has remembered must go
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    testing.assert_same_bits(outputs(other), outputs(one))


@every_flow
def test_pickle_deepcopy_and_torch_save(make: Any) -> None:
    flow = make(context_features=2)
    before = outputs(flow)
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow), torch.load(file, weights_only=False)):
        testing.assert_same_bits(outputs(again), before)
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in flow.named_parameters()]


@every_flow
def test_dtypes_and_devices(make: Any) -> None:
    flow = make(context_features=2)
    single = outputs(flow)
    assert {t.dtype for t in single} == {torch.float32}
    double = outputs(flow.double())
    assert {t.dtype for t in double} == {torch.float64}
    torch.testing.assert_close(outputs(flow.to(torch.float32)), single)
    assert outputs(flow.to("cpu"))[0].device.type == "cpu"
    half = outputs(flow.to(torch.bfloat16))
    assert half[0].dtype == torch.bfloat16
    assert all(t.isfinite().all() for t in half)


@pytest.mark.parametrize("name", ["maf", "iaf_gate", "maf_residual"])
@with_and_without_context
def test_compile(name: str, context_features: int) -> None:
    torch.compiler.reset()
    flow = FLOWS[name](context_features=context_features)
    x, context = given(flow)
    for method in (flow.transform, flow.inverse, flow.log_prob):
        compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, context), method(x, context))
        grads = []
        for run in (compiled, method):
            out = run(x, context)
            loss = out.sum() if isinstance(out, Tensor) else out[0].square().sum() + out[1].sum()
            grads.append(torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(1.3)
    compiled = torch.compile(flow.inverse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), flow.inverse(x, context))


def test_compiled_sampling() -> None:
    torch.compiler.reset()
    flow = MAF(4, (12,), 2)
    compiled = torch.compile(flow.rsample, fullgraph=True, backend="aot_eager")
    assert compiled(5).shape == (5, 4)


def test_training_raises_the_likelihood_of_data() -> None:
    flow = MAF(2, (32,), 3, activation="tanh")
    x = torch.randn(512, 2) @ torch.tensor([[2.0, 0.0], [1.5, 0.3]]) + torch.tensor([1.0, -2.0])
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    assert float(loss) < -float(gaussian.log_prob(x).mean()) + 0.1
    samples = flow.sample(4000, seed=0)
    torch.testing.assert_close(samples.mean(0), x.mean(0), rtol=0, atol=0.2)
    torch.testing.assert_close(samples.T.cov(), x.T.cov(), rtol=0.2, atol=0.4)


def test_differentiable_sampling_keeps_no_graph_per_feature() -> None:
    """Bytes kept for the gradient of a sample: at most three times those of a density pass."""
    if "cpu" not in fk.available_backends():
        pytest.skip("the naive loop keeps D graphs")
    flow = MAF(96, (128, 128), 2)
    x = torch.randn(64, 96)

    def kept(call: Callable[[], Tensor]) -> int:
        sizes: dict[int, int] = {}
        alive = []

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            assert call().requires_grad
        return sum(sizes.values())

    sampling = kept(lambda: flow.rsample(64, seed=0).sum())
    both = kept(lambda: sum(t.sum() for t in flow.sample_and_log_prob(64, seed=0)))
    density = kept(lambda: flow.log_prob(x).sum())
    with fk.use_backend("reference"):
        plain = kept(lambda: flow.log_prob(x).sum())
    assert max(sampling, both) <= 3 * min(density, plain)


# ---- bad input ---------------------------------------------------------------------------------

FLOW, CONDITIONAL = MAF(3, (4,), 1), MAF(3, (4,), 1, context_features=2)
X, C = torch.zeros(4, 3), torch.zeros(4, 2)
NAN = float("nan")


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"x must be a torch\.Tensor, got list", lambda: FLOW.log_prob([1.0])),
        (ValueError, r"x must have shape \(N, 3\), got \(4, 2\)", lambda: FLOW.log_prob(C)),
        (ValueError, r"x must have shape \(N, 3\), got \(3,\)", lambda: FLOW.transform(X[0])),
        (ValueError, r"z must have shape \(N, 3\), got \(4, 2\)", lambda: FLOW.inverse(C)),
        (TypeError, r"x .*torch\.int64", lambda: FLOW.log_prob(X.long())),
        (TypeError, r"dtype", lambda: FLOW.log_prob(X.double())),
        (ValueError, r"n must be >= 0, got -1", lambda: FLOW.sample(-1)),
        (ValueError, r"n must be >= 0, got -3", lambda: FLOW.rsample(-3)),
        (ValueError, r"n must be >= 0, got -1", lambda: FLOW.sample_and_log_prob(-1)),
        (TypeError, r"n must be an integer, got float", lambda: FLOW.sample(2.0)),
        (TypeError, r"n must be an integer, got tuple", lambda: FLOW.sample((2,))),
        (TypeError, r"n must be an integer, got bool", lambda: FLOW.sample(True)),
        (ValueError, r"context was given, but this .* context_features=0", lambda: FLOW.sample(2, C)),
        (ValueError, r"context was given, but this .* context_features=0", lambda: FLOW.log_prob(X, C)),
        (ValueError, r"context is missing: this flow needs one of shape \(C, 2\)", lambda: CONDITIONAL.sample(2)),
        (ValueError, r"context is missing: .*\([NC], 2\)", lambda: CONDITIONAL.log_prob(X)),
        (ValueError, r"context must have shape \(C, 2\), got \(4, 3\)", lambda: CONDITIONAL.sample(2, X)),
        (ValueError, r"context must have shape \([NC], 2\), got \(4, 3\)", lambda: CONDITIONAL.log_prob(X, X)),
        (ValueError, r"context must have shape \(C, 2\), got \(2,\)", lambda: CONDITIONAL.sample(2, C[0])),
        (
            ValueError,
            r"context must have one row for each of 4 rows of x, got 3",
            lambda: CONDITIONAL.log_prob(X, C[:3]),
        ),
        (TypeError, r"context must be a torch\.Tensor, got list", lambda: CONDITIONAL.sample(2, [[0.0, 0.0]])),
        (ValueError, r"transforms must be an integer >= 1, got 0", lambda: MAF(3, transforms=0)),
        (
            ValueError,
            r"order must be a name or hold one order for each of 2 transforms, got 3",
            lambda: MAF(3, (4,), 2, order=["natural"] * 3),
        ),
        (ValueError, r"order must be natural, .*got 'up'", lambda: MAF(3, (4,), 2, order="up")),
        (ValueError, r"law must be one of .*got 'square'", lambda: MAF(3, (4,), law="square")),
        (ValueError, r"form must be exp or gate, got 'affine'", lambda: IAF(3, (4,), form="affine")),
        (ValueError, r"features must be an integer >= 1, got 0", lambda: MADE(0)),
        (ValueError, r"hidden_features must be positive", lambda: IAF(3, (4, -1))),
        (ValueError, r"activation must be one of", lambda: MAF(3, (4,), activation="swish")),
    ],
)
def test_bad_input(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


@every_flow
def test_nan_weights_give_nan_and_no_hang(make: Any) -> None:
    flow = make()
    with torch.no_grad():
        for p in flow.parameters():
            p.fill_(NAN)
    x, log_prob = flow.sample_and_log_prob(20)
    assert x.isnan().all()
    assert log_prob.isnan().all()
    assert flow.log_prob(torch.zeros(20, 4)).isnan().all()
    flow.rsample(3).sum().backward()
