"""The benchmark suite: ``python -m flowkernels bench`` in a checkout, or ``python -m benchmarks``.

One file per operator or model family. A file is found by itself when it has ``cases(quick) -> list[Case]``; `core` says
what a case is, `affine_coupling.py` is the one to copy. The same definitions run under ``pytest benchmarks``.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments and returns its exit status."""
    from benchmarks.cli import main as run

    return run(argv)
