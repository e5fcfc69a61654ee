"""Which implementation runs, and what happens where there is only one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import flowkernels as fk
from flowkernels import _backend, _library


def test_the_reference_is_always_there() -> None:
    assert fk.available_backends()[0] == "reference"
    assert _backend.why_unavailable("reference") is None


def test_use_backend_nests_and_ends() -> None:
    assert _backend.backend() == "auto"
    with fk.use_backend("reference"):
        assert _backend.backend() == "reference"
        with fk.use_backend("auto"):
            assert _backend.backend() == "auto"
        assert _backend.backend() == "reference"
    assert _backend.backend() == "auto"
    with pytest.raises(KeyError), fk.use_backend("reference"):
        raise KeyError
    assert _backend.backend() == "auto"


def test_the_choice_is_per_thread() -> None:
    seen = []
    with fk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backend.backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_an_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match=r"backend must be one of auto, reference, .* got 'gpu'"),
        fk.use_backend("gpu"),
    ):
        pass


@pytest.mark.parametrize("name", [n for n in _backend.NAMES if _backend.why_unavailable(n)])
def test_an_unavailable_backend_raises_with_the_reason(name: str) -> None:
    with (
        pytest.raises(RuntimeError, match=f"backend '{name}' is not available: "),
        fk.use_backend(name),
    ):
        pass


def test_the_backend_decides_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowkernels.ops.affine_coupling import reference

    calls = []
    plain = reference.affine_coupling
    monkeypatch.setattr(reference, "affine_coupling", lambda *args: calls.append(1) or plain(*args))
    x = torch.zeros(2, 3)
    with fk.use_backend("reference"):
        fk.ops.affine_coupling(x, x, x)
    assert len(calls) == 1
    if "cpu" in fk.available_backends():
        fk.ops.affine_coupling(x, x, x)
        assert len(calls) == 1


# ---- without the compiled library --------------------------------------------------------------

UNBUILT = """
import torch
import flowkernels as fk
x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
y, logdet = fk.ops.affine_coupling(x, x, x, mask=[0, 2])
logdet.sum().backward()
assert x.grad is not None
assert fk.available_backends() == ("reference",), fk.available_backends()
try:
    with fk.use_backend("cpu"):
        pass
except RuntimeError as error:
    assert EXPECTED in str(error), error
else:
    raise AssertionError("use_backend('cpu') did not raise")
"""


def copy_without_library(to: Path) -> Path:
    shutil.copytree(Path(fk.__file__).parent, to / "flowkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return to


def run(script: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{script}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_importing_needs_no_compiled_library(tmp_path: Path) -> None:
    run(f"EXPECTED = 'the C++ kernels were not built'\n{UNBUILT}", copy_without_library(tmp_path))


def test_a_library_that_does_not_load_is_named_with_its_error(tmp_path: Path) -> None:
    folder = copy_without_library(tmp_path)
    (folder / "flowkernels" / "_C.abi3.so").write_bytes(b"no library")
    run(f"EXPECTED = '_C.abi3.so does not load with torch'\n{UNBUILT}", folder)


def test_importing_is_lazy(tmp_path: Path) -> None:
    run(
        "import flowkernels, sys\n"
        "optional = {'triton', 'sklearn', 'matplotlib', 'hypothesis', 'pytest', 'nflows', 'zuko'}\n"
        "loaded = optional & set(sys.modules)\n"
        "assert not loaded, loaded",
        copy_without_library(tmp_path),
    )


@pytest.mark.skipif("cpu" not in fk.available_backends(), reason="needs the compiled library")
def test_build_info_says_what_was_built() -> None:
    info = _library.build_info()
    assert info["isa"] in info["isa_built"].split(",")
    assert info["compiler"]
    assert info["torch_abi"] == "2.10"
