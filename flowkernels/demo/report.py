"""How the demonstrations tell what they found: times, tables, numbers, pictures."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkernels._version import __version__
from flowkernels.demo.common import LEVELS, SIDE


def best_time(run: Callable[[], Any], *, repeats: int = 5) -> float:
    """Seconds of the fastest of `repeats` runs: the one that other work on the machine disturbed least."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text in columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        return "  " + "  ".join(cells).rstrip()

    return "\n".join([line(head), "  " + "  ".join("-" * width for width in widths), *map(line, rows)])


def save_numbers(path: Path, numbers: Mapping[str, Any]) -> None:
    """Writes what a run found as JSON, with what it ran on."""
    about = {
        "flowkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**numbers, "ran_on": about}, indent=2) + "\n")


def pyplot() -> Any:
    """matplotlib without a display, or a plain word about how to get it."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the demo needs matplotlib for its picture: pip install 'flowkernels[demo]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def show_digits(axes: Any, levels: Tensor, title: str, *, rows: int = 8, columns: int = 10) -> None:
    """Draws the first rows x columns images, (N, 64) grey levels, side by side, ink dark."""
    images = levels[: rows * columns].detach().reshape(-1, SIDE, SIDE).cpu()
    border = torch.full((rows, SIDE + 1, columns, SIDE + 1), torch.nan)
    for i, image in enumerate(images):
        border[i // columns, :SIDE, i % columns, :SIDE] = image
    sheet = border.reshape(rows * (SIDE + 1), columns * (SIDE + 1))[:-1, :-1]
    axes.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=LEVELS - 1, interpolation="nearest")
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
