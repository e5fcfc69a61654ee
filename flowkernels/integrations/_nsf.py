"""The rational-quadratic splines that nflows and normflows share: both took them from the authors' code of neural
spline flows (Durkan et al. 2019, arXiv:1906.04032)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.integrations._common import Adapter, Left, Reader, Replaced, spline_of, takes
from flowkernels.integrations._made import AffineMade, MadeNetwork
from flowkernels.ops.rq_spline import rq_spline
from flowkernels.transforms import RQSpline


class SplineCoupling(Replaced):
    """A coupling by splines with linear tails: the spline; the network stays the library's."""

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
    """An autoregressive transform by splines whose network no kernel has: the spline only."""

    def _elementwise(self, inputs: Any, autoregressive_params: Any, inverse: bool = False) -> Any:
        if takes(inputs, autoregressive_params) and inputs.dim() == 2:
            spline = _spline(self, getattr(self, "autoregressive_net", None), warn=False)
            if spline is not None and autoregressive_params.numel() == inputs.numel() * spline.params_per_feature:
                theta = autoregressive_params.view(*inputs.shape, spline.params_per_feature)
                return rq_spline(inputs, theta, spline=spline, inverse=inverse)
        return self._flowkernels_class._elementwise(self, inputs, autoregressive_params, inverse)


class SplineMade(Replaced):
    """An autoregressive transform by splines with linear tails."""

    forward = AffineMade.forward
    inverse = AffineMade.inverse
    _elementwise = SplineElements._elementwise


class SplineCdf(Replaced):
    """Splines with linear tails whose parameters are the same for every sample."""

    def _spline(self, inputs: Any, inverse: bool = False) -> Any:
        this: Any = self
        spline = _spline(self, None, warn=False) if isinstance(inputs, Tensor) and inputs.dim() > 1 else None
        shared = (this.unnormalized_widths, this.unnormalized_heights, this.unnormalized_derivatives)
        if spline is None or inputs.shape[1:] != shared[0].shape[:-1] or not takes(inputs, *shared):
            return self._flowkernels_class._spline(self, inputs, inverse)
        batch = inputs.shape[0]
        theta = torch.cat(shared, dim=-1).reshape(1, -1, spline.params_per_feature).expand(batch, -1, -1)
        y, logdet = rq_spline(inputs.reshape(batch, -1), theta, spline=spline, inverse=inverse)
        return y.reshape(inputs.shape), logdet


def _spline_law(reader: Reader, transform: Any) -> RQSpline:
    for name in ("tails", "num_bins", "tail_bound", "min_bin_width", "min_bin_height", "min_derivative"):
        reader.value(transform, name)
    net = reader.value(transform, "autoregressive_net")
    if hasattr(net, "hidden_features"):  # then the library divides by its root
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
            transform.num_bins if hasattr(transform, "num_bins") else transform.unnormalized_widths.shape[-1],
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


def spline_adapters(
    autoregressive: type[nn.Module],
    coupling: type[nn.Module],
    cdf: type[nn.Module],
    network_of: Callable[[nn.Module, Callable[[Reader, Any], RQSpline]], MadeNetwork],
) -> list[Adapter]:
    """Adapters for one library's three classes; `network_of` gives the network of an autoregressive transform."""

    def spline_network(transform: nn.Module) -> MadeNetwork | None:
        _spline_or_left(transform)
        found = network_of(transform, _spline_law)
        return None if found.reason else found

    return [
        Adapter(
            autoregressive,
            ("forward", "inverse", "_elementwise", "_elementwise_forward", "_elementwise_inverse"),
            SplineMade,
            spline_network,
            "forward by maf_forward, inverse by maf_inverse",
            variants={
                type(None): (
                    SplineElements,
                    "spline by rq_spline; its network stays as it is, and so do the passes of the inverse",
                )
            },
        ),
        Adapter(
            coupling,
            ("_coupling_transform", "_piecewise_cdf"),
            SplineCoupling,
            _spline_or_left,
            "spline by rq_spline; its network stays as it is",
            closed=False,
        ),
        Adapter(cdf, ("_spline",), SplineCdf, _spline_or_left, "spline by rq_spline", closed=False),
    ]
