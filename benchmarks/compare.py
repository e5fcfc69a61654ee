"""Two runs side by side: result files, or commits that are built and measured one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import show
from benchmarks.machine import ROOT

# Runs today's suite on the library of another checkout.
_RUN = """
import sys
checkout, suite = sys.argv[1:3]
sys.path[:] = [checkout] + [p for p in sys.path if p not in ("", checkout, suite)]
import flowkernels
sys.path.insert(0, suite)
from benchmarks import main
sys.exit(main(sys.argv[3:]))
"""


def compare(first: str, second: str, arguments: Sequence[str] = ()) -> int:
    """Prints a table: both medians of ours, and how many times faster the second is.

    Beside it stands the same ratio for the other variants, by their median: how much faster the machine itself was.
    """
    documents = [load(name, arguments) for name in (first, second)]
    rows = rows_of(*documents)
    if not rows:
        print("the two have no case in common")
        return 1
    columns = ("", _label(first, documents[0]), _label(second, documents[1]), "faster", "others meanwhile")
    show.table("flowkernels, p50", columns, rows)
    devices = [document["device"]["processor"] for document in documents]
    if devices[0] != devices[1]:
        print(f"different processors: {devices[0]} and {devices[1]}")
    return 0


def rows_of(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, ...]]:
    def medians(document: dict[str, Any]) -> dict[str, dict[str, float]]:
        return {
            record["id"]: {v["name"]: v["p50"] for v in record["variants"]}
            for record in document["results"]
            if record["status"] == "ok"
        }

    old, new = medians(before), medians(after)
    rows = []
    for case in old.keys() & new.keys():
        a, b = old[case], new[case]
        if "flowkernels" not in a or "flowkernels" not in b:
            continue
        others = sorted(a[name] / b[name] for name in a.keys() & b.keys() if not name.startswith("flowkernels"))
        rows.append(
            (
                case,
                show.seconds(a["flowkernels"]),
                show.seconds(b["flowkernels"]),
                show.times(a["flowkernels"] / b["flowkernels"]),
                show.times(others[len(others) // 2] if others else None),
            )
        )
    order = {record["id"]: i for i, record in enumerate(after["results"])}
    return sorted(rows, key=lambda row: order[row[0]])


def _label(name: str, document: dict[str, Any]) -> str:
    return Path(name).stem if Path(name).is_file() else f"{name} ({document['commit']})"


def load(name: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """A result file, or what a run of that commit gives."""
    if Path(name).is_file():
        document: dict[str, Any] = json.loads(Path(name).read_text())
        if document.get("format") != 1:
            raise ValueError(f"{name} must be a result file of format 1, got format {document.get('format')!r}")
        return document
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"--compare takes result files or commits, {name!r} is neither")
    return _measure(done.stdout.strip(), arguments)


def _measure(commit: str, arguments: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        checkout, result = Path(folder) / "checkout", Path(folder) / "result.json"
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(checkout), commit], check=True
        )
        try:
            print(f"building {commit[:10]}", file=sys.stderr)
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            if os.environ.get("FLOWKERNELS_BUILD") != "0":
                subprocess.run(build, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
            run = [sys.executable, "-c", _RUN, str(checkout), str(ROOT), *arguments, "--json", str(result)]
            status = subprocess.run(run, cwd=folder, stdout=subprocess.DEVNULL).returncode
            if not result.is_file():
                raise ValueError(f"the run of {commit[:10]} failed with status {status}")
            document: dict[str, Any] = json.loads(result.read_text())
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(checkout)], check=False)
    return document | {"commit": commit[:10], "changed": False}
