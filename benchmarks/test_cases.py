"""The same cases under pytest-benchmark, with its own options to save and compare: ``pytest benchmarks -k maf``.

Small sizes; ``FLOWKERNELS_BENCH_FULL=1`` takes the sizes of the recorded run, ``FLOWKERNELS_BENCH_PEERS=0`` leaves out
other libraries. A variant is timed only after every result of its case was found right.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks import core

pytest.importorskip("pytest_benchmark")

QUICK = os.environ.get("FLOWKERNELS_BENCH_FULL", "0") != "1"
OPTIONS = core.Options(peers=os.environ.get("FLOWKERNELS_BENCH_PEERS", "1") != "0", quick=QUICK)


@lru_cache(maxsize=1)  # pytest goes through the variants of one case before it comes to the next
def prepared(case: core.Case) -> tuple[core.Problem, dict[str, core.Variant]]:
    torch.manual_seed(0)
    core.forget_compiled()
    problem = case.prepare(OPTIONS)
    variants = {v.name: v for v in problem.variants if OPTIONS.wants(v.kind, v.name)}
    with torch.set_grad_enabled(problem.grad):
        results = {}
        for name, variant in variants.items():
            results[name] = [t.detach().clone() for t in (variant.result or core.tensors)(variant.run())]
        core.check(problem, results)
    return problem, variants


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case and kind of variant: a case's variants are known only when it has been prepared."""
    cases = core.all_cases(QUICK)
    pairs = [(case, kind) for case in cases for kind in core.KINDS]
    # Ids that the expressions of -k can name: maf-log_prob-D5-H50-B1-transforms5-layers2-ours.
    ids = [re.sub(r"[ /=]+", lambda m: "" if m[0] == "=" else "-", f"{case.id} / {kind}") for case, kind in pairs]
    metafunc.parametrize(("case", "kind"), pairs, ids=ids)


@pytest.mark.benchmark(min_rounds=3, max_time=0.2, warmup=True, warmup_iterations=1)
def test_case(benchmark: Any, case: core.Case, kind: str) -> None:
    problem, variants = prepared(case)
    names = [name for name, variant in variants.items() if variant.kind == kind]
    if not names:
        pytest.skip(f"no {kind} in this case")
    # pytest-benchmark times one function per test. Where a case has several of a kind, that is the fastest of them.
    with torch.set_grad_enabled(problem.grad), core.reused_memory(problem.reuse_memory):
        best = min(names, key=lambda name: min(core.interleaved({name: variants[name].run}, 0.01)[name]))
        benchmark.group = case.id
        benchmark.extra_info["variant"] = best
        benchmark(variants[best].run)
