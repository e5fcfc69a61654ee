"""A linear layer whose mask is given by degrees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowkernels.ops.masked_linear import masked_linear


def mask_of(in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> Tensor:
    """(out, in) True where a weight exists."""
    o, i = out_degrees[:, None], in_degrees[None, :]
    return o > i if strict else o >= i


class MaskedLinear(nn.Module):
    """``y = x (W M)^T + b`` with ``M[o, i] = in_degrees[i] <= out_degrees[o]``, ``<`` when `strict`.

    The weight is dense, as in `torch.nn.Linear` and initialised like it; what the mask hides is never read and gets a
    zero gradient. No mask is stored.

    Args:
        in_degrees: (in_features,) integers. out_degrees: (out_features,) integers.
        bias: whether there is one. activation: applied to y, a name of ``flowkernels.plan.ACTIVATIONS`` or None.
    """

    in_degrees: Tensor
    out_degrees: Tensor

    def __init__(
        self,
        in_degrees: Tensor,
        out_degrees: Tensor,
        *,
        strict: bool = False,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("in_degrees", torch.as_tensor(in_degrees).long().clone())
        self.register_buffer("out_degrees", torch.as_tensor(out_degrees).long().clone())
        self.in_features, self.out_features = len(self.in_degrees), len(self.out_degrees)
        self.strict, self.activation = strict, activation
        like = nn.Linear(self.in_features, self.out_features, bias=bias)
        self.weight = like.weight
        self.bias: nn.Parameter | None = like.bias if bias else None

    def mask(self) -> Tensor:
        """(out_features, in_features) True where a weight exists."""
        return mask_of(self.in_degrees, self.out_degrees, self.strict)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return masked_linear(
            x,
            self.weight,
            self.bias,
            in_degrees=self.in_degrees,
            out_degrees=self.out_degrees,
            strict=self.strict,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, strict={self.strict}"
