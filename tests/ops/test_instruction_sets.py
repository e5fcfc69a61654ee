"""Every operator on the instruction sets below this machine's best: each has its own compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flowkernels as fk

HERE = Path(__file__)
OPERATORS = sorted(path.stem.removeprefix("test_") for path in HERE.parent.glob("test_*.py") if path != HERE)
# Tests of kernels that the values of an operator do not reach.
MORE = {
    "affine_coupling": ("test_masks", "test_half_precision", "test_extremes"),
    "maf": ("test_float", "test_batch_sizes", "test_many_blocks", "test_activations", "test_laws_and_forms"),
    "masked_linear": ("test_degrees", "test_batch_sizes", "test_widths", "test_narrow", "beyond"),
}

pytestmark = pytest.mark.skipif("cpu" not in fk.available_backends(), reason="needs the compiled library")
every_lower_set = pytest.mark.parametrize("isa", ["baseline", "avx2"])


@every_lower_set
def test_the_environment_chooses(isa: str) -> None:
    check = f"from flowkernels._library import build_info as b; assert b()['isa'] in ('baseline', {isa!r})"
    subprocess.run([sys.executable, "-c", check], env={**os.environ, "FLOWKERNELS_ISA": isa}, check=True)


@pytest.mark.slow
@every_lower_set
@pytest.mark.parametrize("op", OPERATORS)
def test_operator(op: str, isa: str) -> None:
    # The reference has no kernels. A selection that selects nothing is a failure, too.
    tests = f"({' or '.join(('test_values', *MORE.get(op, ())))}) and not reference"
    file = str(HERE.with_name(f"test_{op}.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", tests]
    environment = {**os.environ, "FLOWKERNELS_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
