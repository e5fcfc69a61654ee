"""Builds csrc/cuda/*.cu without a GPU: as host C++ through host_shim.h, and by nvcc for real architectures.

Both work against a PyTorch without CUDA, because the kernels use nothing of PyTorch but its stable headers.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
STABLE_ABI = "0x020a000000000000"
ARCHITECTURES = ("80", "90a")


def _include_flags() -> list[str]:
    return [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__path__[0]) / 'include'}"]


def _stamp(*extra: str) -> str:
    """Changes with everything that a build of csrc/cuda depends on."""
    digest = hashlib.sha256("\0".join((torch.__version__, *extra)).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "tests/cuda").glob("*.h"), Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _cached(source: Path, kind: str, suffix: str) -> Path:
    folder = ROOT / "build" / "without_gpu"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((_stamp(kind) + source.read_text()).encode()).hexdigest()[:16]
    return folder / f"{source.stem}-{kind}-{digest}{suffix}"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def host_library(source: Path) -> Path:
    """One .cu file as a shared library whose operators run on CPU tensors."""
    target = _cached(source, "host", ".so")
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.part")
        _run(
            [
                os.environ.get("CXX", "c++"),
                "-x",
                "c++",
                "-std=c++20",
                "-O1",
                "-g0",
                "-fPIC",
                "-shared",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-unknown-pragmas",
                "-Werror",
                "-DFK_HOST_SHIM",
                f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
                f"-I{ROOT / 'tests/cuda'}",
                *_include_flags(),
                str(source),
                "-o",
                str(partial),
                f"-L{Path(torch.__path__[0]) / 'lib'}",
                "-ltorch",
                "-ltorch_cpu",
                "-lc10",
            ]
        )
        partial.rename(target)
    return target


def load_host_libraries() -> None:
    """All .cu files, so that torch.ops.flowkernels_cuda runs on CPU tensors."""
    for source in SOURCES:
        torch.ops.load_library(str(host_library(source)))


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel, or of a function that kernels call: its registers are part of theirs."""

    kernel: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def nvcc() -> str | None:
    return shutil.which("nvcc")


def nvcc_report(source: Path, architecture: str) -> list[Usage]:
    """Compiles one .cu file for one architecture, with the flags of setup.py, and reads ptxas' report."""
    target = _cached(source, f"sm_{architecture}", ".txt")
    if not target.exists():
        text = _run(
            [
                nvcc() or "nvcc",
                "-std=c++20",
                "-O3",
                f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
                "--expt-relaxed-constexpr",
                "-DUSE_CUDA",
                "-DFLOWKERNELS_CUDA",
                f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
                "-Xcompiler",
                "-fPIC",
                "-Xptxas",
                "-v",
                *_include_flags(),
                "-c",
                str(source),
                "-o",
                str(target.with_suffix(".o")),
            ]
        )
        target.with_suffix(".o").unlink()
        target.write_text(text)
    return parse_ptxas(target.read_text())


def parse_ptxas(text: str) -> list[Usage]:
    found = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"(?:\s+ptxas info\s+: Used (\d+) registers)?",
        text,
    )
    return [Usage(name, int(regs or 0), int(stack), int(st), int(ld)) for name, stack, st, ld, regs in found]
