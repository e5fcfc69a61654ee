"""How the cost of sampling grows with features, batch and depth, beside one density pass and one dense pass.

Sampling has to grow as a density pass does. Each family of cases below changes one number; the report fits
``seconds = c * number^exponent`` to its larger half, where the constant cost of a call no longer matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks import maf
from benchmarks.core import Case


def cases(quick: bool) -> list[Case]:
    if quick:
        found = [maf.sampling(d, 64, 32, sweep="D") for d in (16, 32, 64)]
        return found + [maf.sampling(16, 64, b, sweep="B") for b in (1, 32, 256)]
    found = [maf.sampling(d, 512, 100, sweep="D") for d in (63, 128, 256, 512, 784, 1024, 1536, 2048, 3072)]
    found += [maf.sampling(63, 512, b, sweep="B") for b in (1, 10, 100, 1000, 10_000, 100_000)]
    found += [maf.sampling(63, 512, 100, layers=n, sweep="layers") for n in (1, 2, 4, 8)]
    found += [maf.sampling(63, 512, 100, transforms=n, sweep="transforms") for n in (1, 2, 5, 10)]
    return found


def fit(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every sweep and variant the points and the exponent of the larger half of them."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in records:
        sweep = record.get("sweep")
        if sweep and record["status"] == "ok":
            for variant in record["variants"]:
                points.setdefault((sweep, variant["name"]), []).append((record["size"][sweep], variant["p50"]))
    found = []
    for (sweep, name), pairs in points.items():
        pairs.sort()
        tail = pairs[len(pairs) // 2 - (len(pairs) < 4) :] if len(pairs) > 2 else pairs
        found.append({"sweep": sweep, "variant": name, "points": pairs, "exponent": slope(tail)})
    return found


def slope(pairs: list[tuple[float, float]]) -> float | None:
    """Least squares in logarithms."""
    if len(pairs) < 2:
        return None
    xs, ys = [math.log(x) for x, _ in pairs], [math.log(y) for _, y in pairs]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    over = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / over if over else None
