"""The Triton kernels, interpreted, against the references. Interpretation is decided when a kernel is defined, so
the checks
(tests/gpu/interpreted.py) run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("what", ["affine_coupling", "rq_spline", "masked_linear", "maf", "maf_splines", "gumbel"])
def test_interpreted(triton: object, what: str) -> None:
    run(what)


def test_either_layout(triton: object, host_kernels: object) -> None:
    run("either_layout")


def run(what: str) -> None:
    path = os.pathsep.join(
        [str(HERE), str(HERE.parent / "cuda"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "interpreted.py"), what],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
