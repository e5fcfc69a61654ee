"""The command line: ``python -m flowkernels info | demo | bench``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import flowkernels
from flowkernels import demo


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])  # the benchmarks read their own options
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command == "demo":
        return _demo(options, options.parser)
    print(flowkernels.explain())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flowkernels", description=flowkernels.__doc__)
    parser.add_argument("--version", action="version", version=flowkernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|demo|bench")
    commands.add_parser("info", help="versions, backends, and why each is or isn't available")
    run = commands.add_parser("demo", help="fit a model to real images and sample it, fast and naively")
    run.set_defaults(parser=run)
    run.add_argument("--model", nargs="+", metavar="NAME", help=f"{', '.join(demo.models())} or all (default: maf)")
    run.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="where the pictures go (default: out)"
    )
    run.add_argument(
        "--quick", action="store_true", help="a few seconds, to see that it works; the figures mean nothing"
    )
    run.add_argument("--epochs", type=_positive, metavar="N", help="passes over the images, instead of the model's own")
    run.add_argument("--study", metavar="NAME", help="a study of the model instead of its demonstration")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, noise and order (default: 0)")
    commands.add_parser("bench", help="time every operator, see: bench --help", add_help=False)
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def _demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    known = demo.models()
    given = options.model or (known if options.study else ["maf"])
    names = known if given == ["all"] else list(dict.fromkeys(given))
    if unknown := [name for name in names if name not in known]:
        parser.error(f"argument --model: there is no model {unknown[0]!r}, choose from {', '.join(known)}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is not a directory")
    modules = [importlib.import_module(f"flowkernels.demo.{name}") for name in names]
    if options.study is not None:
        studies = {study for module in modules for study in getattr(module, "STUDIES", ())}
        modules = [module for module in modules if options.study in getattr(module, "STUDIES", ())]
        if not modules:
            there = ", ".join(sorted(studies)) or "no studies"
            parser.error(f"argument --study: {', '.join(names)} has {there}, got {options.study!r}")
    from flowkernels.demo.common import Options

    chosen = Options(options.out, options.quick, options.epochs, options.study, options.seed)
    for module in modules:
        module.run(chosen)
    return 0


def _bench(arguments: list[str]) -> int:
    """The benchmarks are no part of the installed package: they lie beside it in a checkout."""
    root = Path(flowkernels.__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__init__.py").is_file():
        print(
            "python -m flowkernels bench: the benchmarks come with the source tree, which is not here. "
            "In a clone of the repository: make bench",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    status: int | None = importlib.import_module("benchmarks").main(arguments)
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
