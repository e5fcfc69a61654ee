"""Which backend CUDA tensors run on, and what is said when none is there. Needs no GPU: the machine is made up."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flowkernels as fk
from flowkernels import _backend, _cuda, _gpu_choices, _library
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


@pytest.fixture
def no_memory() -> Iterator[None]:
    """Forgets what was chosen for the real machine, and in the end what was chosen for the one made up."""

    forget()
    yield
    forget()


def forget() -> None:
    _cuda._choices.cache_clear()
    _gpu_choices.table.cache_clear()


CHOICES = {
    "affine_coupling": {"source": "somewhere.json", "up_to": [[4096, "triton"], [None, "cuda"]]},
    "maf_inverse": {"source": "somewhere.json", "up_to": [[64, "cuda"], [None, "triton"]]},
    "maf_spline_inverse": {"source": "somewhere.json", "up_to": [[None, "triton"]]},
}


@pytest.fixture
def table(tmp_path: Path, machine: pytest.MonkeyPatch, no_memory: object) -> Callable[..., None]:
    """Writes a table that is made up."""

    def write(**devices: Any) -> None:
        path = tmp_path / "gpu_choices.json"
        path.write_text(json.dumps({name.replace("_", " "): entry for name, entry in devices.items()}))
        machine.setattr(_gpu_choices, "TABLE", path)

    return write


def test_without_a_table(machine: pytest.MonkeyPatch, no_memory: object, tmp_path: Path) -> None:
    machine.setattr(_gpu_choices, "TABLE", tmp_path / "gpu_choices.json")
    assert _cuda.choose("affine_coupling", "auto", ("affine_coupling", 1)) == ("cuda", _gpu_choices.NOT_MEASURED)
    assert _cuda.choose("affine_coupling", "auto") == ("cuda", _gpu_choices.NOT_MEASURED)


def test_auto_goes_by_the_table(table: Callable[..., None]) -> None:
    table(A_GPU={"capability": [9, 0], "choices": CHOICES})
    why = "measured on A GPU: somewhere.json"
    for size, expected in ((0, "triton"), (4096, "triton"), (4097, "cuda"), (10**12, "cuda")):
        assert _cuda.choose("affine_coupling", "auto", ("affine_coupling", size)) == (expected, why)
    for size, expected in ((64, "cuda"), (65, "triton")):
        assert _cuda.choose("maf", "auto", ("maf_inverse", size)) == (expected, why)
    assert _cuda.choose("maf", "auto", ("maf_forward", 65)) == ("cuda", _gpu_choices.NOT_MEASURED)
    assert _cuda.choose("affine_coupling", "cuda", ("affine_coupling", 1))[0] == "cuda"
    assert _cuda.choose("affine_coupling", "reference", ("affine_coupling", 1))[0] == "reference"


def test_the_table_does_not_make_kernels(machine: pytest.MonkeyPatch, table: Callable[..., None]) -> None:
    """What it names first and cannot be had gives way to the other, which is said."""
    machine.setattr(_cuda, "has_kernel", lambda *what: what != ("triton", "maf_spline"))
    table(A_GPU={"capability": [9, 0], "choices": CHOICES})
    name, why = _cuda.choose("maf_spline", "auto", ("maf_spline_inverse", 5))
    assert name == "cuda"
    assert "measured on A GPU: somewhere.json; not triton: there is no Triton kernel for maf_spline" in why
    machine.setattr(_cuda, "has_triton", lambda: False)
    name, why = _cuda.choose("affine_coupling", "auto", ("affine_coupling", 5))
    assert name == "cuda"
    assert "not triton: triton is not installed" in why
    machine.setattr(_cuda, "built_for", lambda: (80,))
    name, why = _cuda.choose("maf", "auto", ("maf_inverse", 5))
    assert name == "reference"
    assert "not cuda: A GPU is sm_90" in why


def test_the_nearest_device_that_was_measured(table: Callable[..., None]) -> None:
    def entry(capability: list[int], backend: str) -> dict[str, Any]:
        choices = {"affine_coupling": {"source": f"{backend}.json", "up_to": [[None, backend]]}}
        return {"capability": capability, "choices": choices}

    call = ("affine_coupling", ("affine_coupling", 5))
    table(Far=entry([8, 0], "cuda"), Near=entry([9, 0], "triton"))
    why = "measured on Near, not on this device: triton.json"
    assert _cuda.choose(call[0], "auto", call[1]) == ("triton", why)
    forget()
    table(A_AGPU=entry([9, 0], "triton"), A_GPU=entry([9, 0], "cuda"))
    assert _cuda.choose(call[0], "auto", call[1]) == ("cuda", "measured on A GPU: cuda.json")


def test_calls_know_their_line_and_size(machine: pytest.MonkeyPatch, no_memory: object) -> None:
    """Of every operator that is chosen for, with the arguments that it is declared with."""
    x, weight, two = torch.zeros(6, 5), torch.zeros(7, 5), torch.zeros(6, 2)
    code = code_and_numbers(ScaleLaw("exp"))[0]
    spline = code_and_numbers(RQSpline())[0]
    forward, inverse = [code, 0, 0, 0], [code, 0, 1, 0]
    calls = {
        ("affine_coupling", "affine_coupling", 30): (x, x, x),
        ("affine_coupling_backward", "affine_coupling_backward", 30): (x, two, x, x, x),
        ("rq_spline", "rq_spline", 30): (x, torch.zeros(6, 5, 14)),
        ("rq_spline_backward", "rq_spline_backward", 30): (x, two, x, torch.zeros(6, 5, 14)),
        ("masked_linear", "masked_linear", 210): (x, weight),
        ("masked_linear_backward", "masked_linear_backward", 210): (torch.zeros(6, 7), x, weight),
        ("maf", "maf_forward", 6): (x, [], [], [], forward),
        ("maf", "maf_inverse", 6): (x, [], [], [], inverse),
        ("maf_backward", "maf_forward_backward", 6): (x, two, two, [], [], [], [], forward),
        ("maf_backward", "maf_inverse_backward", 6): (x, two, two, [], [], [], [], inverse),
        ("maf", "maf_spline_forward", 6): (x, [], [], [], [spline, 0, 0, 0]),
        ("maf", "maf_spline_inverse", 6): (x, [], [], [], [spline, 0, 1, 0]),
        ("maf_backward", "maf_spline_forward_backward", 6): (x, two, two, [], [], [], [], [spline, 0, 0, 0]),
        ("maf_backward", "maf_spline_inverse_backward", 6): (x, two, two, [], [], [], [], [spline, 0, 1, 0]),
        ("gumbel_softmax", "gumbel_softmax", 30): (x, two, None, 0, False),
        ("gumbel_softmax_backward", "gumbel_softmax_backward", 30): (x, x, two, False),
        ("gumbel_argmax", "gumbel_argmax", 30): (x, None, 0, 1),
        ("gumbel_argmax", "gumbel_argmax_several", 30): (x, None, 0, 2),
        ("maf_pack", None, None): ([x], [], two, 3),
    }
    asked: list[Any] = []
    machine.setattr(_cuda, "choose", lambda *what: (asked.append(what[2]), ("reference", ""))[1])
    for (operator, line, size), args in calls.items():
        _cuda.run(operator, lambda *_: None, *args)
        assert asked.pop() == (None if line is None else (line, size)), (operator, line)
        assert (
            line is None
            or line in _gpu_choices.LINES[operator.replace("maf", "maf_spline" if "spline" in line else "maf")][1]
        )
    lines = {line for _, found in _gpu_choices.LINES.values() for line in found}
    assert {line for _, line, _ in calls if line} == lines, "a line that no call looks at"
    triton = {name for name in _cuda.TRITON if name != "maf_pack"}
    assert triton <= set(_gpu_choices.LINES), "an operator with two backends and nothing to choose by"


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
    monkeypatch.setattr(_cuda, "choose", lambda operator, forced, call: (asked.append(operator), ("reference", ""))[1])
    affine, spline = code_and_numbers(ScaleLaw("exp"))[0], code_and_numbers(RQSpline())[0]
    for codes in ([affine, 0, 0, 0], [affine, 0, 0, 0, spline, 0, 0, 0]):
        x = torch.zeros(2, 3)
        _cuda.run("maf", lambda *_: None, x, [], [], [], codes, [])
        _cuda.run("maf_backward", lambda *_: None, x, None, None, [], [], [], [], codes)
    assert asked == ["maf", "maf_backward", "maf_spline", "maf_spline_backward"]


def test_a_backward_is_forced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd calls it in a thread of its own, which gets what torch keeps for threads, and nothing else."""
    forced: list[str] = []
    monkeypatch.setattr(_cuda, "choose", lambda operator, name, call: (forced.append(name), ("reference", ""))[1])
    monkeypatch.setattr(_backend, "why_unavailable", lambda name: None)

    def run() -> None:
        _cuda.run("gumbel_softmax_backward", lambda *_: None, torch.zeros(2, 3))

    with fk.use_backend("triton"):
        kept = torch._C._get_obj_in_tls(_backend._STASHED)
        run()

    def in_a_thread() -> None:
        torch._C._stash_obj_in_tls(_backend._STASHED, kept)
        run()

    for target in (in_a_thread, run):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    run()
    assert forced == ["triton", "triton", "auto", "auto"]


def test_a_compiled_function_asks_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is traced with it, and what the compiled library says is nothing to trace."""
    if not _cuda._library.is_built():
        pytest.skip("nothing was compiled")
    monkeypatch.setattr(_cuda, "has_kernel", lambda *_: not torch.ops.flowkernels.build_info())

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + len(_cuda.why_not_cuda() or "") + (0 if _cuda.why_not_triton() else 1)

    expected = call(torch.zeros(2))
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(2)), expected)


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
    machine.setattr(_cuda, "choose", lambda *_: ("triton", ""))
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


@pytest.fixture
def small_device(machine: pytest.MonkeyPatch) -> None:
    class Properties:
        shared_memory_per_block_optin = 99 * 1024

    machine.setattr(torch.cuda, "get_device_properties", lambda *_: Properties())


def test_explain_names_every_family(
    machine: pytest.MonkeyPatch, no_memory: object, small_device: None, tmp_path: Path
) -> None:
    machine.setattr(_gpu_choices, "TABLE", tmp_path / "gpu_choices.json")
    text = "\n".join(_cuda.explain())
    for operator in (
        "affine_coupling", "rq_spline", "logistic_mixture", "masked_linear", "maf", "maf_spline", "dequantize",
        "gumbel_softmax", "gumbel_argmax",
    ):  # fmt: skip
        assert f"{operator}: cuda (not measured yet" in text
    assert "backward" not in text
    assert "99 KB of shared memory" in text


def test_explain_says_up_to_which_size(
    machine: pytest.MonkeyPatch, table: Callable[..., None], small_device: None
) -> None:
    machine.setattr(_cuda, "has_kernel", lambda *what: what != ("triton", "maf_spline"))
    table(A_GPU={"capability": [9, 0], "choices": CHOICES})
    text = "\n".join(_cuda.explain())
    why = "(measured on A GPU: somewhere.json)"
    assert f"  affine_coupling: triton up to 4,096 elements, above that cuda {why}" in text
    assert f"  affine_coupling_backward: cuda ({_gpu_choices.NOT_MEASURED})" in text
    assert f"  maf_inverse: cuda up to 64 samples, above that triton {why}" in text
    assert f"  masked_linear: cuda ({_gpu_choices.NOT_MEASURED})" in text
    assert "  maf_spline_inverse: cuda (measured on A GPU: somewhere.json; not triton: there is no Triton" in text


def test_explain_knows_what_is_missing(
    machine: pytest.MonkeyPatch, table: Callable[..., None], small_device: None
) -> None:
    table(A_GPU={"capability": [9, 0], "choices": CHOICES})
    machine.setattr(_cuda, "has_triton", lambda: False)
    text = "\n".join(_cuda.explain())
    assert "  affine_coupling: cuda (measured on A GPU: somewhere.json; not triton: triton is not installed" in text
    assert "up to" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    for name in ("cuda", "triton"):
        assert name not in fk.available_backends()
        with pytest.raises(RuntimeError, match=f"backend '{name}' is not available"), fk.use_backend(name):
            pass
