"""Cases and how they are run: checked against each other first, then timed in turns.

A `Case` names one computation at one size. `Case.prepare` builds a `Problem`: the same inputs and the same weights
given to every `Variant` (ours, plain PyTorch, torch.compile, the peers, the best that plain PyTorch could do), and the
truth, computed in float64 by something that is not under test. No figure leaves this file for a case in which any
result was wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import gc
import importlib
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OURS, PLAIN, COMPILED, RIVAL, PEER, YARDSTICK = "ours", "plain", "compiled", "rival", "peer", "yardstick"
KINDS = {
    OURS: "flowkernels",
    PLAIN: "plain PyTorch, as one would write it",
    COMPILED: "the same under torch.compile",
    RIVAL: "the best that plain PyTorch could do: weights masked once, the same blocked sampling in Python",
    PEER: "another library",
    YARDSTICK: "not the same function: something to measure against, such as the network without masks",
}

Result = Sequence[Tensor]


@dataclass
class Variant:
    """One way to compute a case.

    Attributes:
        name: as printed, the same in every case: ``flowkernels``, ``PyTorch``, ``torch.compile``, ``nflows``, ...
        kind: a key of `KINDS`.
        run: the call that is timed. Its result, a tensor or a sequence of tensors, is what gets checked.
        truth: what the result should be, in float64, if it isn't what `Problem.truth` says: a peer with another scale
            law, a yardstick.
        result: turns what `run` returns into the tensors to check, outside of the timing.
    """

    name: str
    kind: str
    run: Callable[[], Any]
    truth: Callable[[], Result] | None = None
    result: Callable[[Any], Result] | None = None


@dataclass
class Problem:
    """What `Case.prepare` builds.

    Attributes:
        variants: ours first. A peer that is not installed is left out, see `peer`.
        truth: the right result in float64.
        flops, bytes: what the computation needs at least: arithmetic on weights that exist, each input read and each
            output written once. The measured rate is this over the time, for every variant.
        grad: run with autograd on.
        reuse_memory: let the C library keep freed blocks: then no output comes as fresh pages from the system.
        least: errors are relative to a tensor's largest entry; to this if that is smaller, such as for a log-det whose
            terms nearly cancel.
        reference: the variant whose error sets the bound for the others; the first one of kind ``plain`` if None.
    """

    variants: list[Variant]
    truth: Callable[[], Result]
    flops: float = 0.0
    bytes: float = 0.0
    grad: bool = False
    reuse_memory: bool = False
    least: float = 0.0
    reference: str | None = None


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    `skip` holds kinds and names; a name up to its comma is enough. `seconds` is how long each variant is timed.
    """

    peers: bool = False
    quick: bool = False
    skip: tuple[str, ...] = ()
    seconds: float = 1.0

    def wants(self, kind: str, name: str) -> bool:
        return (kind != PEER or self.peers) and not {name, name.split(",")[0], kind} & set(self.skip)


@dataclass(frozen=True)
class Case:
    """One computation at one size.

    Attributes:
        op: the operator or model family, the name of the file in benchmarks/.
        what: forward, backward, forward+backward, sampling, log_prob, training step, ...
        size: the numbers that matter, in the order in which they are printed.
        prepare: builds the problem. It is told whether peers are wanted; what is slow to build only for them can wait.
        sweep: names a family of cases that differ in one number of `size`; the growth study fits an exponent to it.
    """

    op: str
    what: str
    size: Mapping[str, int | str] = field(hash=False)
    prepare: Callable[[Options], Problem] = field(compare=False)
    sweep: str | None = None

    @property
    def id(self) -> str:
        numbers = " ".join(f"{key}={value}" for key, value in self.size.items())
        return f"{self.op} / {self.what} / {numbers}"


class WrongResult(Exception):
    """A variant's result is not what it should be."""


# ---- finding and building cases --------------------------------------------------------------------------------------


def modules() -> dict[str, Any]:
    """The files of this package that have cases, by name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        # By its text first: a file without cases (tests, the report) is not imported just to look for some.
        if re.search(r"^def cases\(", path.read_text(), re.MULTILINE):
            found[path.stem] = importlib.import_module(f"benchmarks.{path.stem}")
    return found


def all_cases(quick: bool, ops: Sequence[str] = ()) -> list[Case]:
    found = modules()
    for op in ops:
        if op not in found:
            raise ValueError(f"op must be one of {', '.join(found)}, got {op!r}")
    return [case for name, module in found.items() if not ops or name in ops for case in module.cases(quick)]


def both_ways(
    op: str, size: Mapping[str, int | str], once: Callable[..., Problem], both: Callable[..., Problem]
) -> list[Case]:
    """A transform at one size: forward and inverse by ``once(inverse, *values of size, options)``, and
    forward+backward by ``both(*values of size, options)``."""
    values = tuple(size.values())
    prepare = {
        "forward": partial(once, False, *values),
        "inverse": partial(once, True, *values),
        "forward+backward": partial(both, *values),
    }
    return [Case(op, what, size, function) for what, function in prepare.items()]


def with_gradients(
    given: Sequence[Tensor], fixed: Sequence[Tensor] = (), dtype: torch.dtype = torch.float32
) -> Callable[[Callable[..., Sequence[Tensor]]], list[Tensor]]:
    """A step that calls a transform with `given` and `fixed`: its y and logdet, and the gradients of `given`.

    Every step has the same cotangents, for rows like those of the first tensor.
    """
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in given]
    rest = [t.to(dtype) if t.is_floating_point() else t for t in fixed]
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(shape, generator=g).to(dtype) for shape in (given[0].shape, given[0].shape[:1])]

    def step(transform: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
        y, logdet = transform(*leaves, *rest)
        return [y.detach(), logdet.detach(), *torch.autograd.grad([y, logdet], leaves, cotangents)]

    return step


@cache
def peer(name: str) -> Any:
    """The peer's module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for the sizes at hand. The first call compiles; that is before anything is timed."""
    made: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not made:  # not before: the compiler takes seconds to import
            made.append(torch.compile(function, dynamic=False))
        return made[0](*arguments)

    return call


def forget_compiled() -> None:
    """Every case compiles for its own sizes; without this, dynamo would count the former ones as recompilations."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# ---- checking --------------------------------------------------------------------------------------------------------


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def error_of(result: Result, truth: Result, least: float = 0.0) -> float:
    """Largest error of any tensor, relative to that tensor's largest entry or `least`, whichever is more.

    inf for a wrong shape, a NaN where there should be none, a missing tensor.
    """
    if len(result) != len(truth):
        return math.inf
    worst = 0.0
    for got, expected in zip(result, truth, strict=True):
        if got.shape != expected.shape:
            return math.inf
        if expected.numel() == 0:
            continue
        size = max(float(expected.detach().abs().max()), least, 1e-30)
        difference = float((got.detach().double() - expected.detach().double()).abs().max()) / size
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def _rounding(result: Result) -> float:
    """One rounding of the coarsest dtype in it; 0 if all are integers, which have to be exact."""
    return max((torch.finfo(t.dtype).eps for t in result if t.is_floating_point()), default=0.0)


def plain_of(problem: Problem, present: Mapping[str, Any]) -> str | None:
    """The variant whose error the others are held against, if it is there."""
    names = [v.name for v in problem.variants if v.name in present]
    kinds = {v.name: v.kind for v in problem.variants}
    return next((n for n in names if n == problem.reference or (not problem.reference and kinds[n] == PLAIN)), None)


def check(problem: Problem, results: Mapping[str, Result]) -> dict[str, float]:
    """The error of every variant, against float64.

    A kernel may be wrong by at most twice what plain PyTorch in the same dtype is, plus a few roundings; so may its
    rivals, and a peer, which sums in its own order, twice that again. Plain PyTorch itself sets the scale, so it gets a
    bound of its own: 1000 roundings (sums of a thousand terms, a chain of a hundred layers).

    Raises:
        WrongResult: with the variant, its error and the bound.
    """
    truth = problem.truth()
    own: dict[int, Result] = {}

    def truth_of(variant: Variant) -> Result:
        if variant.truth is None:
            return truth
        # Several variants may share one truth.
        return own.setdefault(id(variant.truth), variant.truth())

    errors = {
        v.name: error_of(results[v.name], truth_of(v), problem.least) for v in problem.variants if v.name in results
    }
    plain = plain_of(problem, results)
    eps = max(map(_rounding, results.values()), default=0.0)
    base = 1000 * eps if plain is None else min(2 * errors[plain] + 32 * eps, 1000 * eps)
    for variant in problem.variants:
        if variant.name not in errors:
            continue
        bound = {OURS: base, RIVAL: base, COMPILED: base, PEER: 2 * base}.get(variant.kind, 1000 * eps)
        if not errors[variant.name] <= bound:
            raise WrongResult(f"{variant.name}: error {errors[variant.name]:.2g}, at most {bound:.2g} allowed")
    return errors


# ---- timing ----------------------------------------------------------------------------------------------------------

TURN = 0.02  # seconds: how long one variant may go on before the next has its turn
FEWEST, MOST = 3, 3000  # calls
SLOW = 2.0  # seconds per call, from which on two calls have to do


def interleaved(
    runs: Mapping[str, Callable[[], Any]], seconds: float, tick: Callable[[float], None] = lambda share: None
) -> dict[str, list[float]]:
    """Seconds per call of each of `runs`, in turns, so that a slower or faster spell of the machine meets all alike.

    Every turn begins with a call that is not counted: it brings back into the caches what the others have pushed out.
    Calls that take longer than a turn do without: there is no cache that they would leave warm.
    """
    turns: list[tuple[float, str, int, bool]] = []
    for name, run in runs.items():
        once = min(_seconds(run) for _ in range(2)) if (first := _seconds(run)) < 0.2 else first
        calls = max(1, min(200, int(TURN / max(once, 1e-7))))
        fewest = 2 if once > SLOW else FEWEST
        count = max(-(-fewest // calls), min(round(seconds / max(once * calls, 1e-7)), MOST // calls))
        turns += [((i + 0.5) / count, name, calls, once < TURN) for i in range(count)]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for share, name, calls, warm in sorted(turns):
        run = runs[name]
        if warm:
            run()
        times[name] += [_seconds(run) for _ in range(calls)]
        tick(share)
    return times


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    result = run()
    end = time.perf_counter()
    del result  # giving memory back is not part of the call
    return end - begin


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


# ---- memory ----------------------------------------------------------------------------------------------------------

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@cache
def _libc() -> Any:
    try:
        libc = ctypes.CDLL(ctypes.util.find_library("c"))
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None


@contextlib.contextmanager
def reused_memory(wanted: bool = True) -> Iterator[None]:
    """glibc keeps freed blocks; otherwise large ones go back to the system and the next one costs page faults."""
    libc = _libc() if wanted else None
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)
        libc.mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


def peak_memory(run: Callable[[], Any]) -> int | None:
    """Bytes in use at a call's peak beyond what was in use before it, its result included; None where unknown.

    From the system's high-water mark of the process, which Linux lets a process reset: it sees every allocator,
    PyTorch's and a kernel's own scratch memory alike. Resolution is a few pages per thread.
    """
    libc = _libc()
    if libc is None:
        return None
    gc.collect()
    libc.malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM")
        del result
    except OSError:
        return None
    return max(0, peak - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


# ---- a case, from beginning to end -----------------------------------------------------------------------------------


def run_case(
    case: Case,
    options: Options,
    ceilings: Mapping[str, float],
    tick: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """The case's record: ``status`` ``ok``, ``wrong`` or ``failed`` (ours raised), and only if ``ok``, figures."""
    record: dict[str, Any] = {
        "id": case.id,
        "op": case.op,
        "what": case.what,
        "size": dict(case.size),
        "sweep": case.sweep,
        "status": "ok",
        "variants": [],
        "notes": [],
    }
    torch.manual_seed(0)
    forget_compiled()
    gc.collect()
    try:
        problem = case.prepare(options)
    except Exception as error:
        return record | {"status": "failed", "message": f"could not be prepared: {_brief(error)}"}
    with torch.set_grad_enabled(problem.grad), reused_memory(problem.reuse_memory):
        results: dict[str, Result] = {}
        for variant in problem.variants:
            if not options.wants(variant.kind, variant.name):
                continue
            try:
                out = variant.run()
                # Cloned: a result may share memory with what the next call overwrites.
                results[variant.name] = [t.detach().clone() for t in (variant.result or tensors)(out)]
                del out
            except Exception as error:
                if variant.kind == OURS:
                    return record | {"status": "failed", "message": f"{variant.name}: {_brief(error)}"}
                record["notes"].append(f"{variant.name} left out: {_brief(error)}")
        try:
            errors = check(problem, results)
        except WrongResult as error:
            return record | {"status": "wrong", "message": str(error)}
        variants = [v for v in problem.variants if v.name in errors]
        times = interleaved({v.name: v.run for v in variants}, options.seconds, tick)
    with torch.set_grad_enabled(problem.grad):
        peaks = {v.name: peak_memory(v.run) if quantile(times[v.name], 0.5) < SLOW else None for v in variants}
    plain = plain_of(problem, errors)
    for variant in variants:
        if (
            plain
            and variant.kind == OURS
            and errors[variant.name] > 2 * errors[plain] + _rounding(results[variant.name])
        ):
            ratio = errors[variant.name] / max(errors[plain], 1e-30)
            record["notes"].append(f"{variant.name}: its largest error is {ratio:.1f} times that of {plain}")
    ours = next((quantile(times[v.name], 0.5) for v in variants if v.kind == OURS), None)
    for variant in variants:
        samples = times[variant.name]
        p50 = quantile(samples, 0.5)
        record["variants"].append(
            {
                "name": variant.name,
                "kind": variant.kind,
                "p20": quantile(samples, 0.2),
                "p50": p50,
                "p80": quantile(samples, 0.8),
                "calls": len(samples),
                "error": errors[variant.name],
                "gflops": problem.flops / p50 / 1e9 if problem.flops else None,
                "gbs": problem.bytes / p50 / 1e9 if problem.bytes else None,
                "ceiling": _share(problem, p50, ceilings),
                "peak_bytes": peaks[variant.name],
                "ours_faster": None if ours is None else p50 / ours,
            }
        )
    return record


def _share(problem: Problem, seconds: float, ceilings: Mapping[str, float]) -> float | None:
    """The least time that this machine's measured copy and GEMM rates allow, over the time taken.

    Above 1 when the data stays in the caches, which are faster than the memory that the copy is measured on.
    """
    if not ceilings or not (problem.flops or problem.bytes):
        return None
    least = max(problem.flops / (ceilings["gemm_gflops"] * 1e9), problem.bytes / (ceilings["copy_gbs"] * 1e9))
    return least / seconds


def _brief(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().splitlines()
    name = where.filename.rsplit("/", 1)[-1]
    return f"{type(error).__name__}: {text[0] if text else ''} ({name}:{where.lineno})"
