"""What README.md shows works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_other_blocks_run(block: str) -> None:
    if "nflows" in block:
        pytest.importorskip("nflows")
    exec(compile(block, "README.md", "exec"), {})


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    told = capsys.readouterr().out
    found = re.match(r"(-?[\d.]+) nats, samples differ by (\S+)\n", told)
    assert found, told
    # Eight independent standard steps have an entropy of 4 log(2 pi e) = 11.35 nats: no fit ends far below.
    assert 11 < float(found[1]) < 12
    assert float(found[2]) < 1e-4
    assert torch.is_tensor(names["log_prob"])
    assert "MAF" in told


def test_there_is_an_example() -> None:
    assert BLOCKS


def test_it_opens_with_the_two_commands() -> None:
    lines = [line.strip() for line in TEXT.splitlines() if line.strip()]
    assert lines[0] == "# flowkernels"
    assert lines[1].startswith("make demo")
    assert lines[2].startswith("make test")


def test_links_and_make_targets_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make (\w+)|^    make (\w+)", TEXT, flags=re.MULTILINE)):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), name


def test_the_generated_section_is_marked() -> None:
    assert TEXT.count("<!-- figures:begin -->") == TEXT.count("<!-- figures:end -->") == 1
    assert TEXT.index("<!-- figures:begin -->") < TEXT.index("<!-- figures:end -->")


def test_commands_of_the_readme_exist() -> None:
    for command in set(re.findall(r"`python -m flowkernels (\w+)", TEXT)):
        run = subprocess.run(
            [sys.executable, "-m", "flowkernels", command, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
