"""nvcc compiles every .cu file for sm_80 and sm_90a, and nothing spills."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import build

# Most registers that a kernel may take: 64 Ki registers over the threads of a block that have to be resident.
REGISTERS = {
    "maf_kernel": 255,
    "maf_spline_kernel": 255,
    "maf_weight_gradient_kernel": 168,
    "masked_product_kernel": 168,
    "": 128,
}
# Bytes of a stack frame that a kernel declares: the exponentials of two axes with 64 bins in float64, in each of six
# branches (three kinds of splines, sweep or density). Arrays that are indexed at run time lie there; that is no spill.
STACK = {"maf_spline_kernel": 6 * 2 * 64 * 8 + 64, "": 0}


def limit_of(limits: dict[str, int], kernel: str) -> int:
    return next(limit for name, limit in limits.items() if name in kernel)


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
@pytest.mark.parametrize("source", build.SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(nvcc: str, source: Path, architecture: str, record_property: object) -> None:
    usages = build.nvcc_report(source, architecture)
    for usage in usages:
        assert usage.spill_stores == usage.spill_loads == 0, usage
        assert usage.stack <= limit_of(STACK, usage.kernel), usage
        assert usage.registers <= limit_of(REGISTERS, usage.kernel), usage
    if source.stem != "build_info":
        assert usages, "ptxas reported no kernel"


def test_the_gate_sees_spills() -> None:
    text = (
        "ptxas info    : Function properties for kernel\n"
        "    8 bytes stack frame, 16 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers\n"
        "ptxas info    : Function properties for called\n"
        "    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Compiling entry function 'next' for 'sm_80'\n"
    )
    assert build.parse_ptxas(text) == [build.Usage("kernel", 128, 8, 16, 12), build.Usage("called", 0, 0, 4, 4)]


def test_every_kernel_is_reported(nvcc: str) -> None:
    """The report is read whole: one entry for each __global__ function and type."""
    source = next(path for path in build.SOURCES if path.stem == "affine_coupling")
    assert len(build.nvcc_report(source, "90a")) == 16, os.linesep.join(map(str, build.nvcc_report(source, "90a")))


def exported_functions(source: Path) -> set[str]:
    """The functions that a source defines for the linker, with their parameters."""
    text = re.sub(r"//.*|^template.*\n.*", "", source.read_text(), flags=re.MULTILINE)
    found = re.findall(r"^(?!static |inline )\w[\w:<>, ]*[ &*](\w+)\(([^;{}]*)\) \{$", text, flags=re.MULTILINE)
    return {f"{name}({' '.join(parameters.split())})" for name, parameters in found}


def test_no_function_is_defined_on_both_sides() -> None:
    """CPU and CUDA sources become one library: of a name and its parameters the linker takes one definition."""
    here = {name for source in build.SOURCES for name in exported_functions(source)}
    there = {name for source in build.ROOT.glob("csrc/**/*.cpp") for name in exported_functions(source)}
    assert len(here) > 5
    assert len(there) > 10
    assert not here & there
