"""The test kit: tables of shapes, strides and dtypes, and the checks that every operator has to pass.

It needs neither pytest nor hypothesis, so it also serves whoever tests an operator or a flow of their own.
Every check returns None or raises AssertionError with a message that says which output is wrong, where and by
how much.

How closeness is judged. A kernel and the plain PyTorch version run in the same dtype on the same values; both
are compared with the plain version in float64. The kernel's worst error may be at most twice the plain
version's, plus the rounding of the output's dtype. See `assert_as_close_as_plain` for the exact rule;
`check_against_reference` does it all for an operator.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.utils.deterministic
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from flowkernels._backend import use_backend

__all__ = [
    "DTYPES",
    "EXTREMES",
    "LAYOUTS",
    "SHAPES",
    "assert_as_close_as_plain",
    "assert_same_bits",
    "assert_written",
    "check_against_reference",
    "check_compile",
    "check_deterministic",
    "check_flow_laws",
    "check_gradients",
    "check_inverse",
    "check_logdet",
    "check_logdets_cancel",
    "check_opcheck",
    "check_threads",
    "check_vmap",
    "poisoned",
    "random_tensor",
    "with_layout",
]

# An operator under test: tensors in, one tensor or several out. Options are bound by the caller (lambda or
# partial).
Call: TypeAlias = Callable[..., Any]

# ---- tables ------------------------------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# (..., features): where vector loops, chunks and thread splits have their edges, each under the name that a
# failing test shows.
SHAPES: dict[str, tuple[int, ...]] = {
    "vector": (5,),
    "single": (1, 1),
    "no_rows": (0, 5),
    "no_rows_inside": (2, 0, 3),
    "one_row": (1, 7),
    "one_feature": (9, 1),
    "small": (7, 5),
    "power_of_two": (8, 32),
    "one_past_a_chunk": (5, 17),
    "odd": (33, 63),
    "leading_dims": (2, 3, 7),
    "four_dims": (2, 1, 3, 4),
    "many_rows": (1031, 3),
    "wide": (2, 1025),
}

# What `with_layout` can make of a tensor.
LAYOUTS = (
    "contiguous",
    "transposed",
    "strided",
    "interleaved",
    "padded_rows",
    "offset",
    "expanded_rows",
    "expanded_features",
)

# Values at which formulas break: signed zeros, the smallest numbers, both sides of exp's range, infinities,
# NaN.
EXTREMES = (
    0.0, -0.0, 1e-40, -1e-40, 1e-8, -1.0, 1.0, 20.0, -20.0, 50.0, -50.0, 88.0, -88.0, 104.0, -104.0,
    800.0, -800.0, 1e30, -1e30, math.inf, -math.inf, math.nan,
)  # fmt: skip


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """`tensor`'s values in other strides: a new leaf that shares no memory with it, as `LAYOUTS` names them.

    The values stay the same, except for the expanded layouts, where one row (feature) stands for all. Memory
    between the elements is filled with NaN, so a kernel that reads past a stride shows it.

    contiguous          as it is
    transposed          first and last dimension swapped in memory
    strided             every second element of every dimension of a larger tensor
    interleaved         every second feature, as in ``parameters[..., 0::2]``
    padded_rows         features adjacent, rows apart, as in ``parameters.chunk(2, -1)[0]``
    offset              contiguous, but one element into its storage: not aligned
    expanded_rows       stride 0 over the rows (a vector: over the features)
    expanded_features   stride 0 over the features
    """
    source = tensor.detach()
    if source.dim() == 0:
        return source.clone()
    shape = tuple(source.shape)
    last = source.dim() - 1
    if layout == "contiguous":
        return source.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return source.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "expanded_rows" or layout == "expanded_features":
        dim = 0 if layout == "expanded_rows" else last
        if shape[dim] == 0:
            return source.clone()
        return source.narrow(dim, 0, 1).clone(memory_format=torch.contiguous_format).expand(shape)
    if layout == "strided":
        view = _gaps([2 * n for n in shape], source)[tuple(slice(None, None, 2) for _ in shape)]
    elif layout == "interleaved":
        view = _gaps([*shape[:-1], 2 * shape[-1]], source)[..., 0::2]
    elif layout == "padded_rows":
        view = _gaps([*shape[:-1], shape[-1] + 3], source)[..., : shape[-1]]
    elif layout == "offset":
        view = _gaps([source.numel() + 2], source)[1:-1].view(shape)
    else:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    view.copy_(source)
    return view


def _gaps(shape: Sequence[int], like: Tensor) -> Tensor:
    fill = math.nan if like.is_floating_point() else 0
    return torch.full(tuple(shape), fill, dtype=like.dtype, device=like.device)


def random_tensor(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    seed: int = 0,
    spread: float = 1.0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Normal numbers of standard deviation `spread`, the same in every run and on every device."""
    generator = torch.Generator().manual_seed(0x5EED + seed)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * spread
    return with_layout(values.to(dtype=dtype, device=device), layout)


# ---- fresh memory ------------------------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills every fresh tensor with NaN before anybody writes to it, so that an element nobody wrote is seen.

    Reaches whatever is allocated through torch, the outputs of the C++ kernels included. Process-wide, not
    per thread.
    """
    deterministic: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = before[2]


def assert_written(out: Any, *, name: str = "output") -> None:
    """Raises if an output has a NaN: for calls inside `poisoned` whose inputs have none."""
    for label, value in _named(out, name):
        bad = value.detach().isnan()
        if bad.any():
            raise AssertionError(
                f"{label}: {int(bad.sum())} of {bad.numel()} elements are NaN (never written?), the first at {_at(bad)}"
            )


# ---- closeness ---------------------------------------------------------------------------------------------

# With fewer elements than this, the worst error of the plain version is a matter of luck (one element may be
# exact), so it counts as at least one rounding.
_FEW = 64


def assert_as_close_as_plain(
    kernel_out: Any,
    plain_out: Any,
    exact_out: Any,
    *,
    name: str = "output",
    magnitude: Any = None,
    factor: float = 2.0,
) -> None:
    """Raises unless `kernel_out` is about as close to `exact_out` as `plain_out` is.

    With eps the rounding of kernel_out's dtype and m = |exact|, over all elements::

        max |kernel - exact|      <= factor max |plain - exact|      + eps max m
        max |kernel - exact| / m  <= factor max |plain - exact| / m  + eps

    The second line keeps a small element from being lost behind a large one. Infinities and NaN must stand
    where the exact result, rounded to the dtype, has them, or where the plain version has the same infinity
    (an intermediate overflowed). Differences below the smallest normal number count as none.

    Args:
        kernel_out: the outputs to judge: a tensor or a sequence of tensors (None inside is skipped).
        plain_out: the plain PyTorch version's, in the same dtype; same structure.
        exact_out: the plain PyTorch version's in float64; same structure.
        name: what the message calls it.
        magnitude: for sums whose terms cancel: the sum of the terms' absolute values, used for m instead of
            abs(exact).
        factor: 2 everywhere in this library.
    """
    if isinstance(kernel_out, Tensor):
        return _judge(kernel_out, plain_out, exact_out, name, magnitude, factor)
    outs = [list(out) for out in (kernel_out, plain_out, exact_out)]
    if not len(outs[0]) == len(outs[1]) == len(outs[2]):
        raise AssertionError(f"{name}: {len(outs[0])} outputs, plain has {len(outs[1])}, exact {len(outs[2])}")
    sizes = [None] * len(outs[0]) if magnitude is None else list(magnitude)
    for i, (k, p, e, m) in enumerate(zip(*outs, sizes, strict=True)):
        have = [label for label, out in (("kernel", k), ("plain", p), ("exact", e)) if out is not None]
        if len(have) == 3:
            _judge(k, p, e, f"{name}[{i}]", m, factor)
        elif have:
            raise AssertionError(f"{name}[{i}]: only {' and '.join(have)} gave it")


def _judge(
    kernel_out: Tensor,
    plain_out: Tensor,
    exact_out: Tensor,
    name: str,
    magnitude: Tensor | None,
    factor: float,
) -> None:
    if kernel_out.shape != exact_out.shape or plain_out.shape != exact_out.shape:
        shapes = tuple(kernel_out.shape), tuple(plain_out.shape), tuple(exact_out.shape)
        raise AssertionError(f"{name}: shape {shapes[0]}, plain {shapes[1]}, exact {shapes[2]}")
    if kernel_out.numel() == 0:
        return
    info = torch.finfo(kernel_out.dtype)
    exact = exact_out.detach().cpu().double()
    kernel = kernel_out.detach().cpu().double()
    plain = plain_out.detach().cpu().double()
    rounded = exact.to(kernel_out.dtype).double()

    # Where something is not finite, positions and signs have to agree.
    special = ~(kernel.isfinite() & rounded.isfinite())
    fine = (kernel == rounded) | (kernel.isnan() & rounded.isnan()) | (kernel.isinf() & (kernel == plain))
    # That close to the largest number, rounding errors decide about overflow.
    largest = info.max * (1 - 16 * info.eps)
    fine |= (kernel.abs() >= largest) & (rounded.abs() >= largest) & (kernel.sign() == rounded.sign())
    wrong = special & ~fine
    if wrong.any():
        at = _at(wrong)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are not finite where they should be, "
            f"or finite where they should not; the first at {at}: "
            f"{kernel[at].item()}, plain {plain[at].item()}, exact {exact[at].item()}"
        )
    finite = kernel.isfinite() & rounded.isfinite()
    if not finite.any():
        return
    size = exact.abs() if magnitude is None else magnitude.detach().cpu().double().expand(exact.shape)
    # float16 results come from float32 arithmetic, where its subnormal numbers are ordinary ones.
    floor = info.tiny * info.eps if kernel_out.dtype == torch.float16 else info.tiny
    kernel_error = (kernel - exact).abs()
    kernel_error = torch.where(finite & (kernel_error > floor), kernel_error, 0.0)
    plain_error = torch.where(finite & plain.isfinite(), (plain - exact).abs(), 0.0)
    size = torch.where(finite, size.clamp_min(floor), 1.0)
    one_rounding = info.eps if kernel.numel() < _FEW else 0.0
    for measure, unit in (("absolute", torch.where(finite, size, 0.0).max()), ("relative", size)):
        scaled = kernel_error / unit
        worst, plain_worst = float(scaled.max()), max(float((plain_error / unit).max()), one_rounding)
        allowed = factor * plain_worst + info.eps
        if not worst <= allowed:
            at = _at(scaled == worst)
            raise AssertionError(
                f"{name}: worst {measure} error {worst:.3g} of {kernel_out.dtype} is above the {allowed:.3g} "
                f"allowed ({factor:g} x plain's {plain_worst:.3g} + {info.eps:.3g}), "
                f"at {at} of {tuple(exact.shape)}: "
                f"{kernel[at].item()}, plain {plain[at].item()}, exact {exact[at].item()}; "
                f"{int((scaled > allowed).sum())} of {exact.numel()} elements are that far off"
            )


def check_against_reference(
    call: Call,
    inputs: Sequence[Tensor | None],
    *,
    backend: str = "auto",
    gradients: bool = True,
    name: str = "output",
) -> None:
    """Runs an operator on `backend` and judges outputs and gradients by `assert_as_close_as_plain`.

    The same ``call(*inputs)`` runs `poisoned` on `backend`, as the reference in the inputs' own dtype, and as
    the reference in float64. The gradients of every floating-point input are compared, for one set of
    cotangents of all outputs.

    A single run is a poor measure of plain PyTorch's error: one element may happen to be exact. So the
    reference also runs with inputs and cotangents shaken by some roundings, and the largest error counts,
    element by element. The same runs show how much one rounding of the inputs moves the result; where terms
    cancel, that is larger than the result and takes its place as the magnitude m of the rule.

    Nothing more exact than float64 is at hand, so there the plain version's error is taken from float32 and
    scaled down, and the error of the float64 reference itself is let through in addition.

    Args:
        call: the operator with its options bound, in terms of flowkernels' public faces, which obey
            `use_backend`.
        inputs: the tensors (or None) to call it with, in any layout. They are not modified.
        gradients: compare those too.
        name: what the message calls the outputs.
    """

    with poisoned(), use_backend(backend):
        outs, grads = _run(call, inputs, gradients)
    labels = [f"{name}[{i}]" for i in range(len(outs))]
    labels += [f"gradient of {name} by input {i}" for i in range(len(grads))]
    with use_backend("reference"):
        own = _run_flat(call, inputs, gradients)
        exact = _run_flat(call, _cast(inputs, torch.float64), gradients)
        spreads = _spread_of_plain(call, inputs, gradients)
    if len(own) != len(labels):
        raise AssertionError(f"{name}: {len(outs)} outputs, {len(grads)} gradients; the reference has {len(own)}")
    for label, k, p, e, spread in zip(labels, [*outs, *grads], own, exact, spreads, strict=True):
        if k is None or p is None or e is None:
            # Not to depend on an input and to have a gradient of zero are the same.
            if any(t is not None and t.count_nonzero() for t in (k, p, e)):
                raise AssertionError(f"{label}: not zero, but not every backend gives it")
            continue
        if k.dtype != p.dtype:
            raise AssertionError(f"{label}: dtype {k.dtype}, the reference gives {p.dtype}")
        error, moved = spread
        factor = 2.0
        if k.dtype == torch.float64:
            error, factor = error * (torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps), 3.0
        p = torch.where((e + error).isfinite(), e + error, p)
        assert_as_close_as_plain(k, p, e, name=label, magnitude=torch.maximum(e.abs(), moved), factor=factor)


def _cast(inputs: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in inputs]


def _spread_of_plain(
    call: Call, inputs: Sequence[Tensor | None], gradients: bool, runs: int = 6
) -> list[tuple[Tensor, Tensor]]:
    """Per output and gradient: the plain version's largest error, and what one rounding of inputs does."""
    worst: list[tuple[Tensor, Tensor]] = []
    first: list[Any] = []
    for run in range(runs):
        given: list[Tensor | None] = []
        for i, t in enumerate(inputs):
            if t is not None and t.is_floating_point():
                t = _shaken(t, torch.float32 if t.dtype == torch.float64 else t.dtype, run, i)
            given.append(t)
        plain: list[Any] = _run_flat(call, given, gradients, run)
        exact: list[Any] = _run_flat(call, _cast(given, torch.float64), gradients, run)
        first = first or exact
        for i, (p, e, e0) in enumerate(zip(plain, exact, first, strict=True)):
            if p is None:
                p = e = e0 = torch.empty(0)
            error, moved = (p.double() - e).abs(), (e - e0).abs() / (_SHAKE * torch.finfo(p.dtype).eps)
            if run == 0:
                worst.append((error, moved))
            worst[i] = (_larger(worst[i][0], error), _larger(worst[i][1], moved))
    return worst


_SHAKE = 8.0  # in roundings


def _shaken(t: Tensor, dtype: torch.dtype, run: int, i: int) -> Tensor:
    """`t` in `dtype`, every element larger or smaller by `_SHAKE` roundings at random; as it is in run 0."""
    if run == 0:
        return t.to(dtype)
    signs = random_tensor(t.shape, torch.float64, seed=100 * run + i, device=t.device).sign()
    return (t.double() * (1 + _SHAKE * torch.finfo(dtype).eps * signs)).to(dtype)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b.isfinite() & ~(b <= a), b, a)


def assert_same_bits(first: Any, second: Any, *, name: str = "output") -> None:
    """Raises unless both hold the same bits: NaN equals NaN, and -0 differs from 0."""
    for (label, a), (_, b) in zip(_named(first, name), _named(second, name), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(f"{label}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}")
        if a.numel() == 0:
            continue
        different = _bits(a) != _bits(b)
        if different.any():
            at = _at(different)
            raise AssertionError(
                f"{label}: {int(different.sum())} of {different.numel()} elements differ in their bits, "
                f"the first at {at}: {a[at].item()!r} and {b[at].item()!r}"
            )


# ---- gradients ---------------------------------------------------------------------------------------------


def check_gradients(call: Call, inputs: Sequence[Tensor | None], *, second: bool = False, **options: Any) -> None:
    """Compares gradients of the float64 inputs with finite differences; with `second` second derivatives too.

    `options` go to `torch.autograd.gradcheck` and `gradgradcheck`.
    """
    leaves = [_leaf(t) for t in inputs]
    for t in leaves:
        if t is not None and t.requires_grad and t.dtype != torch.float64:
            raise ValueError(f"finite differences need float64 inputs, got {t.dtype}")
    try:
        torch.autograd.gradcheck(call, leaves, **options)
    except GradcheckError as error:
        raise AssertionError(f"first derivative: {error}") from None
    if second:
        try:
            torch.autograd.gradgradcheck(call, leaves, **options)
        except GradcheckError as error:
            raise AssertionError(f"second derivative: {error}") from None


# ---- the laws of a flow ------------------------------------------------------------------------------------


def check_flow_laws(forward: Call, inverse: Call, x: Tensor, *, event_dims: int = 1, tolerance: float = 1e-9) -> None:
    """Laws of an invertible transform, both ways: `check_inverse`, `check_logdet`, `check_logdets_cancel`.

    Args:
        forward: x -> (y, logdet).
        inverse: y -> (x, logdet).
        x: float64, (..., event); keep it small: the Jacobian has x.numel() squared entries.
        event_dims: how many trailing dimensions make up one event; the log-det has the shape of the others.
        tolerance: largest error, relative to 1 plus the size of what is compared.
    """
    y = forward(x)[0].detach()
    check_inverse(forward, inverse, x, tolerance=tolerance)
    check_inverse(inverse, forward, y, tolerance=tolerance)
    check_logdet(forward, x, event_dims=event_dims, tolerance=tolerance)
    check_logdet(inverse, y, event_dims=event_dims, tolerance=tolerance)
    check_logdets_cancel(forward, inverse, x, tolerance=tolerance)


def check_inverse(forward: Call, inverse: Call, x: Tensor, *, tolerance: float = 1e-9) -> None:
    """inverse(forward(x)) = x."""
    back = inverse(forward(x)[0].detach())[0]
    _assert_near(back, x, tolerance, "inverse(forward(x)) against x")


def check_logdet(forward: Call, x: Tensor, *, event_dims: int = 1, tolerance: float = 1e-9) -> None:
    """The log-det is slogdet of autograd's Jacobian, and no event depends on another."""
    events = x.shape[: x.dim() - event_dims]
    rows, width = math.prod(events), math.prod(x.shape[x.dim() - event_dims :])
    logdet = forward(x)[1].detach()
    if logdet.shape != events:
        raise AssertionError(f"logdet has shape {tuple(logdet.shape)}, the events have {tuple(events)}")
    if x.numel() == 0:
        return
    jacobian = _jacobian(lambda t: forward(t)[0], x.detach())
    jacobian = jacobian.reshape(rows, width, rows, width)
    own = jacobian.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    mixed = jacobian.clone()
    mixed.diagonal(dim1=0, dim2=2).zero_()
    if mixed.count_nonzero():
        raise AssertionError(f"event {_at(mixed != 0)[0]} depends on event {_at(mixed != 0)[2]}")
    _assert_near(
        logdet.reshape(rows),
        torch.linalg.slogdet(own)[1],
        tolerance,
        "logdet against slogdet of the Jacobian",
    )


def check_logdets_cancel(forward: Call, inverse: Call, x: Tensor, *, tolerance: float = 1e-9) -> None:
    """The forward log-det at x is minus the inverse log-det at forward(x)."""
    y, logdet = forward(x)
    _, back = inverse(y.detach())
    _assert_near(back, -logdet, tolerance, "logdet of the inverse against minus that of the forward direction")


# ---- how PyTorch may call an operator ----------------------------------------------------------------------


def check_opcheck(op: Any, args: Sequence[Any], **kwargs: Any) -> None:
    """`torch.library.opcheck`: schema, fake kernel and tracing with dynamic shapes agree with the kernel."""
    try:
        torch.library.opcheck(op, tuple(args), kwargs)
    except Exception as error:  # opcheck raises whatever the failing test raised
        raise AssertionError(f"opcheck of {op}: {error}") from error


def check_compile(
    call: Call,
    inputs: Sequence[Tensor | None],
    *,
    gradients: bool = True,
    backend: str = "inductor",
    dynamic: bool | None = None,
    terms: int = 0,
) -> None:
    """torch.compile(fullgraph=True) gives what eager gives, outputs and gradients.

    Eager stands for plain in the 2x rule and for exact too, so a difference of about one rounding is let
    through: what is around the operator may be fused in another way. For sums of `terms` terms, which a compiler may
    add in another order, that is one rounding of what is added up: see `_sum_magnitude`.
    """
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    out, grads = _run(compiled, inputs, gradients)
    eager_out, eager_grads = _run(call, inputs, gradients)
    assert_as_close_as_plain(
        out, eager_out, eager_out, name="compiled output", magnitude=_sum_magnitude(eager_out, terms)
    )
    assert_as_close_as_plain(
        grads,
        eager_grads,
        eager_grads,
        name="gradient of the compiled call's input",
        magnitude=_sum_magnitude(eager_grads, terms),
    )


def _sum_magnitude(outputs: Sequence[Tensor | None], terms: int) -> list[Tensor | None] | None:
    """What the rounding of sums is measured by, None for no sums.

    In another order of addition a sum moves by roundings of its partial sums, however small the result. Those grow as
    the square root of the number of terms; the largest element stands for the size of all.
    """
    if not terms:
        return None
    return [
        None if t is None or t.numel() == 0 else t.detach().abs().max().double().expand(t.shape) * terms**0.5
        for t in outputs
    ]


def check_vmap(
    call: Call,
    inputs: Sequence[Tensor | None],
    in_dims: Sequence[int | None],
    *,
    jacobian: bool = True,
    terms: int = 0,
) -> None:
    """torch.func.vmap gives the stacked results of a loop; so does vmap of jacrev for every mapped input.

    `terms` as for `check_compile`: a batched product may add in another order.
    """
    size = next(t.shape[d] for t, d in zip(inputs, in_dims, strict=True) if t is not None and d is not None)
    slices = [
        [t.select(d, i) if t is not None and d is not None else t for t, d in zip(inputs, in_dims, strict=True)]
        for i in range(size)
    ]
    mapped = torch.func.vmap(call, in_dims=tuple(in_dims))(*inputs)
    looped = [_tensors(call(*s)) for s in slices]
    stacked = [torch.stack(parts) for parts in zip(*looped, strict=True)]
    assert_as_close_as_plain(
        _tensors(mapped), stacked, stacked, name="output under vmap", magnitude=_sum_magnitude(stacked, terms)
    )
    if not jacobian:
        return
    for i, (t, d) in enumerate(zip(inputs, in_dims, strict=True)):
        if t is None or d is None or not t.is_floating_point():
            continue
        of_one = torch.func.jacrev(call, argnums=i)
        mapped = torch.func.vmap(of_one, in_dims=tuple(in_dims))(*inputs)
        for o, part in enumerate(_tensors(mapped)):
            rows = []
            for s in slices:

                def output(value: Tensor, s: list[Tensor | None] = s, i: int = i, o: int = o) -> Tensor:
                    return _tensors(call(*s[:i], value, *s[i + 1 :]))[o]

                rows.append(_jacobian(output, s[i]))
            each = torch.stack(rows)
            scale = _sum_magnitude([each], terms)
            assert_as_close_as_plain(
                [part], [each], [each], name=f"vmap(jacrev) of output {o} by input {i}", magnitude=scale
            )


def check_deterministic(call: Call, inputs: Sequence[Tensor | None], *, gradients: bool = True, runs: int = 2) -> None:
    """The same input gives the same bits, outputs and gradients, in every one of `runs` runs."""
    first = _run(call, inputs, gradients)
    for _ in range(runs - 1):
        again = _run(call, inputs, gradients)
        assert_same_bits(first[0], again[0], name="second run's output")
        assert_same_bits(first[1], again[1], name="gradient in the second run of input")


def check_threads(
    call: Call, inputs: Sequence[Tensor | None], *, gradients: bool = True, threads: int = 4, repeats: int = 4
) -> None:
    """The same bits from several Python threads at once, and with torch.set_num_threads(1)."""
    expected = _run(call, inputs, gradients)
    results: list[Any] = []
    start = threading.Barrier(threads)

    def work() -> None:
        start.wait()
        for _ in range(repeats):
            try:
                results.append(_run(call, inputs, gradients))
            except BaseException as error:
                results.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if len(results) != threads * repeats:
        raise AssertionError(f"{threads * repeats - len(results)} of {threads * repeats} calls gave no result")
    for result in results:
        if isinstance(result, BaseException):
            raise AssertionError(f"a call in a thread raised {type(result).__name__}: {result}") from result
        assert_same_bits(result[0], expected[0], name=f"among {threads} threads: output")
        assert_same_bits(result[1], expected[1], name=f"among {threads} threads: gradient of input")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = _run(call, inputs, gradients)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(single[0], expected[0], name="with one thread: output")
    assert_same_bits(single[1], expected[1], name="with one thread: gradient of input")


# ---- helpers -----------------------------------------------------------------------------------------------


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for t in out if t is not None]


def _named(out: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(out, Tensor):
        return [(name, out)]
    return [(f"{name}[{i}]", t) for i, t in enumerate(out) if t is not None]


def _at(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def _bits(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().contiguous().view(integer)


def _leaf(t: Tensor | None) -> Any:
    """A leaf with the same strides that takes a gradient if it can."""
    return None if t is None else t.detach().requires_grad_(t.is_floating_point())


def _run(
    call: Call, inputs: Sequence[Tensor | None], gradients: bool, shake: int = 0
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and the gradients of the inputs for cotangents that depend on the outputs' shapes alone."""
    if not gradients:
        with torch.no_grad():
            return _tensors(call(*inputs)), []
    leaves = [_leaf(t) for t in inputs]
    out = _tensors(call(*leaves))
    live = [(i, t) for i, t in enumerate(out) if t.requires_grad]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if not live or not wanted:
        return [t.detach() for t in out], []
    cotangents = []
    for i, t in live:
        # Drawn in bfloat16, hence the same numbers in every dtype.
        cotangent = random_tensor(t.shape, torch.bfloat16, seed=1000 + i, device=t.device).float()
        cotangents.append(_shaken(cotangent, torch.float32, shake, 50 + i).to(t.dtype))
    got = torch.autograd.grad([t for _, t in live], wanted, cotangents, allow_unused=True)
    return [t.detach() for t in out], list(got)


def _run_flat(call: Call, inputs: Sequence[Tensor | None], gradients: bool, shake: int = 0) -> list[Tensor | None]:
    out, grads = _run(call, inputs, gradients, shake)
    return [*out, *grads]


def _jacobian(call: Call, at: Any) -> Tensor:
    jacobian: Any = torch.autograd.functional.jacobian
    result: Tensor = jacobian(call, at)
    return result


def _assert_near(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)} against {tuple(expected.shape)}")
    error = (got - expected).detach().abs() / (1 + expected.detach().abs())
    bad = ~(error <= tolerance)
    if bad.any():
        at = _at(bad)
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are more than {tolerance:g} off, "
            f"the first at {at}: {got[at].item()!r} against {expected[at].item()!r}"
        )
