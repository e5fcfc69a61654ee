"""``python -m flowkernels``: what it prints, and what it says to a wrong command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import flowkernels as fk
from flowkernels import _library, demo
from flowkernels.__main__ import main


def test_info_names_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    assert told.strip() == fk.explain()
    assert told.startswith(f"flowkernels {fk.__version__}\n")
    for name in ("reference", "cpu", "triton", "cuda"):
        (line,) = re.findall(rf"^  {name} +((?:not )?available: .+)$", told, flags=re.MULTILINE)
        assert line.startswith("available") == (name in fk.available_backends())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == fk.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: info|demo|bench"),
        (["sing"], "invalid choice: 'sing'"),
        (["info", "--loud"], "unrecognized arguments: --loud"),
        (["demo", "--model", "mfa"], "there is no model 'mfa', choose from "),
        (["demo", "--model", "common"], "there is no model 'common'"),
        (["demo", "--model", "maf", "all"], "there is no model 'all'"),
        (["demo", "--epochs", "0"], "must be >= 1, got 0"),
        (["demo", "--epochs", "many"], "argument --epochs: 'many' is not a whole number"),
        (["demo", "--model", "maf", "--study", "estimators"], "maf has no studies, got 'estimators'"),
        (["demo", "--study", "weather"], "got 'weather'"),
        (["demo", "--out", __file__], "is not a directory"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    streams = capsys.readouterr()
    assert message in streams.err
    assert streams.out == ""


def test_models_are_found_by_name() -> None:
    assert "maf" in demo.models()
    folder = Path(demo.__file__).parent
    assert all((folder / f"{name}.py").is_file() for name in demo.models())


def test_bench_without_the_source_tree_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fk, "__file__", str(tmp_path / "flowkernels" / "__init__.py"))
    assert main(["bench", "--quick"]) == 2
    assert "the benchmarks come with the source tree" in capsys.readouterr().err


def test_bench_hands_its_options_and_status_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("def main(arguments):\n    return len(arguments) + 40\n")
    monkeypatch.setattr(fk, "__file__", str(tmp_path / "flowkernels" / "__init__.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "benchmarks"}
    for name in kept:
        monkeypatch.delitem(sys.modules, name)
    try:
        assert main(["bench", "--op", "maf"]) == 42
    finally:
        sys.modules.pop("benchmarks", None)


def test_info_without_a_library_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_library, "load_error", "it was eaten")
    assert main(["info"]) == 0
    told = capsys.readouterr().out
    assert "C++ kernels: none, it was eaten" in told
    assert re.search(r"^  cpu +not available: it was eaten$", told, flags=re.MULTILINE)
    assert "slow, because it was eaten" in told
