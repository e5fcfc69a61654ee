"""CUDA tensors: which kernels an operator runs, CUDA C++ or Triton, and why.

The compiled library declares its CUDA kernels as ``flowkernels_cuda::<operator>``, the Triton kernels are functions of
``ops/<operator>/triton.py``. `run` is what every operator registers for CUDA tensors: it looks up the choice and calls.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from flowkernels import _gpu_choices, _library

# The Triton functions of each operator, module and name.
TRITON = {
    "affine_coupling": ("flowkernels.ops.affine_coupling.triton", "affine_coupling"),
    "affine_coupling_backward": ("flowkernels.ops.affine_coupling.triton", "affine_coupling_backward"),
    "masked_linear": ("flowkernels.ops.masked_linear.triton", "masked_linear"),
    "masked_linear_backward": ("flowkernels.ops.masked_linear.triton", "masked_linear_backward"),
    "maf_pack": ("flowkernels.ops.maf.triton", "maf_pack"),
    "maf": ("flowkernels.ops.maf.triton", "maf"),
    "maf_backward": ("flowkernels.ops.maf.triton", "maf_backward"),
    "maf_spline": ("flowkernels.ops.maf.triton", "maf"),
    "maf_spline_backward": ("flowkernels.ops.maf.triton", "maf_backward"),
    "rq_spline": ("flowkernels.ops.rq_spline.triton", "rq_spline"),
    "rq_spline_backward": ("flowkernels.ops.rq_spline.triton", "rq_spline_backward"),
    "gumbel_softmax": ("flowkernels.ops.gumbel_softmax.triton", "gumbel_softmax"),
    "gumbel_softmax_backward": ("flowkernels.ops.gumbel_softmax.triton", "gumbel_softmax_backward"),
    "gumbel_argmax": ("flowkernels.ops.gumbel_argmax.triton", "gumbel_argmax"),
}

# Operators that need Python around their CUDA C++ kernels: one call becomes several, or gets more arguments. Module,
# function, and a kernel that it calls.
COMPOSED = {
    "masked_linear": ("flowkernels.ops.masked_linear.cuda", "masked_linear", "masked_linear"),
    "masked_linear_backward": (
        "flowkernels.ops.masked_linear.cuda",
        "masked_linear_backward",
        "masked_linear_backward",
    ),
    "maf": ("flowkernels.ops.maf.cuda", "maf", "maf_inverse"),
    "maf_backward": ("flowkernels.ops.maf.cuda", "maf_backward", "maf_inverse_backward"),
    "maf_spline": ("flowkernels.ops.maf.cuda", "maf", "maf_inverse"),
    "maf_spline_backward": ("flowkernels.ops.maf.cuda", "maf_backward", "maf_inverse_backward"),
}

# Operators whose kernels, C++ or Triton, are called by a function that gets the kernel first.
WRAPPED = {
    "affine_coupling": ("flowkernels.ops.affine_coupling.cuda", "affine_coupling"),
    "affine_coupling_backward": ("flowkernels.ops.affine_coupling.cuda", "affine_coupling_backward"),
}

OLDEST_CAPABILITY = (8, 0)
_Function = TypeVar("_Function", bound=Callable[..., Any])


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_kernel(name: str, operator: str) -> bool:
    """Whether backend `name` has a kernel for `operator`, leaving aside whether this machine can run it."""
    if name == "cuda":
        kernel = COMPOSED[operator][2] if operator in COMPOSED else operator
        return _library.is_built() and hasattr(torch.ops.flowkernels_cuda, kernel)
    return operator in TRITON and importlib.util.find_spec(TRITON[operator][0]) is not None


@functools.cache
def built_for() -> tuple[int, ...]:
    """The architectures that the compiled kernels hold code for, 90 for sm_90."""
    if not has_kernel("cuda", "architectures"):
        return ()
    text: str = torch.ops.flowkernels_cuda.architectures()
    return tuple(int(item) for item in text.split(",") if item)


def _constant_when_traced(function: _Function) -> _Function:
    """torch.compile takes the result of `function` as it is then: what the library and the driver say it cannot trace.

    It is `torch.compiler.assume_constant_result`, which would import the compiler together with this library.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_traced
def why_not_cuda() -> str | None:
    """Why the CUDA C++ kernels cannot be had here, or None."""
    if not _library.is_built():
        return _library.load_error
    if not has_kernel("cuda", "affine_coupling"):
        return "the CUDA kernels were not built (no nvcc or a CPU build of torch at build time, or FLOWKERNELS_CUDA=0)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return why_not_device(torch.cuda.current_device())


def why_not_device(index: int) -> str | None:
    """Why the CUDA C++ kernels do not run on this device."""
    major, minor = torch.cuda.get_device_capability(index)
    sm = 10 * major + minor
    if any(built // 10 == major and built <= sm for built in built_for()):
        return None
    have = ", ".join(f"sm_{built}" for built in built_for())
    return (
        f"{torch.cuda.get_device_name(index)} is sm_{sm}, but the CUDA kernels were built for {have}: "
        f"rebuild with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


@_constant_when_traced
def why_not_triton() -> str | None:
    """Why the Triton kernels cannot be had here, or None."""
    if not has_triton():
        return "triton is not installed (pip install triton, or a CUDA build of torch, which brings it)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        name = f"{torch.cuda.get_device_name()} is sm_{capability[0]}{capability[1]}"
        return f"{name}; the Triton kernels need sm_80 or newer"
    return None


def why_not(name: str, operator: str) -> str | None:
    """Why `operator` cannot run on backend `name`."""
    reason = why_not_cuda() if name == "cuda" else why_not_triton()
    if reason is None and not has_kernel(name, operator):
        reason = f"there is no {'CUDA C++' if name == 'cuda' else 'Triton'} kernel for {operator}"
    return reason


def choose(operator: str, forced: str, call: tuple[str, int] | None = None) -> tuple[str, str]:
    """(backend, why) for CUDA tensors; `forced` is what `use_backend` asked for, or "auto".

    `call` is what `_gpu_choices.call` says of the arguments. Without it the size is left out: the first that is there.
    """
    if forced in ("cuda", "triton"):
        reason = why_not(forced, operator)
        if reason is None:
            return forced, "asked for by use_backend"
        if operator.endswith("_backward") and why_not(forced, operator.removesuffix("_backward")) is None:
            return "reference", reason  # the operator itself has a kernel; its gradient is plain PyTorch
        raise RuntimeError(f"backend {forced!r} cannot run {operator}: {reason}")
    if forced == "cpu":
        raise RuntimeError(
            f"backend 'cpu' cannot run {operator} on CUDA tensors: move them, or leave the choice to 'auto'"
        )
    if forced == "reference":
        return "reference", "asked for by use_backend"
    if call is None:
        return _available(operator, _gpu_choices.BACKENDS[0], _gpu_choices.NOT_MEASURED)
    line, size = call
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return next((name, why) for end, name, why in _choices(operator, line, device) if size <= end)


def _available(operator: str, first: str, source: str) -> tuple[str, str]:
    """(backend, why): `first`, or the other one, or the reference."""
    reasons: list[str] = []
    for name in (first, *(other for other in _gpu_choices.BACKENDS if other != first)):
        reason = why_not(name, operator)
        if reason is None:
            return name, "; ".join([source, *reasons])
        reasons.append(f"not {name}: {reason}")
    return "reference", "; ".join(reasons)


@functools.cache
def _choices(operator: str, line: str, device: int | None) -> list[tuple[float, str, str]]:
    """(size up to which, backend, why) on this device, which never changes while a process runs."""
    if not torch.cuda.is_available():
        return [(float("inf"), *_available(operator, _gpu_choices.BACKENDS[0], _gpu_choices.NOT_MEASURED))]
    firsts, source = _gpu_choices.first_choices(line, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    return [(end, *_available(operator, name, source)) for end, name in firsts]


def describe(operator: str) -> dict[str, tuple[str, str]]:
    """(backends with the sizes up to which each is chosen, why) of an operator's kernels, forwards and backwards.

    Where all go the same way, of the operator as a whole.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    found = {}
    for one in (operator, f"{operator}_backward"):
        unit, kernels = _gpu_choices.LINES.get(one, ("", [one] if one in _library.ON_CUDA else []))
        for line in kernels:
            parts: list[tuple[float, str]] = []
            for end, name, _ in (choices := _choices(one, line, device)):
                if parts and parts[-1][1] == name:
                    parts.pop()
                parts.append((end, name))
            words = [f"{name} up to {end:,} {unit}" for end, name in parts[:-1]]
            words.append(f"above that {parts[-1][1]}" if words else parts[-1][1])
            found[line] = ", ".join(words), "; ".join(dict.fromkeys(why for *_, why in choices))
    return {operator: found[next(iter(found))]} if len(set(found.values())) == 1 else found


@functools.cache
def _kernel(name: str, operator: str) -> Callable[..., Any]:
    found: Callable[..., Any]
    if name == "cuda" and operator not in COMPOSED:
        found = getattr(torch.ops.flowkernels_cuda, operator).default
    else:
        found = _function((COMPOSED if name == "cuda" else TRITON)[operator])
    return functools.partial(_function(WRAPPED[operator]), found) if operator in WRAPPED else found


def _function(where: tuple[str, ...]) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module(where[0]), where[1])
    return found


# Which argument says what the transforms of a chain are.
_CODES_AT = {"maf": 4, "maf_backward": 7}


def run(operator: str, reference: Callable[..., Any], *args: Any) -> Any:
    """An operator on CUDA tensors."""
    from flowkernels._backend import backend_of_call

    if operator in _CODES_AT:
        from flowkernels.ops.maf.autograd import form_of

        operator = operator.replace("maf", form_of(args[_CODES_AT[operator]]))
    name, _ = choose(operator, backend_of_call(), _gpu_choices.call(operator, args))
    if name != "triton":
        return (reference if name == "reference" else _kernel(name, operator))(*args)
    # Triton launches on the current device, whatever its tensors say; C++ kernels look at the tensors.
    with torch.cuda.device(_device_of(args)):
        return _kernel(name, operator)(*args)


def _device_of(args: Any) -> torch.device:
    flat = (item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return next(item.device for item in flat if isinstance(item, torch.Tensor))


def explain() -> list[str]:
    """One line per operator: what CUDA tensors run on here, and why."""
    if not torch.cuda.is_available():
        return ["GPU: torch sees no CUDA device"]
    lines = [f"GPU: {torch.cuda.get_device_name()}"]
    for operator in (
        "affine_coupling", "rq_spline", "logistic_mixture", "masked_linear", "maf", "maf_spline", "dequantize",
        "gumbel_softmax", "gumbel_argmax",
    ):  # fmt: skip
        lines += [f"  {kernel}: {backends} ({why})" for kernel, (backends, why) in describe(operator).items()]
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    room = properties.shared_memory_per_block_optin
    if room < 160 * 1024:
        lines.append(
            f"  maf: a thread block has {room // 1024} KB of shared memory here; wide networks keep "
            "a tile's activations in "
            "device memory (the smaller plan)"
        )
    return lines
