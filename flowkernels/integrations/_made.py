"""The MADE that nflows and normflows share but for details: both took it from the same code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.integrations._common import Left, Network, Reader, Replaced, Structure
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import RQSpline


class MadeNetwork(Network):
    """Network of a transform whose child `autoregressive_net` is a `MADE` of nflows or normflows.

    Args:
        transform: the transform. made: the peer's module ``made``. normflows: whether it is that of normflows, which
            has no activation after the first layer of a feedforward network, and gates where nflows adds the context.
        law: reads what the transform does to one feature.
    """

    transform: Any
    law: ScaleLaw | RQSpline

    def __init__(
        self, transform: Any, made: Any, normflows: bool, law: Callable[[Reader, Any], ScaleLaw | RQSpline]
    ) -> None:
        self.transform, self.made, self.normflows, self._read_law = transform, made, normflows, law
        super().__init__(self._read, self._terms)

    def _read(self, reader: Reader) -> Structure:
        made = self.made
        self.law = self._read_law(reader, self.transform)
        names = self.law.parameter_names if isinstance(self.law, RQSpline) else ("scale", "shift")
        net = reader.module(self.transform, "autoregressive_net", made.MADE)
        if self.normflows:
            reader.module(net, "preprocessing", nn.Identity)
            if reader.value(net, "context_layer") is not None:
                raise Left("its context goes through gates")
        linear = made.MaskedLinear
        linears = [reader.linear(reader.module(net, "initial_layer"), "initial_layer", linear)]
        activation: list[str] = []
        residual: list[int | None] = []
        blocks = reader.module(net, "blocks", None)
        context: list[nn.Module] = []
        children = reader.children(blocks, "blocks")
        kinds = {type(block) for block in children}
        is_residual = kinds <= {made.MaskedResidualBlock} and bool(kinds)
        if not is_residual and not kinds <= {made.MaskedFeedforwardBlock}:
            raise Left(f"blocks hold {' and '.join(sorted(k.__name__ for k in kinds))}")
        if not self.normflows:
            own = reader.activation(net, "activation")
            if bool(reader.value(net, "use_residual_blocks")) != is_residual and children:
                raise Left("blocks are not of the kind that use_residual_blocks says")
            if not children and reader.value(net, "use_residual_blocks"):
                own = "identity"
            activation.append("" if is_residual else own)
        else:
            activation.append("" if is_residual else "identity")
        residual.append(None)
        for block in children:
            reader.check(block, "block", type(block))
            if is_residual:
                if reader.value(block, "use_batch_norm"):
                    raise Left("batch norm inside the network")
                act = reader.activation(block, "activation")
                activation[-1] = act
                pair = reader.module(block, "linear_layers")
                first, second = reader.children(pair, "linear_layers")
                linears.append(reader.linear(first, "linear_layers.0", linear))
                linears.append(reader.linear(second, "linear_layers.1", linear))
                activation += [act, ""]
                residual += [None, len(residual) - 1]
            else:
                if reader.value(block, "batch_norm") is not None:
                    raise Left("batch norm inside the network")
                linears.append(reader.linear(reader.module(block, "linear"), "linear", linear))
                activation.append(reader.activation(block, "activation"))
                residual.append(None)
            reader.dropout(block, "dropout")
        if is_residual:
            activation[-1] = "identity"
        linears.append(reader.linear(reader.module(net, "final_layer"), "final_layer", linear))
        indices: list[int] = []
        if not self.normflows and reader.value(net, "context_layer") is not None:
            context.append(reader.module(net, "context_layer"))
            indices.append(0)
            if is_residual:
                for i, block in enumerate(children):
                    context.append(reader.module(block, "context_layer"))
                    indices.append(1 + 2 * i)
        self.context, self.net = context, net
        return Structure(tuple(linears), tuple(activation), tuple(residual), names, context_layers=tuple(indices))

    def _terms(self, context: Tensor) -> Tensor:
        first, *others = self.context
        terms = [self.net.activation(first(context)), *(layer(context) for layer in others)]  # type: ignore[operator]
        return terms[0] if len(terms) == 1 else torch.cat(terms, dim=1)


class AffineMade(Replaced):
    """forward and inverse of nflows' and normflows' masked affine autoregressive transforms."""

    def forward(self, inputs: Any, context: Any = None) -> Any:
        network: MadeNetwork = self._flowkernels.data
        if network.transform is self and network.ready():
            done = network.run(inputs, context, False, network.law, rank=2)
            if done is not None:
                return done
        return self._flowkernels_class.forward(self, inputs, context)

    def inverse(self, inputs: Any, context: Any = None) -> Any:
        network: MadeNetwork = self._flowkernels.data
        if network.transform is self and network.ready():
            done = network.run(inputs, context, True, network.law, rank=2)
            if done is not None:
                return done
        return self._flowkernels_class.inverse(self, inputs, context)


TRANSFORM_METHODS = (
    "forward",
    "inverse",
    "_elementwise_forward",
    "_elementwise_inverse",
    "_unconstrained_scale_and_shift",
    "_output_dim_multiplier",
)
