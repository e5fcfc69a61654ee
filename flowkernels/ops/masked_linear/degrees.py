"""Degrees as the GPU kernels read them: orders and depths instead of a mask, sorted on the device and remembered."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Sorted:
    """Inputs and outputs by degree: order, how many inputs each output reads, which output reads an input first."""

    def __init__(self, in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> None:
        ins, self.columns = torch.sort(in_degrees, stable=True)
        outs, self.rows = torch.sort(out_degrees, stable=True)
        self.depth = torch.searchsorted(ins, outs, right=not strict)
        self.first = torch.searchsorted(self.depth, torch.arange(len(ins), device=ins.device), right=True)


# By the tensor of in_degrees, while that lives, with what else it was sorted for: a change in place is noticed.
_known: Any = WeakIdKeyDictionary()


def sorted_degrees(in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> Sorted:
    """`Sorted`, remembered: on a device sorting costs as much as a product of a few thousand samples.

    Not while a CUDA graph is captured: what is computed then exists in the graph only.
    """
    capturing = in_degrees.is_cuda and torch.cuda.is_current_stream_capturing()
    if in_degrees.is_inference() or out_degrees.is_inference():
        return Sorted(in_degrees, out_degrees, strict)
    key = in_degrees._version, out_degrees._version, strict
    known = _known.get(in_degrees)
    if known is not None and known[0]() is out_degrees and known[1] == key:
        found: Sorted = known[2]
        return found
    fresh = Sorted(in_degrees, out_degrees, strict)
    if not capturing:
        if in_degrees.is_cuda:  # once: another stream may read them next
            torch.cuda.current_stream(in_degrees.device).synchronize()
        _known[in_degrees] = weakref.ref(out_degrees), key, fresh
    return fresh
