"""`explain` says what runs, and it is what runs."""

from __future__ import annotations

import re

import pytest
import torch

import flowkernels as fk
from flowkernels import _library

needs_cpu = pytest.mark.skipif("cpu" not in fk.available_backends(), reason="the C++ kernels are not built")


@needs_cpu
def test_a_flow_line_by_line() -> None:
    flow = fk.models.MAF(10, (24, 32), transforms=3)
    told = fk.explain(flow)
    count = sum(p.numel() for p in flow.parameters())
    assert told.startswith(f"MAF: {count:,} parameters, float32 on cpu\n")
    assert "3 x AutoregressiveTransform (layers.0 to layers.2): cpu" in told
    assert "10 features and 24, 32 hidden units, 10 steps in " in told
    assert f"why cpu: this machine's instruction set is {_library.build_info()['isa']}" in told
    assert "torch:" not in told


def test_the_packed_size_is_that_of_the_plan() -> None:
    flow = fk.models.MADE(20, (64, 64))
    (layer,) = flow.layers
    plan = layer.conditioner.plan
    dense = sum(p.numel() for p in flow.parameters())
    for dtype, size in ((torch.float32, 4), (torch.float64, 8)):
        (found,) = re.findall(r"packed (\S+) kB \(dense (\S+) kB\)", fk.explain(flow.to(dtype)))
        assert [float(kb) for kb in found] == [
            round(plan.packed_sizes[0] * size / 1e3, 1),
            round(dense * size / 1e3, 1),
        ]


def test_directions_of_an_iaf_are_swapped() -> None:
    assert "maf_forward, sampling maf_inverse; law softplus" in fk.explain(fk.models.MAF(3, (4,), transforms=1))
    assert "maf_inverse, sampling maf_forward; law exp" in fk.explain(fk.models.IAF(3, (4,), transforms=1))


def test_the_chosen_backend_is_named() -> None:
    with fk.use_backend("reference"):
        told = fk.explain(fk.models.MADE(3, (4,)))
    assert ": reference\n" in told
    assert "why reference: use_backend('reference') is in force" in told


def test_why_it_is_slow_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "load_error", "it was eaten")
    told = fk.explain(fk.models.MADE(3, (4,)))
    assert ": reference\n" in told
    assert "why reference: slow, because it was eaten" in told


def test_layers_of_torch_are_told_apart() -> None:
    told = fk.explain(fk.models.MAF(3, (4,), transforms=2, context_features=2))
    assert "2 x Linear (layers.0.conditioner.context_layers.0 to layers.1.conditioner.context_layers.0): torch" in told
    assert "nothing in it calls a flowkernels operator" in fk.explain(torch.nn.Linear(2, 2))


def test_layers_on_their_own() -> None:
    told = fk.explain(torch.nn.Sequential(fk.nn.MADE(4, (8,)), fk.nn.MaskedLinear(torch.arange(4), torch.arange(4))))
    assert re.search(r"  MADE \(0\): \w+\n    masked_linear x 2; 4 features and 8 hidden units", told)
    # Degrees 0..3 on both sides: 4 + 3 + 2 + 1 of 16 weights.
    assert re.search(r"  MaskedLinear \(1\): \w+\n    masked_linear, 4 -> 4, 62% of the weights", told)


def test_it_changes_nothing() -> None:
    flow = fk.models.MAF(5, (8,), transforms=2)
    x, state = torch.randn(7, 5), torch.get_rng_state()
    before = flow.log_prob(x)
    fk.explain(flow)
    fk.explain()
    assert torch.equal(flow.log_prob(x), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module or left out, got str"):
        fk.explain("maf")


@needs_cpu
def test_a_flow_of_another_library_before_and_after_accelerate() -> None:
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.MAF(features=3, transforms=2, hidden_features=(8,))
    before = fk.explain(flow)
    assert "can be accelerated" in before
    assert ": cpu\n" not in before
    after = fk.explain(fk.accelerate(flow))
    assert "can be accelerated" not in after
    assert ": cpu\n    accelerated: " in after
