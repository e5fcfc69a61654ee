"""nflows (tested with 0.14): https://github.com/bayesiains/nflows"""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor, nn

from flowkernels.integrations._common import Adapter, Left, Reader, Replaced, law_of, spline_of, takes
from flowkernels.integrations._made import TRANSFORM_METHODS, AffineMade, MadeNetwork
from flowkernels.integrations._nflows_models import from_nflows, to_nflows
from flowkernels.ops.affine_coupling import affine_coupling
from flowkernels.ops.rq_spline import rq_spline
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import RQSpline

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


class SplineCoupling(Replaced):
    """`PiecewiseRationalQuadraticCouplingTransform` with linear tails: the spline; the network stays nflows'."""

    def _coupling_transform(self, inputs: Any, transform_params: Any, inverse: bool = False) -> Any:
        done = None
        if isinstance(inputs, Tensor) and inputs.dim() in (2, 4) and takes(inputs, transform_params):
            batch, channels, *rest = inputs.shape
            spline = _spline(self, getattr(self, "transform_net", None), warn=True)
            if spline is not None and transform_params.numel() == inputs.numel() * spline.params_per_feature:
                theta = transform_params.reshape(batch, channels, -1, *rest)
                theta = theta.movedim(2, -1).reshape(batch, -1, spline.params_per_feature)
                done = rq_spline(inputs.reshape(batch, -1), theta, spline=spline, inverse=inverse)
        if done is None:
            return self._flowkernels_class._coupling_transform(self, inputs, transform_params, inverse)
        return done[0].reshape(inputs.shape), done[1]


class SplineElements(Replaced):
    """`MaskedPiecewiseRationalQuadraticAutoregressiveTransform` whose network no kernel has: the spline only."""

    def _elementwise(self, inputs: Any, autoregressive_params: Any, inverse: bool = False) -> Any:
        if takes(inputs, autoregressive_params) and inputs.dim() == 2:
            spline = _spline(self, getattr(self, "autoregressive_net", None), warn=False)
            if spline is not None and autoregressive_params.numel() == inputs.numel() * spline.params_per_feature:
                theta = autoregressive_params.view(*inputs.shape, spline.params_per_feature)
                return rq_spline(inputs, theta, spline=spline, inverse=inverse)
        return self._flowkernels_class._elementwise(self, inputs, autoregressive_params, inverse)


class SplineMade(Replaced):
    """`MaskedPiecewiseRationalQuadraticAutoregressiveTransform` with linear tails."""

    forward = AffineMade.forward
    inverse = AffineMade.inverse
    _elementwise = SplineElements._elementwise


def affine_law(reader: Reader, transform: Any) -> ScaleLaw:
    return law_of("softplus", floor=reader.value(transform, "_epsilon"))


def _spline_law(reader: Reader, transform: Any) -> RQSpline:
    for name in ("tails", "num_bins", "tail_bound", "min_bin_width", "min_bin_height", "min_derivative"):
        reader.value(transform, name)
    net = reader.value(transform, "autoregressive_net")
    if hasattr(net, "hidden_features"):  # then nflows divides by its root
        reader.value(net, "hidden_features")
    spline = _spline(transform, net, warn=False)
    if spline is None:
        raise Left("no kernel for its spline")
    return spline


def _spline(transform: Any, net: Any, *, warn: bool) -> RQSpline | None:
    """The spline of a transform, or None where no kernel has it."""
    if transform.tails != "linear":
        return None
    width = getattr(net, "hidden_features", None)
    if width is None and warn:
        width = getattr(net, "hidden_channels", None)
        if width is None:
            warnings.warn("Inputs to the softmax are not scaled down: initialization might be bad.", stacklevel=4)
    try:
        return spline_of(
            "nflows",
            transform.num_bins,
            bound=transform.tail_bound,
            min_width=transform.min_bin_width,
            min_height=transform.min_bin_height,
            min_slope=transform.min_derivative,
            logit_scale=1.0 if width is None else 1 / math.sqrt(width),
        )
    except (TypeError, ValueError):
        return None


def _spline_or_left(transform: Any) -> None:
    if transform.tails != "linear":
        raise Left(f"tails are {transform.tails}, not linear")
    if _spline(transform, None, warn=False) is None:
        raise Left("no kernel for these bins and bounds")


def _default_scale(transform: Any) -> None:
    """Releases after 0.14 let users choose the activation of the scale."""
    chosen = transform.__dict__.get("scale_activation")
    if chosen is not None and chosen is not getattr(type(transform), "DEFAULT_SCALE_ACTIVATION", None):
        raise Left("a scale activation of its own")


def adapters() -> list[Adapter]:
    from nflows.transforms import autoregressive, coupling, made

    def network(transform: nn.Module) -> MadeNetwork:
        return MadeNetwork(transform, made, False, affine_law)

    def spline_network(transform: nn.Module) -> MadeNetwork | None:
        _spline_or_left(transform)
        found = MadeNetwork(transform, made, False, _spline_law)
        return None if found.reason else found

    def additive(transform: nn.Module) -> None:
        raise Left("its only operation is an addition: nothing to fuse")

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
            autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
            ("forward", "inverse", "_elementwise", "_elementwise_forward", "_elementwise_inverse"),
            SplineMade,
            spline_network,
            "forward by maf_forward, inverse by maf_inverse",
            variants={
                type(None): (
                    SplineElements,
                    "spline by rq_spline; its network stays with nflows, and so do the passes of the inverse",
                )
            },
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
        Adapter(
            coupling.PiecewiseRationalQuadraticCouplingTransform,
            ("_coupling_transform", "_piecewise_cdf"),
            SplineCoupling,
            _spline_or_left,
            "spline by rq_spline; its network stays with nflows",
            closed=False,
        ),
    ]
