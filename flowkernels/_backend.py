"""Which implementation runs: `use_backend`, `available_backends`, and why one is missing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowkernels import _cuda, _library

NAMES = ("auto", "reference", "cpu", "triton", "cuda")


class _State(threading.local):
    """One choice per thread, so that a thread that compares backends does not change what others run."""

    name = "auto"


_state = _State()


def backend() -> str:
    """The backend that `use_backend` has chosen in this thread, ``"auto"`` outside of it."""
    return _state.name


# Autograd runs the backward of CUDA tensors in threads of its own, where `_state` is as new. What is stashed under this
# name in the thread that calls backward, torch hands on to them.
_STASHED = "flowkernels_backend"


def backend_of_call() -> str:
    """`backend`, and in one of autograd's threads that of the thread which called backward."""
    name = _state.name
    if name == "auto" and torch._C._is_key_in_tls(_STASHED):
        name = torch._C._get_obj_in_tls(_STASHED)
    return name


def runs_reference(x: Tensor, operator: str | None = None) -> bool:
    """Whether `operator` called on `x` runs as its reference: because that was asked for, or nothing else is built.

    Raises:
        RuntimeError: the backend that `use_backend` asks for does not run this operator on x's device.
    """
    # Every call of every operator passes here: is_cuda and is_cpu cost a tenth of device.type.
    name = _state.name
    if name == "reference":
        return True
    if x.is_cuda:
        if operator is None:
            return _cuda.why_not_cuda() is not None and _cuda.why_not_triton() is not None
        return _cuda.choose(operator, name)[0] == "reference"
    if name in ("cuda", "triton"):
        raise RuntimeError(f"backend {name!r} needs CUDA tensors, got one on {x.device}")
    return not x.is_cpu or (name == "auto" and not _library.is_built())


def why_unavailable(name: str) -> str | None:
    """Why backend `name` cannot be had here, or None if it can."""
    if name in ("auto", "reference"):
        return None
    if name == "cpu":
        return _library.load_error
    return _cuda.why_not_triton() if name == "triton" else _cuda.why_not_cuda()


def available_backends() -> tuple[str, ...]:
    """The backends that work on this machine, the reference first."""
    return tuple(name for name in NAMES if name != "auto" and why_unavailable(name) is None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator of this thread on backend `name` inside the ``with`` block.

    `name` is one of ``"auto"`` (the fastest that is there for the tensors' device), ``"reference"`` (plain PyTorch, the
    truth), ``"cpu"``, ``"triton"``, ``"cuda"``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot be had here, with the reason.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    reason = why_unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    before, _state.name = _state.name, name
    torch._C._stash_obj_in_tls(_STASHED, name)
    try:
        yield
    finally:
        _state.name = before
        torch._C._stash_obj_in_tls(_STASHED, before)
