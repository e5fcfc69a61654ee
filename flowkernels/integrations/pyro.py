"""Pyro (tested with 1.9): https://pyro.ai

Pyro's `AffineAutoregressive` is an IAF: its forward direction is one pass, its inverse is sequential. It keeps the last
log-scale for `log_abs_det_jacobian`, which adds it up; here the sum is kept, as one column.
"""

from __future__ import annotations

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

TESTED = ("1.9", "1.10")


class ArnNetwork(Network):
    """Network of an `AutoRegressiveNN` or `ConditionalAutoRegressiveNN`, the child `name` of `owner`."""

    def __init__(self, owner: nn.Module, name: str, kind: Any, base: Any, linear: Any) -> None:
        self.owner, self.name = owner, name
        self.kind, self.base, self.linear = kind, base, linear
        super().__init__(self._read)

    def _read(self, reader: Reader) -> Structure:
        net: Any = reader.module(self.owner, self.name, self.kind)
        if type(net)._forward is not self.base._forward:
            raise Left(f"{self.name} is a subclass with its own _forward")
        if reader.value(net, "skip_layer") is not None:
            raise Left("skip connections from input to output")
        if list(reader.value(net, "param_dims")) != [1, 1]:
            raise Left(f"param_dims are {list(net.param_dims)}, not [1, 1]")
        layers = reader.children(reader.module(net, "layers"), "layers")
        linears = [reader.linear(layer, f"layers.{i}", self.linear) for i, layer in enumerate(layers)]
        activation = reader.activation(net, "f")
        hidden = len(linears) - 1
        context, features = reader.value(net, "context_dim"), reader.value(net, "input_dim")
        return Structure(
            tuple(linears),
            (activation,) * hidden,
            (None,) * hidden,
            ("shift", "scale"),
            layout="blocked",
            columns=(context, context + features),
        )


class Iaf(Replaced):
    """_call and _inverse of `pyro.distributions.transforms.AffineAutoregressive`, in both of its forms."""

    def _run(self, x: Tensor, inverse: bool) -> Tensor | None:
        state = self._flowkernels
        network, context = state.data
        if state.owner() is not self or not network.ready():
            return None
        this: Any = self
        try:
            if this.stable:
                law, form = law_of("sigmoid", offset=this.sigmoid_bias, floor=0.0), "gate"
            else:
                law = law_of("clip", lo=this.log_scale_min_clip, hi=this.log_scale_max_clip, pass_gradient=1.0)
                form = "scale_shift"
        except (TypeError, ValueError):
            return None
        done = network.run(x, context, inverse, law, form)
        if done is None:
            return None
        y, logdet = done
        this._cached_log_scale = (-logdet if inverse else logdet).unsqueeze(-1)
        return y  # type: ignore[no-any-return]

    def _call(self, x: Tensor) -> Any:
        done = self._run(x, False)
        if done is not None:
            return done
        peer, this = self._flowkernels_class, cast(Any, self)
        return peer._call_stable(this, x) if this.stable else peer._call(this, x)

    def _inverse(self, y: Tensor) -> Any:
        done = self._run(y, True)
        if done is not None:
            return done
        peer, this = self._flowkernels_class, cast(Any, self)
        return peer._inverse_stable(this, y) if this.stable else peer._inverse(this, y)


class ConditionalIaf(Replaced):
    """condition of `ConditionalAffineAutoregressive`: gives an accelerated transform that shares this one's network."""

    def condition(self, context: Any) -> Any:
        transform = self._flowkernels_class.condition(self, context)
        state = self._flowkernels
        if state.owner() is self and isinstance(context, Tensor):
            attach(transform, (_adapter("AffineAutoregressive"), (state.data, context)))
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

    def plain(transform: nn.Module) -> _Ready:
        network = ArnNetwork(transform, "arn", AutoRegressiveNN, ConditionalAutoRegressiveNN, MaskedLinear)
        return _Ready((network, None))

    def conditional(transform: nn.Module) -> ArnNetwork:
        kind = ConditionalAutoRegressiveNN
        return ArnNetwork(transform, "nn", kind, kind, MaskedLinear)

    found = [
        Adapter(
            transforms.AffineAutoregressive,
            ("_call", "_inverse", "_call_stable", "_inverse_stable", "log_abs_det_jacobian"),
            Iaf,
            plain,
            "call (one pass) by maf_forward, inverse (sequential) by maf_inverse",
            hides=("_call", "_inverse"),
        ),
        Adapter(
            transforms.ConditionalAffineAutoregressive,
            ("condition",),
            ConditionalIaf,
            conditional,
            "the transform that condition() gives, by maf_forward and maf_inverse",
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
