"""The README's tables and pictures, from a result file: ``python -m flowkernels bench --report FILE``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import show
from benchmarks.machine import ROOT

RESULTS = Path(__file__).parent / "results"
# One colour per variant, in every picture.
COLOURS = {
    "flowkernels": "#1b6ca8",
    "flowkernels density": "#7fb2d6",
    "PyTorch": "#9a9a9a",
    "PyTorch, masked once": "#c2c2c2",
    "PyTorch, blocked": "#6d6d6d",
    "PyTorch, in place": "#c2c2c2",
    "torch.compile": "#e08a3c",
    "torch.compile, masked once": "#f0b27a",
    "nflows": "#4f9d69",
    "zuko": "#8e6bb0",
    "normflows": "#c25b6e",
    "dense pass": "#333333",
    "without masks": "#333333",
}


def report(path: Path) -> int:
    """Fills README.md between its marks; all medians and the pictures go to benchmarks/results/."""
    document = json.loads(path.read_text())
    pictures = draw(document, RESULTS)
    full = RESULTS / f"{path.stem}.md"
    full.write_text(f"# {path.stem}\n\n{medians(document)}\n")
    readme = ROOT / "README.md"
    text = filled(readme.read_text(), "figures", figures(document, pictures, path, full))
    table = accelerated(document)
    if table:
        text = filled(text, "accelerate", table)
    readme.write_text(text)
    for picture in pictures:
        print(f"picture: {picture}")
    print(f"filled: {readme}, {full}")
    return 0


def filled(text: str, section: str, content: str) -> str:
    """`text` with everything between the marks of a section replaced.

    Raises:
        ValueError: if the marks are not there, in this order, once each.
    """
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md must have {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def accelerated(document: Mapping[str, Any]) -> str:
    """Before and after `fk.accelerate`, a row for each library and size; empty if the run has none."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for record in document["results"]:
        if record["op"] != "accelerate" or record["status"] != "ok":
            continue
        library, what = record["what"].split(" ", 1)
        ours = next(v for v in record["variants"] if v["kind"] == "ours")
        before = next(v for v in record["variants"] if v["name"] == library)
        column = next(c for c in _ACCELERATED if c in what)
        cell = f"{show.seconds(before['p50'])} → {show.seconds(ours['p50'])} ({show.times(before['ours_faster'])})"
        rows.setdefault((library, _size(record)), {})[column] = cell
    if not rows:
        return ""
    table = [(lib, size, *(cells.get(c, "") for c in _ACCELERATED)) for (lib, size), cells in rows.items()]
    return markdown(("library", "flow", *_ACCELERATED), table)


_ACCELERATED = ("sampling", "log_prob", "training step")


def figures(document: Mapping[str, Any], pictures: list[Path], source: Path, full: Path) -> str:
    """The README's markdown: what was measured where, the pictures, the targets."""
    device, versions, limits = document["device"], document["versions"], document["ceilings"]
    libraries = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "nflows", "zuko", "normflows", "pyro-ppl") if name in versions
    )
    parts = [
        f"Measured {document['date']} at commit `{document['commit']}`{' with changes' * document['changed']} on"
        f" {device['processor']}, {device['cores']} cores, {device['threads']} threads, {device['isa']}, float32;"
        f" {libraries}, Python {versions['python']}. Copy {limits['copy_gbs']:.0f} GB/s,"
        f" GEMM {limits['gemm_gflops']:.0f} GFLOP/s."
        f" All variants in turns in one run, every result checked against float64 before it was timed."
        f" [All medians]({relative(full)}), [everything as JSON]({relative(source)}).",
    ]
    parts += [f"![{picture.stem.replace('_', ' ')}]({relative(picture)})" for picture in pictures]
    rows: list[tuple[str, ...]] = [
        (
            t["row"],
            t["target"],
            show.times(t["reached"]),
            {True: "yes", False: "**no**", None: "not measured"}[t["met"]],
        )
        for t in document["targets"]
    ]
    parts.append(markdown(("", "to reach", "reached", "met"), rows))
    return "\n\n".join(parts)


def medians(document: Mapping[str, Any]) -> str:
    """The median of every variant of every case, and how times grow."""
    parts = ["Medians; in brackets how many times faster flowkernels is."]
    rows: list[tuple[str, ...]] = []
    for record in document["results"]:
        if record["status"] != "ok" or record["sweep"]:
            continue
        cells = [
            show.seconds(v["p50"])
            if v["kind"] == "ours"
            else f"{v['name']} {show.seconds(v['p50'])} ({show.times(v['ours_faster'])})"
            for v in record["variants"]
        ]
        rows.append((f"{record['op']}: {record['what']}, {_size(record)}", cells[0], "; ".join(cells[1:])))
    parts.append(markdown(("", "flowkernels", "others"), rows))
    growth = {(g["sweep"], g["variant"]): g["exponent"] for g in document["growth"]}
    rows = [
        (sweep, *(f"{growth[sweep, name]:.2f}" if growth.get((sweep, name)) is not None else "–" for name in _GROWING))
        for sweep in dict.fromkeys(sweep for sweep, _ in growth)
    ]
    if rows:
        parts.append("Growth: the exponent of the time, fitted to the larger half of each sweep.")
        parts.append(markdown(("with", "sampling", "density", "dense pass"), rows))
    return "\n\n".join(parts)


_GROWING = ("flowkernels", "flowkernels density", "dense pass")


def markdown(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _size(record: Mapping[str, Any]) -> str:
    shown = {
        key: value for key, value in record["size"].items() if (key, value) not in (("transforms", 1), ("layers", 2))
    }
    return " ".join(f"{key}={value}" for key, value in shown.items())


def relative(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """speedup.png, growth.png and ceiling.png; those that the run has figures for.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "legend.frameon": False,
        "svg.hashsalt": "0",
    }
    found = []
    with pyplot.rc_context(style):
        for name, make in (("speedup", _speedup), ("growth", _growth), ("ceiling", _ceiling)):
            figure = make(document, pyplot)
            if figure is not None:
                path = folder / f"{name}.png"
                figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
                pyplot.close(figure)
                found.append(path)
    return found


def _measured(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a picture has room for: the cases that a target names, or all where there are few."""
    found = [record for record in document["results"] if record["status"] == "ok" and not record["sweep"]]
    named = {target["case"] for target in document["targets"]}
    return found if len(found) <= 12 else [record for record in found if record["id"] in named]


def _speedup(document: Mapping[str, Any], pyplot: Any) -> Any:
    """For every case, how many times faster ours is than each of the others. Logarithmic."""
    left_out = ("ours", "yardstick")
    records = [r for r in _measured(document) if any(v["kind"] not in left_out for v in r["variants"])]
    if not records:
        return None
    lines = [(record, [v for v in record["variants"] if v["kind"] not in left_out]) for record in records]
    height = sum(len(others) + 1 for _, others in lines)
    figure, axes = pyplot.subplots(figsize=(8, 0.17 * height + 0.8))
    at, ticks, labels = 0.0, [], []
    seen: dict[str, Any] = {}
    for record, others in lines:
        ticks.append(at + (len(others) - 1) / 2)
        labels.append(f"{record['op']}: {record['what']}\n{_size(record)}")
        for v in others:
            bar = axes.barh(at, v["ours_faster"] - 1, left=1, height=0.85, color=COLOURS.get(v["name"], "#b5a642"))
            axes.text(max(v["ours_faster"], 1) * 1.05, at, show.times(v["ours_faster"]), va="center", fontsize=6)
            seen.setdefault(v["name"], bar)
            at += 1
        at += 1
    axes.set_yticks(ticks, labels, fontsize=6.5)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("flowkernels is so many times faster")
    axes.legend(seen.values(), seen.keys(), fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1), ncol=4)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("")
    axes.set_ylim(at - 0.5, -1)
    return figure


def _growth(document: Mapping[str, Any], pyplot: Any) -> Any:
    """Time against each number of the growth study, both logarithmic."""
    sweeps = list(dict.fromkeys(g["sweep"] for g in document["growth"]))
    if not sweeps:
        return None
    titles = {"D": "features D", "B": "batch", "layers": "hidden layers", "transforms": "transforms"}
    figure, axes = pyplot.subplots(1, len(sweeps), figsize=(3.1 * len(sweeps), 2.8), squeeze=False)
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        for g in document["growth"]:
            if g["sweep"] != sweep or len(g["points"]) < 2:
                continue
            label = g["variant"].replace("flowkernels density", "density").replace("flowkernels", "sampling")
            exponent = "" if g["exponent"] is None else f", {g['exponent']:.2f}"
            xs, ys = zip(*g["points"], strict=True)
            axis.loglog(
                xs, [1e3 * y for y in ys], "o-", markersize=3, color=COLOURS.get(g["variant"]), label=label + exponent
            )
        axis.set_xlabel(titles.get(sweep, sweep))
        axis.legend(fontsize=6, title="exponent", title_fontsize=6)
    axes[0][0].set_ylabel("ms")
    figure.tight_layout()
    return figure


def _ceiling(document: Mapping[str, Any], pyplot: Any) -> Any:
    """The least time that this machine's copy and GEMM rates allow, over the time taken."""
    records = [r for r in _measured(document) if any(v["ceiling"] for v in r["variants"])]
    if not records:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 0.26 * len(records) + 0.8))
    names: dict[str, Any] = {}
    for at, record in enumerate(records):
        for v in record["variants"]:
            if v["kind"] != "yardstick" and v["ceiling"]:
                size = 42 if v["kind"] == "ours" else 16
                names[v["name"]] = axes.scatter(
                    v["ceiling"], at, s=size, color=COLOURS.get(v["name"], "#b5a642"), zorder=3
                )
    axes.set_yticks(range(len(records)), [f"{r['op']}: {r['what']}, {_size(r)}" for r in records], fontsize=6.5)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlabel(
        "fraction of this machine's ceiling (copy or GEMM, whichever binds); above 1: the data stays in the caches"
    )
    axes.legend(names.values(), names.keys(), fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1), ncol=4)
    return figure
