"""Install flowkernels the two ways a user can, out of sight of the source tree, and use it.

    python tests/packaging_check.py            # both
    python tests/packaging_check.py pure       # FLOWKERNELS_BUILD=0, with a compiler that always fails
    python tests/packaging_check.py compiled   # a wheel with the C++ kernels

Not a pytest module: it builds and installs, which takes as long as compiling does. The sources go through
an sdist, so a file missing from MANIFEST.in is noticed. The environments borrow PyTorch and the build tools
from the running interpreter by path; an editable install of flowkernels in that interpreter stays invisible
to them, because the .pth files of a borrowed directory are not read. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BORROWED = ("torch", "setuptools", "wheel", "pip", "ninja", "typing_extensions")
NOT_SOURCES = shutil.ignore_patterns(
    ".*", "build", "dist", "out", "*.egg-info", "*.so", "*.pyd", "*.o", "__pycache__", "venv"
)

# Stands for the table that GPUs are measured for, so that there is one to be packed.
CHOICES = '{"Nothing": {"capability": [0, 0], "choices": {}}}'

# What runs inside each installation. Only public names; the same seed gives the same network in both.
PROBE = """
import json, pathlib, sys
import torch
import flowkernels as fk
from importlib.metadata import version

home = pathlib.Path(fk.__file__).parent
torch.manual_seed(0)
flow = fk.models.MAF(5, hidden_features=(16, 16), transforms=2)
x = torch.linspace(-2, 2, 35).reshape(7, 5)
log_prob = flow.log_prob(x)
with torch.no_grad():
    samples = flow.sample(11, seed=3)
log_prob.sum().backward()
json.dump({
    "home": str(home),
    "metadata": version("flowkernels"),
    "typed": (home / "py.typed").is_file(),
    "choices": fk._gpu_choices.TABLE.read_text(),
    "libraries": sorted(p.name for p in home.glob("_C*")),
    "backends": list(fk.available_backends()),
    "log_prob": log_prob.tolist(),
    "samples": list(samples.shape),
    "finite": bool(samples.isfinite().all()),
    "gradients": all(p.grad is not None and bool(p.grad.isfinite().all()) for p in flow.parameters()),
}, sys.stdout)
"""


def call(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command away from the source tree and return what it printed; on failure show everything."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    run = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{run.stdout}\n{run.stderr}\nexit status {run.returncode}")
    return run.stdout


def borrowed_directories() -> list[str]:
    """The site directories that hold PyTorch and the build tools."""
    found = []
    for name in BORROWED:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            path = Path(spec.origin).parent
            found.append(str(path.parent if spec.submodule_search_locations else path))
    return list(dict.fromkeys(found))


def environment(where: Path) -> Path:
    """A new virtual environment that borrows PyTorch; returns its interpreter."""
    venv.create(where, with_pip=False)
    python = where / "bin" / "python"
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=where).strip()
    Path(site, "borrowed.pth").write_text("\n".join(borrowed_directories()) + "\n")
    return python


def source_distribution(python: Path, where: Path) -> Path:
    """Copy what a clean checkout holds, pack it as an sdist and remove the copy."""
    tree = where / "tree"
    shutil.copytree(ROOT, tree, ignore=NOT_SOURCES)
    (tree / "flowkernels" / "gpu_choices.json").write_text(CHOICES)
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    call(python, "-c", build, where, cwd=tree, FLOWKERNELS_BUILD="0")
    shutil.rmtree(tree)
    (archive,) = where.glob("flowkernels-*.tar.gz")
    return archive


def probe(python: Path, where: Path) -> dict:
    """Run PROBE in an installation and check what holds for both kinds."""
    told = json.loads(call(python, "-c", PROBE, cwd=where).splitlines()[-1])
    version: dict[str, str] = {}
    exec((ROOT / "flowkernels" / "_version.py").read_text(), version)
    assert Path(told["home"]).is_relative_to(where), f"imported from {told['home']}, not from {where}"
    assert told["metadata"] == version["__version__"], told["metadata"]
    assert told["typed"], "py.typed is missing from the package"
    assert told["choices"] == CHOICES, told["choices"]
    assert "reference" in told["backends"], told["backends"]
    assert len(told["log_prob"]) == 7, told["log_prob"]
    assert all(map(math.isfinite, told["log_prob"])), told["log_prob"]
    assert told["samples"] == [11, 5], told["samples"]
    assert told["finite"], "a sample is not finite"
    assert told["gradients"], "a gradient is missing or not finite"
    return told


def install(kind: str, archive: Path, where: Path) -> dict:
    """Install the sdist one way into an environment of its own and probe it there."""
    where.mkdir()
    python = environment(where / "venv")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    if kind == "pure":
        broken = {"CC": "false", "CXX": "false", "FLOWKERNELS_BUILD": "0"}
        call(python, "-m", "pip", "install", "--ignore-installed", *options, archive, cwd=where, **broken)
    else:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # for ninja
        build = {"FLOWKERNELS_BUILD": "1", "PATH": path}
        call(python, "-m", "pip", "wheel", *options, "-w", where, archive, cwd=where, **build)
        (wheel,) = where.glob("flowkernels-*.whl")
        print(f"  {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
        call(python, "-m", "pip", "install", "--ignore-installed", *options, wheel, cwd=where)
    told = probe(python, where)
    if kind == "pure":
        assert not told["libraries"], f"a compiled library slipped in: {told['libraries']}"
        assert "cpu" not in told["backends"], told["backends"]
    else:
        assert told["libraries"], "the wheel holds no compiled library"
        assert "cpu" in told["backends"], told["backends"]
    print(f"  {kind}: ok, backends {', '.join(told['backends'])}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="pure|compiled", default=["pure", "compiled"])
    kinds = parser.parse_args().kinds
    if unknown := set(kinds) - {"pure", "compiled"}:
        parser.error(f"unknown kind of installation: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="flowkernels-packaging-") as directory:
        where = Path(directory).resolve()
        archive = source_distribution(environment(where / "build"), where)
        told = [install(kind, archive, where / kind) for kind in kinds]
    if len(told) == 2:
        # The same network through the reference and through the compiled kernels. fp32 sums of a few tens of
        # terms: 1e-4 is far above their rounding and far below what a wrong mask or formula would make.
        for reference, compiled in zip(*(t["log_prob"] for t in told), strict=True):
            assert math.isclose(reference, compiled, rel_tol=1e-4, abs_tol=1e-4), (reference, compiled)
        print("  both installations agree on the density")


if __name__ == "__main__":
    main()
