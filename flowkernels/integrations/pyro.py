"""Pyro (tested with 1.9): https://pyro.ai

Pyro's `AffineAutoregressive` is an IAF: its forward direction is one pass, its inverse is sequential, and so it is with
`SplineAutoregressive`. They keep the log-scale or log-det of every feature of the last call for `log_abs_det_jacobian`,
which adds it up; here the sum is kept, as one column.

A value less than 1e-6 above a knot counts for Pyro to the bin below it, here to the one above: there the derivative of
its log-det, which jumps at a knot, is another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowkernels.integrations._common import (
    Adapter,
    Left,
    Network,
    Reader,
    Replaced,
    Structure,
    attach,
    law_of,
    takes,
)
from flowkernels.ops.affine_coupling import affine_coupling
from flowkernels.transforms import LRSpline, RQSpline, Spline

TESTED = ("1.9", "1.10")


class ArnNetwork(Network):
    """Network of an `AutoRegressiveNN` or `ConditionalAutoRegressiveNN`, the child `name` of `owner`."""

    def __init__(self, owner: nn.Module, name: str, kind: Any, base: Any, linear: Any) -> None:
        self.owner, self.name = owner, name
        self.kind, self.base, self.linear = kind, base, linear
        super().__init__(self._read)

    def _transform(self, reader: Reader) -> tuple[nn.Module, tuple[str, ...], list[int]]:
        """The module whose child the network is; the parameters of a feature, and Pyro's numbers of them."""
        return self.owner, ("shift", "scale"), [1, 1]

    def _read(self, reader: Reader) -> Structure:
        holder, names, dims = self._transform(reader)
        net: Any = reader.module(holder, self.name, self.kind)
        if type(net)._forward is not self.base._forward:
            raise Left(f"{self.name} is a subclass with its own _forward")
        if reader.value(net, "skip_layer") is not None:
            raise Left("skip connections from input to output")
        if list(reader.value(net, "param_dims")) != dims:
            raise Left(f"param_dims are {list(net.param_dims)}, not {dims}")
        layers = reader.children(reader.module(net, "layers"), "layers")
        linears = [reader.linear(layer, f"layers.{i}", self.linear) for i, layer in enumerate(layers)]
        activation = reader.activation(net, "f")
        hidden = len(linears) - 1
        context, features = reader.value(net, "context_dim"), reader.value(net, "input_dim")
        return Structure(
            tuple(linears),
            (activation,) * hidden,
            (None,) * hidden,
            names,
            layout="blocked",
            columns=(context, context + features),
        )


@functools.lru_cache(maxsize=64)
def _spline_of(order: str, bins: int, bound: float) -> Spline:
    return LRSpline(bins, bound=bound) if order == "linear" else RQSpline("pyro", bins, bound=bound)


class SplineArnNetwork(ArnNetwork):
    """Network of a `SplineAutoregressive` (child `nn` of its `ConditionalSpline`), or of the conditional variant."""

    law: Spline
    options: dict[str, Any]

    def _read(self, reader: Reader) -> Structure:
        structure = super()._read(reader)
        given, (begin, end) = reader.value(self.holder, "input_dim"), structure.columns or (0, 0)
        if given != end - begin:
            raise Left(f"input_dim is {given}, but its network has {end - begin} features")
        return structure

    def _transform(self, reader: Reader) -> tuple[nn.Module, tuple[str, ...], list[int]]:
        from pyro.distributions.transforms import ConditionalSpline, SplineAutoregressive

        holder: Any = self.owner
        self.options = {"order": "linear", "count_bins": 8, "bound": 3.0}
        if isinstance(holder, SplineAutoregressive):
            holder = reader.module(holder, "spline", ConditionalSpline)
            for name in ("condition", "_params"):
                if getattr(type(holder), name) is not getattr(ConditionalSpline, name) or reader.value(holder, name):
                    raise Left(f"spline has its own {name}")
            self.options = {name: reader.value(holder, name) for name in self.options}
        else:
            given = reader.value(holder, "kwargs")
            reader.seen.extend((given, name, given.get(name)) for name in self.options)
            self.options = {name: given.get(name, default) for name, default in self.options.items()}
        self.holder = holder
        order, bins, bound = self.options.values()
        if order not in ("linear", "quadratic") or not isinstance(bound, (int, float)):
            raise Left(f"no kernel for a spline with order {order!r} and bound {bound!r}")
        try:
            self.law = _spline_of(order, bins, float(bound))
        except (TypeError, ValueError) as error:
            raise Left(f"no kernel for this spline: {error}") from None
        lambdas = [bins] if order == "linear" else []
        return holder, self.law.parameter_names, [bins, bins, bins - 1, *lambdas]


_Choose = Callable[[Any, Any], tuple[Any, str] | None]


def _run(this: Any, x: Any, inverse: bool, choose: _Choose, cache: str) -> Any:
    """y, with the log-det kept where Pyro keeps it, or None: Pyro has to do this call."""
    state = this._flowkernels
    network, context = state.data
    if state.owner() is not this or not network.ready():
        return None
    law = choose(this, network)
    done = None if law is None else network.run(x, context, inverse, *law)
    if done is None:
        return None
    y, logdet = done
    setattr(this, cache, (-logdet if inverse else logdet).unsqueeze(-1))
    return y


def _affine(this: Any, network: ArnNetwork) -> tuple[Any, str] | None:
    try:
        if this.stable:
            return law_of("sigmoid", offset=this.sigmoid_bias, floor=0.0), "gate"
        clip = law_of("clip", lo=this.log_scale_min_clip, hi=this.log_scale_max_clip, pass_gradient=1.0)
        return clip, "scale_shift"
    except (TypeError, ValueError):
        return None


def _spline(this: Any, network: SplineArnNetwork) -> tuple[Any, str] | None:
    same = all(getattr(this.spline, name) == value for name, value in network.options.items())
    return (network.law, "scale_shift") if same else None


class Iaf(Replaced):
    """_call and _inverse of `pyro.distributions.transforms.AffineAutoregressive`, in both of its forms."""

    def _call(self, x: Tensor) -> Any:
        done = _run(self, x, False, _affine, "_cached_log_scale")
        if done is not None:
            return done
        peer, this = self._flowkernels_class, cast(Any, self)
        return peer._call_stable(this, x) if this.stable else peer._call(this, x)

    def _inverse(self, y: Tensor) -> Any:
        done = _run(self, y, True, _affine, "_cached_log_scale")
        if done is not None:
            return done
        peer, this = self._flowkernels_class, cast(Any, self)
        return peer._inverse_stable(this, y) if this.stable else peer._inverse(this, y)


class SplineIaf(Replaced):
    """_call and _inverse of `pyro.distributions.transforms.SplineAutoregressive`, of both orders."""

    def _call(self, x: Tensor) -> Any:
        done = _run(self, x, False, _spline, "_cache_log_detJ")
        return self._flowkernels_class._call(self, x) if done is None else done

    def _inverse(self, y: Tensor) -> Any:
        done = _run(self, y, True, _spline, "_cache_log_detJ")
        return self._flowkernels_class._inverse(self, y) if done is None else done


class ConditionalIaf(Replaced):
    """condition of `ConditionalAffineAutoregressive` and `ConditionalSplineAutoregressive`: gives an accelerated
    transform that shares this one's network."""

    def condition(self, context: Any) -> Any:
        transform = self._flowkernels_class.condition(self, context)
        state = self._flowkernels
        if state.owner() is self and isinstance(context, Tensor):
            attach(transform, (_adapter(type(transform).__name__), (state.data, context)))
        return transform


class Coupling(Replaced):
    """_call and _inverse of `pyro.distributions.transforms.AffineCoupling` over the last dimension."""

    def _call(self, x: Any) -> Any:
        done = _couple(self, x, False)
        return self._flowkernels_class._call(self, x) if done is None else done

    def _inverse(self, y: Any) -> Any:
        done = _couple(self, y, True)
        return self._flowkernels_class._inverse(self, y) if done is None else done


def _couple(transform: Any, x: Any, inverse: bool) -> Any:
    this = transform
    if this.dim != -1 or not takes(x) or x.dim() < 1 or not 0 < this.split_dim < x.shape[-1]:
        return None
    try:
        law = law_of("clip", lo=this.log_scale_min_clip, hi=this.log_scale_max_clip, pass_gradient=1.0)
    except (TypeError, ValueError):
        return None
    first, second = x.split([this.split_dim, x.shape[-1] - this.split_dim], dim=-1)
    mean, log_scale = this.nn(first)
    if not takes(x, mean, log_scale) or not mean.shape == second.shape == log_scale.shape:
        return None  # broadcast or mixed types: Pyro runs its network once more and sees to them
    y, logdet = affine_coupling(second, mean, log_scale, law=law, inverse=inverse)
    this._cached_log_scale = (-logdet if inverse else logdet).unsqueeze(-1)
    return torch.cat([first, y], dim=-1)


class ConditionalCoupling(Replaced):
    """condition of `ConditionalAffineCoupling`."""

    def condition(self, context: Any) -> Any:
        transform = self._flowkernels_class.condition(self, context)
        attach(transform, (_adapter("AffineCoupling"), None))
        return transform


class _Ready(tuple[Network, Tensor | None]):
    """(network, context), with the network's word on whether it can run."""

    @property
    def reason(self) -> str:
        return self[0].reason

    def why_not_now(self) -> str | None:
        return self[0].why_not_now()


def _along_last(transform: Any) -> None:
    dim = transform.kwargs.get("dim", -1) if "kwargs" in transform.__dict__ else transform.dim
    if dim != -1:
        raise Left(f"it splits along dimension {dim}, not the last one")


def adapters() -> list[Adapter]:
    from pyro.distributions import transforms
    from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, MaskedLinear

    def plain(network: Any, name: str) -> Any:
        networks = AutoRegressiveNN, ConditionalAutoRegressiveNN, MaskedLinear
        return lambda transform: _Ready((network(transform, name, *networks), None))

    def conditional(network: Any) -> Any:
        kind = ConditionalAutoRegressiveNN
        return lambda transform: network(transform, "nn", kind, kind, MaskedLinear)

    both_ways = "call (one pass) by maf_forward, inverse (sequential) by maf_inverse"
    conditioned = "the transform that condition() gives, by maf_forward and maf_inverse"
    found = [
        Adapter(
            transforms.AffineAutoregressive,
            ("_call", "_inverse", "_call_stable", "_inverse_stable", "log_abs_det_jacobian"),
            Iaf,
            plain(ArnNetwork, "arn"),
            both_ways,
            hides=("_call", "_inverse"),
        ),
        Adapter(
            transforms.ConditionalAffineAutoregressive,
            ("condition",),
            ConditionalIaf,
            conditional(ArnNetwork),
            conditioned,
        ),
        Adapter(
            transforms.SplineAutoregressive,
            ("_call", "_inverse", "log_abs_det_jacobian"),
            SplineIaf,
            plain(SplineArnNetwork, "nn"),
            both_ways,
        ),
        Adapter(
            transforms.ConditionalSplineAutoregressive,
            ("condition",),
            ConditionalIaf,
            conditional(SplineArnNetwork),
            conditioned,
        ),
    ]
    coupling_methods = ("_call", "_inverse", "log_abs_det_jacobian")
    words = "affine map by affine_coupling; its network stays with Pyro"
    found += [
        Adapter(transforms.AffineCoupling, coupling_methods, Coupling, _along_last, words, closed=False),
        Adapter(
            transforms.ConditionalAffineCoupling, ("condition",), ConditionalCoupling, _along_last, words, closed=False
        ),
    ]
    _found.update({adapter.base.__name__: adapter for adapter in found})
    return found


_found: dict[str, Adapter] = {}


def _adapter(name: str) -> Adapter:
    return _found[name]
