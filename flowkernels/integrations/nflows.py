"""nflows (tested with 0.14): https://github.com/bayesiains/nflows"""

from __future__ import annotations

from typing import Any

from flowkernels.integrations._common import Adapter
from flowkernels.integrations._made import TRANSFORM_METHODS, AffineMade, MadeNetwork

TESTED = ("0.14", "0.15")


def adapters() -> list[Adapter]:
    from nflows.transforms import autoregressive, made

    def network(transform: Any) -> MadeNetwork:
        return MadeNetwork(transform, made, normflows=False)

    return [
        Adapter(
            autoregressive.MaskedAffineAutoregressiveTransform,
            TRANSFORM_METHODS,
            AffineMade,
            network,
            "forward by maf_forward, inverse by maf_inverse",
        )
    ]
