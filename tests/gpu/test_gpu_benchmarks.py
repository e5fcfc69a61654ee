"""`make gpu` without a device: every case runs once, on kernels built for the host and interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_choices
from flowkernels import _cuda, _gpu_choices

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
    for family in ("affine_coupling", "maf", "gumbel_softmax", "gumbel_argmax", "masked_linear"):
        assert {(family, "cuda"), (family, "triton")} <= seen, family
    assert {("rq_spline", "cuda"), ("logistic_mixture", "cuda"), ("dequantize", "cuda")} <= seen
    # What there are two backends for is timed on both, of several sizes, with all that a choice needs.
    cases: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if "line" in row and row["dtype"] == "float32":
            assert row["call_ms"] > 0
            assert isinstance(row["size"], int)
            cases.setdefault((row["line"], row["variant"]), set()).add(row["case"])
    for operator in set(_cuda.TRITON) - {"maf_pack"}:
        for line in _gpu_choices.LINES[operator][1]:
            assert len(cases[line, "cuda"]) >= 3, line
            assert cases[line, "cuda"] == cases[line, "triton"], line


def row(line: str, size: int, backend: str, ms: float, case: str = "a case", **more: Any) -> dict[str, Any]:
    return {
        "line": line, "size": size, "variant": backend, "call_ms": ms, "case": case, "dtype": "float32", **more
    }  # fmt: skip


def recorded(device: str, date: str, *rows: dict[str, Any], capability: tuple[int, int] = (9, 0)) -> str:
    return json.dumps({"about": {"device": device, "capability": capability, "date": date}, "rows": rows})


def test_the_table_of_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From rows made up to the choice, through the file."""
    both = [row("affine_coupling", 100, "cuda", 2.0), row("affine_coupling", 100, "triton", 1.0)]
    both += [row("affine_coupling", 10_000, "cuda", 3.0), row("affine_coupling", 10_000, "triton", 4.0)]
    ignored = [
        row("affine_coupling", 10_000, "cuda", 9.0, dtype="bfloat16"),
        row("affine_coupling", 10_000, "eager", 0.1),
        row("affine_coupling", 1, "cuda", 0.1),  # without the other there is nothing to choose
        row("maf_inverse", 7, "cuda", 0.1),
        {"family": "affine_coupling", "case": "a case", "variant": "triton", "failed": "something"},
    ]
    # Ten times faster in one case counts more than twice slower in another, whatever takes longer.
    mixed = [
        row("maf_forward", 64, "cuda", 0.1, "short"), row("maf_forward", 64, "triton", 1.0, "short"),
        row("maf_forward", 64, "cuda", 200.0, "long"), row("maf_forward", 64, "triton", 100.0, "long"),
    ]  # fmt: skip
    older = [row("maf_forward", 64, "cuda", 2.0), row("maf_forward", 64, "triton", 1.0)]
    older += [row("gumbel_softmax", 8, "cuda", 2.0), row("gumbel_softmax", 8, "triton", 1.0)]
    (tmp_path / "gpu-b.json").write_text(recorded("A GPU", "2026-01-02 00:00 UTC", *both, *ignored, *mixed))
    (tmp_path / "gpu-c.json").write_text(recorded("A GPU", "2026-01-01 00:00 UTC", *older))
    (tmp_path / "gpu-a.json").write_text(recorded("Old GPU", "2026-01-03 00:00 UTC", *both[:2], capability=(8, 0)))
    (tmp_path / "flows.json").write_text("[]")
    target = tmp_path / "table.json"
    files = sorted(tmp_path.glob("gpu-*"))
    monkeypatch.setattr(Path, "glob", lambda *_: iter(files))
    gpu_choices.write(tmp_path, target)
    assert json.loads(target.read_text()) == {
        "A GPU": {
            "capability": [9, 0],
            "choices": {
                "affine_coupling": {"source": "gpu-b.json", "up_to": [[1000, "triton"], [None, "cuda"]]},
                "gumbel_softmax": {"source": "gpu-c.json", "up_to": [[None, "triton"]]},
                "maf_forward": {"source": "gpu-b.json", "up_to": [[None, "cuda"]]},
            },
        },
        "Old GPU": {
            "capability": [8, 0],
            "choices": {"affine_coupling": {"source": "gpu-a.json", "up_to": [[None, "triton"]]}},
        },
    }
    text = target.read_text()
    assert '   "maf_forward": {"source": "gpu-b.json", "up_to": [[null, "cuda"]]}\n' in text
    files.reverse()  # a folder has no order
    gpu_choices.write(tmp_path, target)
    assert target.read_text() == text
    monkeypatch.setattr(_gpu_choices, "TABLE", target)
    _gpu_choices.table.cache_clear()
    try:
        ends, source = _gpu_choices.first_choices("affine_coupling", "A GPU", (9, 0))
    finally:
        _gpu_choices.table.cache_clear()
    assert ends == [(1000, "triton"), (float("inf"), "cuda")]
    assert source == "measured on A GPU: gpu-b.json"


def test_no_measurement_no_table(tmp_path: Path) -> None:
    target = tmp_path / "table.json"
    target.write_text("what an older run said")
    assert gpu_choices.write(tmp_path, target) == {}
    assert not target.exists()


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="they would run")
def test_every_test_is_in_one_of_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device all of them skip."""
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 4)
    monkeypatch.setenv("CI", "")
    report = gpu.Report(tmp_path / "tests.json")
    gpu.tests(report)
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "tests/gpu"],
        cwd=gpu.ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    (row,) = report.rows
    assert row["variant"] == f"{collected.count('::')} skipped"


def test_a_part_that_takes_too_long_ends_with_all_it_started(tmp_path: Path) -> None:
    left = tmp_path / "left"
    inner = f"import time; time.sleep(2); open({str(left)!r}, 'w')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    assert gpu.run_for([sys.executable, "-c", outer], 0.5) == "ran out of time"
    assert gpu.run_for([sys.executable, "-c", "raise SystemExit(3)"], 20) == "exit status 3"
    assert gpu.run_for([sys.executable, "-c", ""], 20) == ""
    time.sleep(2)
    assert not left.exists()
