"""`explain`: what is installed, what will run, and why."""

from __future__ import annotations

import platform
from functools import singledispatch

import torch
from torch import Tensor, nn

from flowkernels import _backend, _cuda, _library
from flowkernels._version import __version__
from flowkernels.integrations import describe as describe_peers
from flowkernels.nn import MADE, ActNorm, AutoregressiveTransform, CouplingTransform, Invertible1x1, MaskedLinear
from flowkernels.plan import Plan
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import LogisticMixture, Spline

_WHAT = {
    "reference": "plain PyTorch, the truth that the others are tested against",
    "cpu": "C++",
    "triton": "Triton",
    "cuda": "CUDA C++",
}

_PLAIN = "plain PyTorch"
# What `integrations.describe` says of modules that it does not know.
_UNKNOWN = ("left: not a flow", "left: its parts", "left: no kernel")


def explain(model: nn.Module | None = None) -> str:
    """What will run and why, as text.

    Without argument: versions, the compiled library, the backends and why each is or isn't there. With a module: one
    line for each part of it, with the operators it calls, their plan, and the backend that they run on with the
    parameters where they are now and under the `use_backend` of this thread.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    if model is None:
        return _installation()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or left out, got {type(model).__name__}")
    return _module(model)


@singledispatch
def describe(module: nn.Module) -> str | None:
    """Which operators a module calls and how, or None if it calls none. Layers of other kinds register here.

    What a module describes includes the layers inside it, except those of `torch.nn`.
    """
    return None


@describe.register
def _(module: AutoregressiveTransform) -> str:
    way = ("maf_inverse", "maf_forward") if module.flipped else ("maf_forward", "maf_inverse")
    made = module.conditioner
    plan = describe_plan(made.plan, made.plan_parameters()[0])
    law = f"law {module.law.name}" if isinstance(module.law, ScaleLaw) else str(module.law)
    return f"{way[0]}, sampling {way[1]}; {law}; {plan}"


@describe.register
def _(module: CouplingTransform) -> str:
    kinds = {ScaleLaw: "affine_coupling", Spline: "rq_spline", LogisticMixture: "logistic_mixture"}
    op = next(name for kind, name in kinds.items() if isinstance(module.transform, kind))
    law = f"law {module.transform.name}" if isinstance(module.transform, ScaleLaw) else str(module.transform)
    return f"{op}, both directions; {law}; {len(module.transformed)} of {len(module.mask)} features"


@describe.register
def _(module: ActNorm) -> str:
    return f"actnorm, both directions; {module.channels} shifts and scales"


@describe.register
def _(module: Invertible1x1) -> str:
    return f"invertible_conv1x1, both directions; {module.channels} channels by their LU factors"


@describe.register
def _(module: MADE) -> str:
    return f"masked_linear x {len(module.layers)}; {describe_plan(module.plan, module.plan_parameters()[0])}"


@describe.register
def _(module: MaskedLinear) -> str:
    kept, size = int(module.mask().sum()), module.weight.numel()
    return (
        f"masked_linear, {module.in_features} -> {module.out_features}, {kept / max(1, size):.0%} of the weights used"
    )


def describe_plan(plan: Plan, like: Tensor) -> str:
    """A plan in words; `like` is one of the parameters, for their size in memory."""
    blocks = int(plan.forward_table[2])
    widths = ", ".join(str(mask.shape[0]) for mask in plan.masks[:-1]) or "no"
    dense = sum(mask.numel() + mask.shape[0] for mask in plan.masks)
    size = like.element_size()
    return (
        f"{plan.features} features and {widths} hidden units, {_count(int(plan.steps), 'step')} "
        f"in {_count(blocks, 'block')}, packed {_bytes(plan.packed_sizes[0] * size)} (dense {_bytes(dense * size)})"
    )


def _bytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


def _module(model: nn.Module) -> str:
    parts: dict[tuple[str, str, str], list[str]] = {}  # kind, backend, what -> the names of the modules alike
    reasons: dict[str, None] = {}  # a set that keeps its order
    seen: set[nn.Module] = set()
    peers = {entry.name: entry for entry in describe_peers(model) if not entry.what.startswith(_UNKNOWN)}
    of_peers = {module for name, module in model.named_modules() if name in peers}
    for name, module in model.named_modules():
        if module in seen:
            continue
        kind, text = type(module).__name__, describe(module)
        peer = peers.get(name)
        if text is None and peer is not None:
            # A module of another library, as its integration describes it.
            backend, reason = "torch", "layers that call no flowkernels operator run as PyTorch runs them"
            if peer.what.startswith("accelerated: "):
                backend, reason = _decide(next(module.parameters(), torch.empty(0)))
            seen.update(set(module.modules()) - of_peers)
            reasons.setdefault(f"{backend}: {reason}")
            parts.setdefault((peer.kind, backend, peer.what), []).append(name)
            continue
        if text is not None:
            seen.update(child for child in module.modules() if describe(child) is not None)
            backend, reason = _decide(next(module.parameters(), torch.empty(0)))
            reasons.setdefault(f"{backend}: {reason}")
            parts.setdefault((kind, backend, text), []).append(name)
        elif next(module.parameters(recurse=False), None) is not None:
            reasons.setdefault("torch: layers that call no flowkernels operator run as PyTorch runs them")
            parts.setdefault((kind, "torch", _PLAIN), []).append(name)
    parameters = list(model.parameters())
    lines = [f"{type(model).__name__}: {sum(p.numel() for p in parameters):,} parameters"]
    places = sorted({f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in parameters})
    if places:
        lines[0] += f", {' and '.join(places)}"
    if all(text == _PLAIN for _, _, text in parts):
        return f"{lines[0]}\n  nothing in it calls a flowkernels operator"
    for (kind, backend, text), names in parts.items():
        many = f"{len(names)} x " if len(names) > 1 else ""
        where = f" ({names[0]} to {names[-1]})" if many else f" ({names[0]})" if names[0] else ""
        lines += [f"  {many}{kind}{where}: {backend}", f"    {text}"]
    return "\n".join([*lines, *(f"  why {reason}" for reason in reasons)])


def _decide(like: Tensor) -> tuple[str, str]:
    """The backend of operators on tensors such as `like`, and the reason."""
    chosen = _backend.backend()
    if chosen != "auto":
        # What was asked for may have no kernels for this device; operators then say so, or run as their reference.
        if chosen != "reference" and _backend.runs_reference(like):
            return "reference", f"use_backend({chosen!r}) is in force, but it has nothing for {like.device}"
        return chosen, f"use_backend({chosen!r}) is in force"
    if not _backend.runs_reference(like):
        if like.device.type == "cuda":
            found = _cuda.describe("maf")
            if len(found) == 1:
                return found["maf"]
            told = (f"{kernel}: {backends} ({why})" for kernel, (backends, why) in found.items())
            return "by size", "; ".join(told)
        return "cpu", _level()
    if like.device.type == "cpu":
        return "reference", f"slow, because {_backend.why_unavailable('cpu')}"
    missing = "; ".join(
        f"{name}: {reason}" for name in ("triton", "cuda") if (reason := _backend.why_unavailable(name)) is not None
    )
    return "reference", f"slow, because no kernels run on {like.device.type} ({missing})"


def _installation() -> str:
    info = _library.build_info()
    lines = [
        f"flowkernels {__version__}",
        f"  Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.system()} {platform.machine()}, "
        f"{_count(torch.get_num_threads(), 'thread')}",
    ]
    if info:
        lines.append(
            f"  C++ kernels: {_level()}; built for {', '.join(info['isa_built'].split(','))} "
            f"by {info.get('compiler', 'an unknown compiler')}, for PyTorch >= {info['torch_abi']}"
        )
    else:
        lines.append(f"  C++ kernels: none, {_library.load_error}")
    lines.append("backends")
    for name in _backend.NAMES[1:]:
        reason = _backend.why_unavailable(name)
        lines.append(f"  {name:<9}  " + (f"available: {_WHAT[name]}" if reason is None else f"not available: {reason}"))
    devices = "CUDA " + ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    lines += [
        "what runs",
        f"  tensors on the CPU:  {': '.join(_decide(torch.empty(0)))}",
        f"  GPU:                 {devices if torch.cuda.is_available() else 'PyTorch sees none'}",
        f"  operators:           {_operators()}",
    ]
    if torch.cuda.is_available():
        lines += [f"  {line}" for line in _cuda.explain()]
    return "\n".join(lines)


def _level() -> str:
    return f"this machine's instruction set is {_library.build_info()['isa']}"


def _operators() -> str:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("flowkernels::")]
    names = [name for name in names if name != "flowkernels::build_info"]
    parts = []
    for key in ("CPU", "CUDA"):
        count = sum(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for name in names)
        parts.append(f"{count} with a kernel for {key}")
    return f"{len(names)}, {', '.join(parts)}; the reference for the rest"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
