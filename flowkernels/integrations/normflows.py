"""normflows (tested with 1.7): https://github.com/VincentStimper/normalizing-flows"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flowkernels.integrations._chain import Cascade, NormalizingFlow, Permutations
from flowkernels.integrations._common import Adapter, Left, Replaced, law_of, takes
from flowkernels.integrations._made import TRANSFORM_METHODS, AffineMade, MadeNetwork
from flowkernels.integrations._nsf import spline_adapters
from flowkernels.ops.affine_coupling import affine_coupling

TESTED = ("1.7", "1.8")


class AffineCoupling(Replaced):
    """forward and inverse of `normflows.flows.AffineCoupling`: the second half; its network stays normflows'.

    Parameters alternate, shift and scale. Glow's "sigmoid" map divides: z / sigma + t, the inverse of (z - t) sigma.
    """

    def forward(self, z: Any) -> Any:
        done = _map(self, z, False)
        return self._flowkernels_class.forward(self, z) if done is None else done

    def inverse(self, z: Any) -> Any:
        done = _map(self, z, True)
        return self._flowkernels_class.inverse(self, z) if done is None else done


def _map(flow: Any, z: Any, inverse: bool) -> tuple[list[Tensor], Tensor] | None:
    if not flow.scale or flow.scale_map not in _MAPS or not (isinstance(z, (list, tuple)) and len(z) == 2):
        return None
    z1, z2 = z
    if not takes(z2) or z2.dim() < 2 or not z2.numel():
        return None
    law, form, flipped = _MAPS[flow.scale_map]
    param = flow.param_map(z1)
    batch, channels, *rest = z2.shape
    if not takes(z2, param) or param.shape != (batch, 2 * channels, *rest):
        return None  # broadcast or mixed types: normflows runs its network once more and sees to them
    shift, scale = (param[:, i::2, ...].reshape(batch, -1) for i in (0, 1))
    rows = z2.reshape(batch, -1)
    y, logdet = affine_coupling(
        rows, -shift if flipped else shift, scale, law=law, form=form, inverse=inverse != flipped
    )
    return [z1, y.reshape(z2.shape)], logdet


# Law, form, and whether the direction is flipped, the shift then changing its sign.
_MAPS = {
    "exp": (law_of("exp"), "scale_shift", False),
    "sigmoid": (law_of("sigmoid", offset=2.0, floor=0.0), "shift_scale", True),
    "sigmoid_inv": (law_of("sigmoid", offset=2.0, floor=0.0), "scale_shift", False),
}


def _coupling(flow: Any) -> None:
    if not flow.scale:
        raise Left("its only operation is an addition: nothing to fuse")
    if flow.scale_map not in _MAPS:
        raise Left(f"no kernel for the scale map {flow.scale_map}")


def adapters() -> list[Adapter]:
    from normflows.core import NormalizingFlow as Model
    from normflows.flows import Permute, neural_spline
    from normflows.flows.affine import autoregressive, coupling
    from normflows.nets import made

    def network(transform: nn.Module) -> MadeNetwork:
        return MadeNetwork(transform, made, True, lambda reader, transform: law_of("sigmoid", offset=2.0, floor=1e-3))

    def cascade(model: Any) -> Cascade:
        made = (
            autoregressive.MaskedAffineAutoregressive,
            neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive,
        )
        shuffled = Permutations(frozenset((Permute,)), "perm", lambda child: child.mode == "shuffle")
        return Cascade(model, "flows", made, shuffled)

    return [
        Adapter(
            Model,
            ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det", "log_prob", "forward_kld"),
            NormalizingFlow,
            cascade,
            "autoregressive flows that follow one another, permutations between them too, go in one call",
            closed=False,
        ),
        Adapter(
            autoregressive.MaskedAffineAutoregressive,
            TRANSFORM_METHODS,
            AffineMade,
            network,
            "forward (sampling, one pass) by maf_forward, inverse (density, sequential) by maf_inverse",
        ),
        Adapter(
            coupling.AffineCoupling,
            ("forward", "inverse"),
            AffineCoupling,
            _coupling,
            "affine map by affine_coupling; its network stays with normflows",
            closed=False,
        ),
        *spline_adapters(
            neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive,
            neural_spline.coupling.PiecewiseRationalQuadraticCoupling,
            neural_spline.coupling.PiecewiseRationalQuadraticCDF,
            lambda transform, law: MadeNetwork(transform, made, True, law),
        ),
    ]
