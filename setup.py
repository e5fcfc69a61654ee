"""Builds flowkernels._C, the C++ kernels.

FLOWKERNELS_BUILD=0   pure Python: the reference on the CPU, Triton on a GPU; needs no compiler.
FLOWKERNELS_CUDA      auto (default): build the CUDA kernels when nvcc and a CUDA build of torch are here; 0 never;
                      1 or fail. Whether a GPU is plugged in is never asked.

The library uses PyTorch's stable ABI (torch >= 2.10) and no Python API, so one build serves many versions of both.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10, the oldest torch that a build runs with


def wants_cuda(cuda_build_of_torch: bool) -> bool:
    choice = os.environ.get("FLOWKERNELS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FLOWKERNELS_CUDA must be auto, 0 or 1, got {choice!r}")
    sources = list((ROOT / "csrc/cuda").glob("*.cu"))
    nvcc = shutil.which("nvcc") is not None
    if choice == "1" and not (nvcc and cuda_build_of_torch and sources):
        raise SystemExit(
            f"FLOWKERNELS_CUDA=1 needs nvcc (found: {nvcc}) and a CUDA build of torch (found: {cuda_build_of_torch})"
        )
    return choice != "0" and nvcc and cuda_build_of_torch and bool(sources)


def extensions() -> tuple[list, dict]:
    build = os.environ.get("FLOWKERNELS_BUILD", "1")
    if build not in ("0", "1"):
        raise SystemExit(f"FLOWKERNELS_BUILD must be 0 or 1, got {build!r}")
    if build == "0":
        return [], {}
    from torch.utils import cpp_extension

    cuda = wants_cuda(cpp_extension.CUDA_HOME is not None and __import__("torch").version.cuda is not None)
    sources = sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    if cuda:
        sources += sorted((ROOT / "csrc/cuda").glob("*.cu"))
    define = ["-DTORCH_TARGET_VERSION=" + STABLE_ABI]
    if cuda:
        define += ["-DUSE_CUDA", "-DFLOWKERNELS_CUDA"]
    # Flags that change no value: log-dets need right infinities and NaNs, so never -ffast-math or its parts that
    # assume them away. Instruction sets are chosen at run time (csrc/cpu/foreach_isa.h), never by -march.
    cxx = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-ffp-contract=fast", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-g0"]
    nvcc = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extension = make(
        "flowkernels._C",
        [str(p.relative_to(ROOT)) for p in sources],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(p) for p in (ROOT / "csrc").rglob("*.h")],
        extra_compile_args={"cxx": define + cxx, "nvcc": define + nvcc},
        extra_link_args=["-s"],
        py_limited_api=True,
    )
    return [extension], {"build_ext": cpp_extension.BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
