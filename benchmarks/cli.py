"""The command: ``bench [--op NAME] [--peers] [--quick] [--json FILE] [--plot DIR] [--compare A B]``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMAT = 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowkernels bench",
        description="Times every operator and model beside plain PyTorch, torch.compile and other libraries. All"
        " results of a case are compared first; if one is wrong, the case gives no figures and the exit status is 1.",
    )
    parser.add_argument(
        "--op", action="append", default=[], metavar="NAME", help="only this operator or family; repeatable"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="TEXT", help="only cases whose name has this in it; repeatable"
    )
    parser.add_argument(
        "--peers", action="store_true", help="also time nflows, zuko, normflows, Pyro, those that are installed"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: minutes, to see that everything works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the results into this folder")
    parser.add_argument(
        "--skip", action="append", default=[], metavar="NAME", help="leave out a variant or a kind, e.g. torch.compile"
    )
    parser.add_argument(
        "--seconds", type=float, default=None, help="how long to time each variant (default 1, quick 0.2)"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="set two result files or commits side by side")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="no run: fill the README and draw pictures from these results"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if any result was wrong."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.compare:
            from benchmarks.compare import compare

            first, second = options.compare
            return compare(first, second, _run_arguments(options))
        if options.report:
            from benchmarks.report import report

            return report(options.report)
        return _run(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _run_arguments(options: argparse.Namespace) -> list[str]:
    """The arguments that a run in another checkout gets."""
    found = [flag for flag, given in (("--quick", options.quick), ("--peers", options.peers)) if given]
    for name in options.op:
        found += ["--op", name]
    for text in options.case:
        found += ["--case", text]
    for name in options.skip:
        found += ["--skip", name]
    return found + (["--seconds", str(options.seconds)] if options.seconds else [])


def _run(options: argparse.Namespace) -> int:
    from benchmarks import core, growth, machine, show, targets

    cases = core.all_cases(options.quick, options.op)
    if options.case:
        cases = [case for case in cases if any(text in case.id for text in options.case)]
        if not cases:
            raise ValueError(f"--case {' '.join(options.case)}: no case has this in its name; see --list")
    if options.list:
        print("\n".join(case.id for case in cases))
        return 0
    settings = core.Options(
        peers=options.peers,
        quick=options.quick,
        skip=tuple(options.skip),
        seconds=options.seconds or (0.2 if options.quick else 1.0),
    )
    begin = time.perf_counter()
    document: dict[str, Any] = {"format": FORMAT, **machine.describe(), "quick": options.quick, "peers": options.peers}
    document["ceilings"] = machine.ceilings()
    show.heading(document)
    records = []
    with show.Progress(len(cases)) as progress:
        for case in cases:
            progress.begin(case.id)
            record = core.run_case(case, settings, document["ceilings"], progress.tick)
            records.append(record)
            progress.end()
            show.record(record, progress)
    document["results"] = records
    document["growth"] = growth.fit(records)
    document["targets"] = targets.evaluate(records)
    document["seconds"] = round(time.perf_counter() - begin, 1)
    show.closing(document)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(_rounded(document), indent=1) + "\n")
        print(f"results: {options.json}")
    if options.plot:
        from benchmarks.report import draw

        for path in draw(document, options.plot):
            print(f"picture: {path}")
    bad = [record for record in records if record["status"] != "ok"]
    for record in bad:
        print(f"NO FIGURES for {record['id']}: {record['status']}: {record['message']}", file=sys.stderr)
    return 1 if bad else 0


def _rounded(value: Any) -> Any:
    """Five digits are more than a timing has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value
