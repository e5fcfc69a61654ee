"""From recorded runs of `make gpu` to the table that `auto` goes by: ``python -m benchmarks.gpu --table``.

A line of the table (flowkernels/_gpu_choices.py) comes from the newest run on a device that timed both backends for it,
in float32. At each size the backend with the smaller product of medians over that size's cases is chosen; between two
sizes that do not agree, their geometric mean is where the choice changes. Medians are those of plain calls, which the
launch, from Python or from C++, is part of.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowkernels._gpu_choices import BACKENDS, TABLE

Row = dict[str, Any]


def write(results: Path, target: Path = TABLE) -> dict[str, Any]:
    """Reads results/gpu-*.json and writes the table, or no file where nothing was measured; returns what it holds."""
    runs = [(path.name, json.loads(path.read_text())) for path in results.glob("gpu-*.json")]
    runs.sort(key=lambda run: (run[1]["about"]["date"], run[0]))
    devices: dict[str, Any] = {}
    for name, run in runs:  # the newest last: it replaces what older ones said
        about = run["about"]
        found = {line: {"source": name, "up_to": up_to} for line, up_to in choices(run["rows"]).items()}
        if found:
            entry = devices.setdefault(about["device"], {"capability": about["capability"], "choices": {}})
            entry["choices"] |= found
    target.unlink(missing_ok=True)
    if devices:
        target.write_text(in_lines(devices))
    return devices


def choices(rows: Sequence[Row]) -> dict[str, list[list[Any]]]:
    """[[size up to which, backend], ...] of each line that both backends were timed for, the last without end."""
    times: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for row in rows:
        if row.get("dtype") == "float32" and "call_ms" in row and row["variant"] in BACKENDS:
            times[row["line"]][row["size"]][row["case"]][row["variant"]] = row["call_ms"]
    found = {}
    for line in sorted(times):
        fastest = []
        for size, cases in sorted(times[line].items()):
            both = [case for case in cases.values() if len(case) == len(BACKENDS)]
            if both:
                fastest.append((size, min(BACKENDS, key=lambda name: sum(math.log(case[name]) for case in both))))
        if fastest:
            found[line] = [
                [math.isqrt(size * following), name]
                for (size, name), (following, then) in itertools.pairwise(fastest)
                if name != then
            ] + [[None, fastest[-1][1]]]
    return found


def in_lines(devices: dict[str, Any]) -> str:
    """As JSON, one line of text for each line of the table."""
    parts = []
    for device in sorted(devices):
        entry = devices[device]
        lines = [f"   {json.dumps(line)}: {json.dumps(found)}" for line, found in sorted(entry["choices"].items())]
        inner = ",\n".join(lines)
        parts.append(
            f' {json.dumps(device)}: {{\n  "capability": {entry["capability"]},\n  "choices": {{\n{inner}\n  }}\n }}'
        )
    return "{\n" + ",\n".join(parts) + "\n}\n"
