"""What the figures were measured on, and how fast that machine is at the two things that bound a kernel."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "nflows", "zuko", "normflows", "pyro-ppl", "FrEIA", "numpy")


def describe() -> dict[str, Any]:
    """Date, commit, versions and device of this run."""
    import flowkernels
    from flowkernels import _library

    versions = {"python": platform.python_version(), "flowkernels": flowkernels.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    built = _library.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "--short=10", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions,
        "device": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "isa": built.get("isa", "not built"),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "compiler": built.get("compiler", "none"),
            "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        },
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """The model's name, family and number: cloud machines often give no more than the vendor's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = about.get("model name", platform.machine())
    if "cpu family" in about and "model" in about:
        name += f" (family {about['cpu family']} model {about['model']})"
    return name


def ceilings(seconds: float = 0.5) -> dict[str, float]:
    """The best rates seen: a 64 MB copy into a buffer that exists, and a float32 GEMM of 2048^3.

    The best and not the median: a ceiling is what nothing gets past.
    """
    source = torch.ones(1 << 24)
    target = torch.empty_like(source).zero_()
    a, b, c = (torch.ones(2048, 2048) for _ in range(3))
    copy = _best(lambda: target.copy_(source), seconds)
    gemm = _best(lambda: torch.mm(a, b, out=c), seconds)
    return {"copy_gbs": 2 * source.nbytes / copy / 1e9, "gemm_gflops": 2 * 2048**3 / gemm / 1e9}


def _best(run: Any, seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best
