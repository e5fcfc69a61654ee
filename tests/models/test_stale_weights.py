"""A sample never comes from weights that are no longer there, however they were changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowkernels as fk
from flowkernels.models import IAF, MAF

FEATURES, CONTEXT = 6, 2


def make(seed: int = 0, kind: type[MAF] | type[IAF] = MAF) -> Any:
    torch.manual_seed(seed)
    return kind(FEATURES, (12, 12), 2, context_features=CONTEXT).double()


def noise(model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    return (
        torch.randn(5, FEATURES, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(5, CONTEXT, generator=generator, dtype=torch.float64).to(dtype),
    )


def everything(model: Any) -> list[Tensor]:
    """All that depends on weights: both directions and the gradients of both."""
    z, context = noise(model)
    out: list[Tensor] = []
    for run in (model.inverse, model.transform):
        with torch.no_grad():
            out += run(z, context)
        leaf = z.clone().requires_grad_()
        y, logdet = run(leaf, context)
        grads = torch.autograd.grad(y.square().sum() + logdet.sum(), [leaf, *model.parameters()])
        out += [y.detach(), logdet.detach(), *grads]
    return out


def check(model: Any, before: list[Tensor] | None = None) -> list[Tensor]:
    """What the model gives now is what the reference gives now, and not what it gave before."""
    got = everything(model)
    with fk.use_backend("reference"):
        expected = everything(model)
    tolerance = 1e-10 if got[0].dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    if before is not None:
        assert not torch.allclose(got[0].double(), before[0].double(), rtol=1e-3, atol=1e-3), "nothing has changed"
    return got


def steps_of(optimizer: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        steps = optimizer(model.parameters())
        for _ in range(3):
            steps.zero_grad()
            z, context = noise(model)
            (-model.log_prob(z, context).mean() + model.rsample(3, context).square().mean()).backward()
            steps.step()

    return change


def in_place(change: Callable[[Tensor], Any]) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        with torch.no_grad():
            for p in model.parameters():
                change(p)

    return run


def load_state(model: Any) -> None:
    model.load_state_dict(make(9).state_dict())


def load_state_assigned(model: Any) -> None:
    model.load_state_dict(make(9).state_dict(), assign=True)


def load_saved_state(model: Any) -> None:
    file = io.BytesIO()
    torch.save(make(9).state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))


def new_data(model: Any) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


def transposed_data(model: Any) -> None:
    """The same memory in other strides: neither the address nor the version changes."""
    for p in model.parameters():
        if p.dim() == 2 and p.shape[0] == p.shape[1]:
            p.data = p.data.T


def data_of_another_module(model: Any) -> None:
    for p, q in zip(model.parameters(), make(9).parameters(), strict=True):
        p.data = q.data


def data_in_place(model: Any) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


def data_copied_into(model: Any) -> None:
    for p, q in zip(model.parameters(), make(9).parameters(), strict=True):
        p.data.copy_(q.data)


def one_element_of_data(model: Any) -> None:
    model.layers[-1].conditioner.layers[-1].bias.data[0] += 3.0


def new_parameters(model: Any) -> None:
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach() * 1.5))


def swapped_storage(model: Any) -> None:
    for p, q in zip(model.parameters(), make(9).parameters(), strict=True):
        torch.utils.swap_tensors(p, q)


def one_bias(model: Any) -> None:
    with torch.no_grad():
        model.layers[-1].conditioner.layers[-1].bias[0] += 3.0


def through_a_view(model: Any) -> None:
    for p in model.parameters():
        p.detach().view(-1)[:].mul_(1.5)


def through_numpy(model: Any) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] *= 1.5


def initialised_again(model: Any) -> None:
    torch.manual_seed(5)
    for module in model.modules():
        if hasattr(module, "weight"):
            nn.init.normal_(module.weight, std=0.3)


def flat_vector(model: Any) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, model.parameters())


def clipped_and_decayed(model: Any) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.5)


CHANGES: dict[str, Callable[[Any], None]] = {
    "sgd": steps_of(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    "adam": steps_of(lambda p: torch.optim.Adam(p, lr=0.05)),
    "adam_foreach": steps_of(lambda p: torch.optim.Adam(p, lr=0.05, foreach=True)),
    "adamw_fused": steps_of(lambda p: torch.optim.AdamW(p, lr=0.05, fused=True)),
    "load_state_dict": load_state,
    "load_state_dict_assign": load_state_assigned,
    "load_saved_state_dict": load_saved_state,
    "mul_under_no_grad": in_place(lambda p: p.mul_(1.5)),
    "copy_under_no_grad": in_place(lambda p: p.copy_(torch.full_like(p, 0.1))),
    "set_an_element": one_bias,
    "fill": in_place(lambda p: p.fill_(0.05)),
    "foreach": clipped_and_decayed,
    "detached_view": through_a_view,
    "numpy": through_numpy,
    "init": initialised_again,
    "vector_to_parameters": flat_vector,
    "data_assigned": new_data,
    "data_transposed": transposed_data,
    "data_of_another_module": data_of_another_module,
    "data_in_place": data_in_place,
    "data_copy": data_copied_into,
    "data_element": one_element_of_data,
    "new_parameters": new_parameters,
    "swap_tensors": swapped_storage,
}


@pytest.mark.parametrize("kind", [MAF, IAF])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_used(change: Callable[[Any], None], kind: type[MAF] | type[IAF]) -> None:
    model = make(kind=kind)
    before = check(model)
    change(model)
    check(model, before)
    # And once more: whatever was remembered meanwhile is no better.
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    check(model)


def test_double_and_float() -> None:
    model = make()
    before = check(model)
    assert check(model.float())[0].dtype == torch.float32
    torch.testing.assert_close(check(model)[0].double(), before[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    single = check(model, before)
    assert check(model.double())[0].dtype == torch.float64
    torch.testing.assert_close(check(model)[0], single[0].double(), rtol=1e-4, atol=1e-4)


def test_to() -> None:
    model = make()
    before = check(model)
    for target in ("cpu", torch.float32, torch.float64, torch.device("cpu")):
        model.to(target)
        check(model)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        check(model)
    assert not torch.allclose(everything(model)[0], before[0])


def test_half_precision() -> None:
    model = make().to(torch.bfloat16)
    z, context = noise(model)
    first, _ = model.inverse(z, context)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    second, _ = model.inverse(z, context)
    with fk.use_backend("reference"):
        expected, _ = model.inverse(z, context)
    torch.testing.assert_close(second, expected, rtol=0.02, atol=0.02)
    assert not torch.equal(first, second)


def test_functional_call() -> None:
    model = make()
    z, context = noise(model)
    own = check(model)

    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = model

        def forward(self, z: Tensor, context: Tensor) -> Tensor:
            return self.flow.inverse(z, context)[0]

    wrapped = Inverse()
    for seed in (3, 4, 3):
        other = make(seed)
        swapped = {f"flow.{name}": p.detach() for name, p in other.named_parameters()}
        got = torch.func.functional_call(wrapped, swapped, (z, context))
        torch.testing.assert_close(got, other.inverse(z, context)[0])
        assert not torch.allclose(got, own[0])
        torch.testing.assert_close(everything(model), own)
    # The same dictionary, its tensors changed in place.
    for value in swapped.values():
        value.mul_(0.5)
    got = torch.func.functional_call(wrapped, swapped, (z, context))
    with fk.use_backend("reference"):
        torch.testing.assert_close(got, torch.func.functional_call(wrapped, swapped, (z, context)))


def test_parametrization() -> None:
    model = make()
    before = check(model)
    for layer in model.layers:
        nn.utils.parametrizations.weight_norm(layer.conditioner.layers[1], "weight")
    check(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    check(model, before)


def test_vmap_over_the_weights_leaves_nothing_behind() -> None:
    model = make()
    own = check(model)
    z, context = noise(model)
    copies = [make(seed) for seed in range(1, 4)]
    stacked, _ = torch.func.stack_module_state(copies)

    wrapped = _Method(model, "inverse")

    def run(weights: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(wrapped, {f"flow.{k}": v for k, v in weights.items()}, (z, context))[0]
        return out

    for _ in range(2):
        got = torch.func.vmap(run)(stacked)
        for one, other in zip(got, copies, strict=True):
            torch.testing.assert_close(one, other.inverse(z, context)[0])
        torch.testing.assert_close(everything(model), own)
        with torch.no_grad():
            for value in stacked.values():
                value.mul_(1.5)
            for other in copies:
                for p in other.parameters():
                    p.mul_(1.5)


class _Method(nn.Module):
    def __init__(self, flow: nn.Module, name: str) -> None:
        super().__init__()
        self.flow, self.name = flow, name

    def forward(self, *args: Tensor) -> Any:
        return getattr(self.flow, self.name)(*args)


def test_grad_transform_between_calls() -> None:
    model = make()
    own = check(model)
    z, context = noise(model)
    wrapped = _Method(model, "log_prob")

    def loss(weights: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(wrapped, weights, (z, context))
        return out.sum()

    weights = {name: p.detach() for name, p in wrapped.named_parameters()}
    grads = torch.func.grad(loss)(weights)
    assert all(g.isfinite().all() for g in grads.values())
    torch.testing.assert_close(everything(model), own)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    check(model, own)


@pytest.mark.parametrize("changed", ["original", "copy"])
def test_deepcopy_then_change_of_one(changed: str) -> None:
    model = make()
    before = check(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(check(twin), before, rtol=0, atol=0)
    target, other = (model, twin) if changed == "original" else (twin, model)
    in_place(lambda p: p.mul_(1.5))(target)
    for _ in range(2):
        check(target, before)
        torch.testing.assert_close(check(other), before, rtol=0, atol=0)


def test_weights_shared_by_two_models() -> None:
    model, other = make(0), make(0)
    for ours, theirs in zip(model.modules(), other.modules(), strict=True):
        for name, p in list(ours.named_parameters(recurse=False)):
            setattr(theirs, name, p)
    before = check(model)
    check(other)
    in_place(lambda p: p.mul_(1.5))(other)
    check(model, before)
    check(other, before)


def test_memory_that_is_given_out_again() -> None:
    """Models that come and go: new weights may lie where old ones have been."""
    z, context = noise(make())
    for seed in range(30):
        model = make(seed)
        got = model.inverse(z, context)[0]
        with fk.use_backend("reference"):
            torch.testing.assert_close(got, model.inverse(z, context)[0])
        for p in model.parameters():
            p.data = torch.randn_like(p) * 0.2
        got = model.inverse(z, context)[0]
        with fk.use_backend("reference"):
            torch.testing.assert_close(got, model.inverse(z, context)[0])


def test_inference_mode() -> None:
    model = make()
    before = check(model)
    z, context = noise(model)
    with torch.inference_mode():
        torch.testing.assert_close(model.inverse(z, context)[0], before[0], rtol=0, atol=0)
    in_place(lambda p: p.mul_(1.5))(model)
    with torch.inference_mode():
        changed = model.inverse(z, context)[0]
    assert not torch.allclose(changed, before[0])
    # Weights made in inference mode count no versions.
    with torch.inference_mode():
        born_there = make()
        torch.testing.assert_close(born_there.inverse(z, context)[0], before[0], rtol=0, atol=0)
        for p in born_there.parameters():
            p.mul_(1.5)
        torch.testing.assert_close(born_there.inverse(z, context)[0], changed, rtol=0, atol=0)
