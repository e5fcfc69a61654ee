"""Which backend CUDA tensors run on, and what is said when none is there. Needs no GPU: the machine is made up."""

from __future__ import annotations

import contextlib
import importlib
import inspect

import pytest
import torch

import flowkernels as fk
from flowkernels import _cuda, _library
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import RQSpline, code_and_numbers


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU of sm_90 with both backends, built for sm_80 and sm_90."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
    monkeypatch.setattr(_cuda._library, "is_built", lambda: True)
    monkeypatch.setattr(_cuda, "has_kernel", lambda name, operator: operator != "actnorm")
    monkeypatch.setattr(_cuda, "built_for", lambda: (80, 90))
    monkeypatch.setattr(_cuda, "has_triton", lambda: True)
    return monkeypatch


def test_auto_prefers_what_the_table_says(machine: pytest.MonkeyPatch) -> None:
    assert _cuda.choose("affine_coupling", "auto") == ("cuda", _cuda.DEFAULT_ORDER[1])
    machine.setitem(_cuda.ORDER, "affine_coupling", (("triton", "cuda"), "measured: somewhere.json"))
    assert _cuda.choose("affine_coupling", "auto") == ("triton", "measured: somewhere.json")


def test_auto_takes_the_next_and_says_why(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(_cuda, "built_for", lambda: (80,))
    name, why = _cuda.choose("affine_coupling", "auto")
    assert name == "triton"
    assert "A GPU is sm_90, but the CUDA kernels were built for sm_80: rebuild with TORCH_CUDA_ARCH_LIST=9.0" in why
    machine.setattr(_cuda, "has_triton", lambda: False)
    name, why = _cuda.choose("affine_coupling", "auto")
    assert name == "reference"
    assert "triton is not installed" in why


def test_forced_backends(machine: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "triton", "reference"):
        assert _cuda.choose("affine_coupling", name)[0] == name
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run actnorm: there is no CUDA C"):
        _cuda.choose("actnorm", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run affine_coupling on CUDA tensors"):
        _cuda.choose("affine_coupling", "cpu")


def test_a_chain_with_a_spline_is_a_matter_of_its_own(machine: pytest.MonkeyPatch) -> None:
    """Both backends run it; where one cannot, that is decided before anything is launched, and said."""
    for name in ("cuda", "triton"):
        assert _cuda.choose("maf_spline", name)[0] == name
    machine.setattr(_cuda, "has_kernel", lambda name, operator: (name, operator) != ("cuda", "maf_spline"))
    assert _cuda.choose("maf", "auto")[0] == "cuda"
    name, why = _cuda.choose("maf_spline", "auto")
    assert name == "triton"
    assert "not cuda: there is no CUDA C++ kernel for maf_spline" in why
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run maf_spline: there is no CUDA C"):
        _cuda.choose("maf_spline", "cuda")


def test_splines_need_no_compiler() -> None:
    assert {"rq_spline", "rq_spline_backward"} <= _library.ON_CUDA
    for operator in ("rq_spline", "rq_spline_backward", "maf_spline", "maf_spline_backward"):
        assert _cuda.has_kernel("triton", operator)


def test_the_table_knows_the_chain_by_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_cuda, "choose", lambda operator, forced: (asked.append(operator), ("reference", ""))[1])
    affine, spline = code_and_numbers(ScaleLaw("exp"))[0], code_and_numbers(RQSpline())[0]
    for codes in ([affine, 0, 0, 0], [affine, 0, 0, 0, spline, 0, 0, 0]):
        _cuda.run("maf", lambda *_: None, None, [], [], [], codes, [])
        _cuda.run("maf_backward", lambda *_: None, None, None, None, [], [], [], [], codes)
    assert asked == ["maf", "maf_backward", "maf_spline", "maf_spline_backward"]


def test_functions_take_what_their_operators_give() -> None:
    """On a device the dispatcher would find out; here it has to be seen without one."""
    checked = 0
    for table in (_cuda.COMPOSED, _cuda.TRITON):
        for operator, (module, name, *_) in table.items():
            if operator.startswith("maf_spline") or (module.endswith("triton") and not _cuda.has_triton()):
                continue
            parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
            if any(p.kind is p.VAR_POSITIONAL for p in parameters):
                continue  # hands on what it gets
            takes = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            if not (table is _cuda.TRITON and operator in _cuda.WRAPPED):
                gives = [a.name for a in getattr(torch.ops.flowkernels, operator).default._schema.arguments]
                assert takes == gives, (operator, module)
                checked += 1
    assert checked >= 4


def test_triton_launches_where_its_tensors_are(machine: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    machine.setattr(torch.cuda, "device", lambda device: (current.append(device), contextlib.nullcontext())[1])
    machine.setattr(_cuda, "choose", lambda operator, forced: ("triton", ""))
    machine.setattr(_cuda, "_kernel", lambda name, operator: lambda *args: "ran")
    assert _cuda.run("maf_pack", lambda *_: None, [torch.zeros(2)], [], torch.zeros(1), 3) == "ran"
    assert current == [torch.device("cpu")]


def test_an_architecture_of_the_same_family_will_do(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    assert _cuda.choose("maf", "auto")[0] == "cuda"
    machine.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    name, why = _cuda.choose("maf", "auto")
    assert name == "reference"
    assert "sm_70" in why


def test_a_gradient_without_a_kernel_is_plain(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(_cuda, "has_kernel", lambda name, operator: not operator.endswith("_backward"))
    assert _cuda.choose("gumbel_argmax_backward", "triton")[0] == "reference"


def test_explain_names_every_family(machine: pytest.MonkeyPatch) -> None:
    class Properties:
        shared_memory_per_block_optin = 99 * 1024

    machine.setattr(torch.cuda, "get_device_properties", lambda *_: Properties())
    text = "\n".join(_cuda.explain())
    for operator in ("affine_coupling", "masked_linear", "maf", "maf_spline", "rq_spline", "gumbel_softmax"):
        assert f"{operator}: cuda (not measured yet" in text
    assert "99 KB of shared memory" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    for name in ("cuda", "triton"):
        assert name not in fk.available_backends()
        with pytest.raises(RuntimeError, match=f"backend '{name}' is not available"), fk.use_backend(name):
            pass
