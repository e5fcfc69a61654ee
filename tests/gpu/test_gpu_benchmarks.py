"""`make gpu` without a device: every case runs once, on kernels built for the host and interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE.parent / "cuda"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=HERE.parents[1], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": PATH, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_case_runs(host_kernels: Any, triton: object) -> None:
    script = """
import json, build
build.load_host_libraries()
from benchmarks import gpu
rows = gpu.dry()
print(gpu.table(rows))
print("ROWS", json.dumps(rows))
"""
    out = run("-c", script, TRITON_INTERPRET="1")
    rows = json.loads(out.split("ROWS", 1)[1])
    assert not [row for row in rows if "failed" in row or "wrong" in row]
    seen = {(row["family"], row["variant"]) for row in rows}
    for family in ("affine_coupling", "maf", "gumbel_softmax", "masked_linear"):
        assert {(family, "cuda"), (family, "triton")} <= seen, family
    assert {("rq_spline", "cuda"), ("logistic_mixture", "cuda"), ("dequantize", "cuda")} <= seen


def test_a_failing_case_does_not_end_its_part(tmp_path: Path) -> None:
    from benchmarks.gpu import Report

    report = Report(tmp_path / "rows.json")
    with report.trying("family", "first"):
        raise ValueError("nothing there")
    report.add(family="family", case="second", variant="ours", ms=1.0)
    rows = json.loads(report.path.read_text())
    assert rows[0]["failed"] == "ValueError: nothing there"
    assert rows[1]["case"] == "second"


def test_help() -> None:
    assert "--only" in run("-m", "benchmarks.gpu", "--help")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device() -> None:
    with pytest.raises(AssertionError, match="torch sees no CUDA device; nothing was run"):
        run("-m", "benchmarks.gpu")
