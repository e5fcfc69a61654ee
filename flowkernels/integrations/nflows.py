"""nflows (tested with 0.14): https://github.com/bayesiains/nflows"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flowkernels.integrations._chain import Cascade, Composite, Permutations
from flowkernels.integrations._common import Adapter, Left, Reader, Replaced, law_of, takes
from flowkernels.integrations._made import TRANSFORM_METHODS, AffineMade, MadeNetwork
from flowkernels.integrations._nflows_models import from_nflows, to_nflows
from flowkernels.integrations._nsf import spline_adapters
from flowkernels.ops.affine_coupling import affine_coupling
from flowkernels.scales import ScaleLaw

__all__ = ["TESTED", "adapters", "from_nflows", "to_nflows"]

TESTED = ("0.14", "0.15")


class AffineCoupling(Replaced):
    """`AffineCouplingTransform`: sigma = sigmoid(u + 2) + 1e-3, parameters [shifts, scales]."""

    def forward(self, inputs: Any, context: Any = None) -> Any:
        done = _couple(self, inputs, context, False)
        return self._flowkernels_class.forward(self, inputs, context) if done is None else done

    def inverse(self, inputs: Any, context: Any = None) -> Any:
        done = _couple(self, inputs, context, True)
        return self._flowkernels_class.inverse(self, inputs, context) if done is None else done

    def _coupling_transform_forward(self, inputs: Any, transform_params: Any) -> Any:
        done = _affine(inputs, transform_params, False)
        if done is None:
            return self._flowkernels_class._coupling_transform_forward(self, inputs, transform_params)
        return done

    def _coupling_transform_inverse(self, inputs: Any, transform_params: Any) -> Any:
        done = _affine(inputs, transform_params, True)
        if done is None:
            return self._flowkernels_class._coupling_transform_inverse(self, inputs, transform_params)
        return done


def _couple(transform: Any, inputs: Any, context: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """Vectors: what is transformed and what is not, in one pass and one output."""
    if transform.unconditional_transform is not None or not isinstance(inputs, Tensor) or inputs.dim() != 2:
        return None
    moved, kept = transform.transform_features, transform.identity_features
    if inputs.shape[1] != transform.features or not takes(inputs) or not len(moved) or not len(kept):
        return None
    parameters = transform.transform_net(inputs[:, kept, ...], context)
    if not takes(inputs, parameters) or parameters.shape != (inputs.shape[0], 2 * len(moved)):
        return None  # broadcast or mixed types: nflows runs its network once more and sees to them
    shift, scale = parameters.chunk(2, dim=1)
    return affine_coupling(inputs, shift, scale, mask=moved, law=_SIGMOID, inverse=inverse)


def _affine(inputs: Any, parameters: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """Images: all positions and channels of one image in one row."""
    if not takes(inputs, parameters) or parameters.dim() != inputs.dim() or inputs.dim() < 2 or not inputs.numel():
        return None
    batch, channels, *rest = inputs.shape
    if parameters.shape != (batch, 2 * channels, *rest):
        return None
    shift, scale = (half.reshape(batch, -1) for half in parameters.chunk(2, dim=1))
    y, logdet = affine_coupling(inputs.reshape(batch, -1), shift, scale, law=_SIGMOID, inverse=inverse)
    return y.reshape(inputs.shape), logdet


_SIGMOID = law_of("sigmoid", offset=2.0, floor=1e-3)


def affine_law(reader: Reader, transform: Any) -> ScaleLaw:
    return law_of("softplus", floor=reader.value(transform, "_epsilon"))


def _default_scale(transform: Any) -> None:
    """Releases after 0.14 let users choose the activation of the scale."""
    chosen = transform.__dict__.get("scale_activation")
    if chosen is not None and chosen is not getattr(type(transform), "DEFAULT_SCALE_ACTIVATION", None):
        raise Left("a scale activation of its own")


def adapters() -> list[Adapter]:
    from nflows.transforms import autoregressive, base, coupling, made, nonlinearities
    from nflows.transforms import permutations as permuting

    def network(transform: nn.Module) -> MadeNetwork:
        return MadeNetwork(transform, made, False, affine_law)

    def additive(transform: nn.Module) -> None:
        raise Left("its only operation is an addition: nothing to fuse")

    def cascade(composite: Any) -> Cascade:
        return Cascade(composite, "_transforms", autoregressives, permutations)

    autoregressives = (
        autoregressive.MaskedAffineAutoregressiveTransform,
        autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    )
    permutations = Permutations(
        frozenset((permuting.Permutation, permuting.RandomPermutation, permuting.ReversePermutation)),
        "_permutation",
        lambda child: child._dim == 1,
    )
    both_ways = ("forward", "inverse", "_coupling_transform_forward", "_coupling_transform_inverse")
    return [
        Adapter(
            autoregressive.MaskedAffineAutoregressiveTransform,
            TRANSFORM_METHODS,
            AffineMade,
            network,
            "forward by maf_forward, inverse by maf_inverse",
        ),
        Adapter(
            base.CompositeTransform,
            ("forward", "inverse", "_cascade"),
            Composite,
            cascade,
            "autoregressive transforms that follow one another, permutations between them too, go in one call",
            closed=False,
        ),
        Adapter(coupling.AdditiveCouplingTransform, (), AffineCoupling, additive, ""),
        Adapter(
            coupling.AffineCouplingTransform,
            (*both_ways, "_scale_and_shift"),
            AffineCoupling,
            _default_scale,
            "split, transform and merge by affine_coupling; its network stays with nflows",
            closed=False,
        ),
        *spline_adapters(
            autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
            coupling.PiecewiseRationalQuadraticCouplingTransform,
            nonlinearities.PiecewiseRationalQuadraticCDF,
            lambda transform, law: MadeNetwork(transform, made, False, law),
        ),
    ]
