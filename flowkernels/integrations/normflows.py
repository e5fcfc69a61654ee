"""normflows (tested with 1.7): https://github.com/VincentStimper/normalizing-flows"""

from __future__ import annotations

from typing import Any

from flowkernels.integrations._common import Adapter
from flowkernels.integrations._made import TRANSFORM_METHODS, AffineMade, MadeNetwork

TESTED = ("1.7", "1.8")


def adapters() -> list[Adapter]:
    from normflows.flows.affine import autoregressive
    from normflows.nets import made

    def network(transform: Any) -> MadeNetwork:
        return MadeNetwork(transform, made, normflows=True)

    return [
        Adapter(
            autoregressive.MaskedAffineAutoregressive,
            TRANSFORM_METHODS,
            AffineMade,
            network,
            "forward (sampling, one pass) by maf_forward, inverse (density, sequential) by maf_inverse",
        )
    ]
