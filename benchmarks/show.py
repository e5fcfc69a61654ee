"""Tables and a progress bar on the terminal: by rich where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

try:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.table import Table

    CONSOLE: Any = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
except ImportError:
    CONSOLE = None


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size or unit == "µs":
            number = value / size
            return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}"
    return ""


def size(value: float | None) -> str:
    """Bytes; below a quarter of a megabyte the measurement says nothing."""
    if value is None:
        return "–"
    return f"{value / 2**20:.1f} MB" if value >= 2**18 else "< 0.3 MB"


def times(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 10 else f"{value:.2f}×"


def rate(variant: Mapping[str, Any]) -> str:
    parts = [f"{variant[key]:.3g} {unit}" for key, unit in (("gflops", "GFLOP/s"), ("gbs", "GB/s")) if variant[key]]
    return ", ".join(parts) or "–"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    if CONSOLE is not None:
        drawn = Table(
            title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for i, column in enumerate(columns):
            drawn.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            drawn.add_row(*row)
        CONSOLE.print(drawn)
        CONSOLE.print()
        return
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    print(title)
    for line in [columns, *rows]:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print()


def heading(document: Mapping[str, Any]) -> None:
    device, versions, limits = document["device"], document["versions"], document["ceilings"]
    print(
        f"flowkernels {versions['flowkernels']} {document['commit'] or ''}{' (changed)' * document['changed']},"
        f" torch {versions['torch']}, Python {versions['python']}, {document['date']}"
    )
    print(f"{device['processor']}, {device['cores']} cores, {device['threads']} threads, kernels: {device['isa']}")
    print(
        f"this machine's own limits, measured now: copy {limits['copy_gbs']:.1f} GB/s,"
        f" float32 GEMM {limits['gemm_gflops']:.0f} GFLOP/s\n"
    )


class Progress:
    """A bar over all cases on a terminal; a line per case elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self.bar: Any = None
        if CONSOLE is not None and CONSOLE.is_terminal:
            text = TextColumn("{task.description}")
            self.bar = Bar(
                BarColumn(30), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), text, console=CONSOLE
            )

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description="")
            self.bar.stop()

    def begin(self, name: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.count, description=name)
        else:
            print(f"[{self.count + 1}/{self.total}] {name}", file=sys.stderr, flush=True)

    def tick(self, share: float) -> None:
        """Checking and compiling count as half of a case."""
        if self.bar is not None:
            self.bar.update(self.task, completed=self.count + 0.5 + share / 2)

    def end(self) -> None:
        self.count += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.count)


def record(entry: Mapping[str, Any], progress: Progress) -> None:
    if entry["status"] != "ok":
        print(f"{entry['id']}\n  NO FIGURES, {entry['status']}: {entry['message']}\n")
        return
    rows = [
        (
            v["name"],
            seconds(v["p50"]),
            f"{seconds(v['p20'])} .. {seconds(v['p80'])}",
            "" if v["kind"] == "ours" else times(v["ours_faster"]),
            rate(v),
            "–" if v["ceiling"] is None else f"{100 * v['ceiling']:.0f} %",
            size(v["peak_bytes"]),
            f"{v['error']:.1e}",
        )
        for v in entry["variants"]
    ]
    table(entry["id"], ("", "p50", "p20 .. p80", "ours is faster", "rate", "of ceiling", "peak memory", "error"), rows)
    for note in entry["notes"]:
        print(f"  {note}")


def closing(document: Mapping[str, Any]) -> None:
    if document["growth"]:
        growing: list[tuple[str, ...]] = [
            (
                f"{g['variant']}, with {g['sweep']}",
                f"{g['exponent']:.2f}",
                ", ".join(f"{x:g}: {seconds(y)}" for x, y in g["points"]),
            )
            for g in document["growth"]
            if g["exponent"] is not None
        ]
        table("growth: time ~ size^exponent, fitted to the larger half", ("", "exponent", "measured"), growing)
    rows: list[tuple[str, ...]] = [
        (
            t["row"],
            t["target"],
            times(t["reached"]),
            {True: "reached", False: "NOT reached", None: "not measured"}[t["met"]],
        )
        for t in document["targets"]
    ]
    if not document["quick"]:
        table("targets", ("", "to reach", "reached", ""), rows)
    print(f"{len(document['results'])} cases in {document['seconds']:.0f} s")
