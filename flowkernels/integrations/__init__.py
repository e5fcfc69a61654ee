"""Drop-in acceleration of nflows, zuko, normflows and Pyro flows: same numbers, same objects, faster.

    fk.accelerate(flow)              # in place; parameters stay shared with the optimizer
    with fk.accelerated(flow): ...   # for a while
    fk.deaccelerate(flow)            # as it was

None of the libraries is imported: a module can be one of theirs only if its library has been imported already.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from torch import nn

from flowkernels import _library
from flowkernels.integrations import _common, nflows

__all__ = ["Entry", "accelerate", "accelerated", "deaccelerate", "describe", "nflows"]

PEERS = {"nflows": "nflows", "zuko": "zuko", "normflows": "normflows", "pyro": "pyro-ppl"}

Model = TypeVar("Model", bound=nn.Module)


class Entry(NamedTuple):
    """One line of `describe`: a module's name in the model, its class, and what happens to it."""

    name: str
    kind: str
    what: str


def accelerate(model: Model, *, inplace: bool = True) -> Model:
    """Makes the flows of nflows, zuko, normflows and Pyro inside `model` run on the kernels, and returns it.

    Parameters are shared, not copied; state_dict, pickles, hooks and isinstance stay those of the library. What has no
    kernel is left as it is; ``fk.explain(model)`` lists every module. Where nothing can be accelerated the model comes
    back as it was; accelerating twice changes nothing.

    Args:
        model: any module; flows are found at any depth. inplace: False accelerates a deep copy.

    Raises:
        TypeError: `model` is not a module.
    """
    _check(model)
    if not inplace:
        model = copy.deepcopy(model)
    _accelerate(model)
    return model


def deaccelerate(model: Model) -> Model:
    """Undoes `accelerate`, in place, and returns the model.

    Raises:
        TypeError: `model` is not a module.
    """
    _check(model)
    for module in model.modules():
        if _common.is_replaced(module):
            _common.detach(module)
    return model


@contextmanager
def accelerated(model: Model) -> Iterator[Model]:
    """Accelerates `model` inside the ``with`` block; what was accelerated before stays so after it."""
    _check(model)
    changed = _accelerate(model)
    try:
        yield model
    finally:
        for module in changed:
            if _common.is_replaced(module):
                _common.detach(module)


def describe(model: nn.Module) -> list[Entry]:
    """What is, or would be, replaced in `model` by what, and what stays with its library and why, module by module."""
    _check(model)
    _load(model)
    entries = []
    inside: list[str] = []  # modules that belong to one that has been described
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        peer = _peer_of(module)
        kind = f"{peer}.{type(module).__name__}" if peer else type(module).__name__
        what = _what(module)
        if what is not None:
            closed = _is_closed(module)
        elif any(_common.adapter_of(m) is not None for m in module.modules()):
            what, closed = "left: its parts are listed below", False
        else:
            what, closed = "left: no kernel for this class" if peer else "left: not a flow of " + ", ".join(PEERS), True
        if closed:
            inside.append(name + "." if name else "")
        entries.append(Entry(name, kind, what))
    return entries


def _what(module: nn.Module) -> str | None:
    adapter = _common.adapter_of(module)
    if adapter is None:
        return None
    if not _library.is_built():
        return f"left: {_library.load_error}"
    data: Any
    if _common.is_replaced(module):
        data = module.__dict__[_common.STATE].data
        reason = data.why_not_now() if hasattr(data, "why_not_now") else None
        return (
            f"accelerated: {adapter.variant(data)[1]}" if reason is None else f"accelerated, but for now left: {reason}"
        )
    try:
        _, data = _common.prepare(module)
    except _common.Left as left:
        return f"left: {left}"
    reason = data.why_not_now() if hasattr(data, "why_not_now") else None
    return f"can be accelerated: {adapter.variant(data)[1]}" if reason is None else f"left: {reason}"


def _is_closed(module: nn.Module) -> bool:
    adapter = _common.adapter_of(module)
    return adapter is not None and adapter.closed


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _accelerate(model: nn.Module) -> list[nn.Module]:
    _load(model)
    changed = []
    for module in list(model.modules()):
        if _common.is_replaced(module) or _common.adapter_of(module) is None:
            continue
        try:
            _common.attach(module)
        except _common.Left:
            continue
        changed.append(module)
    return changed


def _peer_of(module: nn.Module) -> str | None:
    for base in type(module).__mro__:
        root = base.__module__.partition(".")[0]
        if root in PEERS:
            return root
    return None


def _load(model: nn.Module) -> None:
    """Loads the adapters of the peers whose modules are in `model`."""
    for peer in {_peer_of(module) for module in model.modules()} - {None, *_common.adapters}:
        assert peer is not None
        if peer not in sys.modules:
            continue
        integration = importlib.import_module(f"flowkernels.integrations.{peer}")
        _warn_version(peer, integration.TESTED)
        _common.adapters[peer] = integration.adapters()


def _warn_version(peer: str, tested: tuple[str, str]) -> None:
    try:
        version = importlib.metadata.version(PEERS[peer])
    except importlib.metadata.PackageNotFoundError:
        version = str(getattr(sys.modules[peer], "__version__", "unknown"))
    low, high = tested
    if not _numbers(low) <= _numbers(version) < _numbers(high):
        warnings.warn(
            f"{PEERS[peer]} {version} is installed; flowkernels was tested with {low} up to, not including, {high}. "
            "Compare results, or use fk.deaccelerate(model).",
            stacklevel=4,
        )


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
