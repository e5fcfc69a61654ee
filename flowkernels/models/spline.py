"""The autoregressive kind of neural spline flow."""

from __future__ import annotations

from collections.abc import Sequence

from flowkernels.models.autoregressive import MAF, Order
from flowkernels.transforms import RQSpline, Spline


class NSF(MAF):
    """Neural spline flow, autoregressive: each transform is ``z_i = spline(x_i; theta(x_<i))``, rational.

    Densities take one pass per transform; sampling is sequential, and exact, in one sweep
    (`flowkernels.ops.maf_inverse`).

    Arguments as for `MAF`, with `spline` in place of the scale law: an `RQSpline` (default: nflows' way, 8 bins
    on [-3, 3]) or an `LRSpline`.

    Source: Durkan et al. 2019, arXiv:1906.04032.
    """

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (128, 128),
        transforms: int = 5,
        *,
        spline: Spline | None = None,
        context_features: int = 0,
        activation: str = "relu",
        order: str | Sequence[Order] = "alternating",
        degrees: str = "sequential",
        residual: bool = False,
    ) -> None:
        super().__init__(
            features,
            hidden_features,
            transforms,
            context_features=context_features,
            law=RQSpline() if spline is None else spline,
            activation=activation,
            order=order,
            degrees=degrees,
            residual=residual,
        )
