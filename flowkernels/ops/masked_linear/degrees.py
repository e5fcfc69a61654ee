"""Degrees as the GPU kernels read them: orders and depths instead of a mask, found on the device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


class Sorted:
    """Inputs and outputs by degree: order, how many inputs each output reads, which output reads an input first."""

    def __init__(self, in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> None:
        ins, self.columns = torch.sort(in_degrees, stable=True)
        outs, self.rows = torch.sort(out_degrees, stable=True)
        self.depth = torch.searchsorted(ins, outs, right=not strict)
        self.first = torch.searchsorted(self.depth, torch.arange(len(ins), device=ins.device), right=True)
