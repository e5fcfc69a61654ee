"""nflows' masked autoregressive flow as a `flowkernels.models.MAF`, and back. Weights are copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.integrations._made import MadeNetwork
from flowkernels.models import MAF
from flowkernels.nn import AutoregressiveTransform
from flowkernels.ops.maf.reference import ACTIVATION
from flowkernels.scales import ScaleLaw


def from_nflows(flow: nn.Module) -> MAF:
    """The same density as `flow`, an nflows ``Flow`` of masked affine autoregressive transforms and permutations.

    Permutations become orders: features keep their places, so the noise of a sample is a permutation of nflows' noise.

    Raises:
        TypeError: not an nflows Flow. ValueError: it has a part that `MAF` does not have: the message names it.
    """
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import made
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
    from nflows.transforms.permutations import Permutation

    from flowkernels.integrations.nflows import affine_law

    if not isinstance(flow, Flow):
        raise TypeError(f"flow must be an nflows Flow, got {type(flow).__name__}")
    given: Any = flow
    if type(given._distribution) is not StandardNormal or type(given._embedding_net) is not nn.Identity:
        names = f"{type(given._distribution).__name__} and {type(given._embedding_net).__name__}"
        raise ValueError(f"flow must have a StandardNormal base and no embedding network, got {names}")
    layers: list[nn.Module] = []
    place: Tensor | None = None  # place[i]: which feature stands at position i by now
    for transform in _parts(given._transform):
        if isinstance(transform, Permutation) and transform._dim == 1:
            p = transform._permutation.cpu()
            place = p if place is None else place[p]
        elif isinstance(transform, MaskedAffineAutoregressiveTransform):
            network = MadeNetwork(transform, made, False, affine_law)
            if network.reason:
                raise ValueError(f"flow has a transform that cannot be converted: {network.reason}")
            if place is None:
                place = torch.arange(network.features)
            layers.append(_layer(network, transform._epsilon, place))
        else:
            raise ValueError(
                f"flow has a {type(transform).__name__}; MAF has autoregressive transforms and orders only"
            )
    if not layers:
        raise ValueError("flow has no autoregressive transform")
    like = next(given.parameters())
    model = MAF(int(layers[0].conditioner.features), (1,), 1)  # type: ignore[union-attr, arg-type]
    model.layers = nn.ModuleList(layers)
    return model.to(like).train(given.training)


def _parts(transform: Any) -> list[Any]:
    """The transforms of nested CompositeTransforms, one after the other."""
    from nflows.transforms.base import CompositeTransform

    if type(transform) is not CompositeTransform:
        return [transform]
    return [part for child in transform._transforms for part in _parts(child)]


def _layer(network: MadeNetwork, floor: float, place: Tensor) -> AutoregressiveTransform:
    structure = network.structure
    assert structure is not None
    if structure.context_layers:
        raise ValueError("flow has a context, whose first term goes through an activation in nflows, but not in MAF")
    linears: list[Any] = list(structure.linears)
    residual = any(source is not None for source in structure.residual)
    names = set(structure.activation[:-1] if residual else structure.activation)
    if len(names) > 1:
        raise ValueError(f"flow has a network with different activations: {', '.join(sorted(names))}")
    hidden = [linear.out_features for linear in linears[:-1]]
    features = network.features
    layer = AutoregressiveTransform(
        features,
        hidden[1::2] if residual else hidden,
        law=ScaleLaw("softplus", floor=floor),
        order=place,
        degrees=[linear.degrees.cpu() for linear in linears[:-1]],
        residual=residual,
        activation=names.pop() if names else "relu",
    )
    columns, rows = _places(place)
    with torch.no_grad():
        for i, (to, source) in enumerate(zip(layer.conditioner.layers, linears, strict=True)):
            weight, bias, mask = source.weight.detach(), source.bias.detach(), source.mask.bool()
            if i == 0:
                weight, mask = weight[:, columns], mask[:, columns]
            if i == len(linears) - 1:
                weight, bias, mask = weight[rows], bias[rows], mask[rows]
            if not torch.equal(to.mask(), mask.cpu()):  # type: ignore[operator]
                raise ValueError("flow has masks that do not follow from its degrees")
            to.to(weight)
            to.weight.copy_(weight)  # type: ignore[operator]
            to.bias.copy_(bias)  # type: ignore[operator]
    return layer


def _places(place: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in nflows' layer of our columns, and of our rows: [shift, scale] here, [scale, shift] there."""
    columns = torch.argsort(place)
    return columns, torch.stack([2 * columns + 1, 2 * columns], dim=1).flatten()


def to_nflows(model: MAF) -> Any:
    """The nflows ``Flow`` that maps the same x to the same z as `model`.

    Raises:
        TypeError: not a MAF. ValueError: it has a part that nflows does not have: the message names it.
    """
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
    from nflows.transforms.base import CompositeTransform
    from nflows.transforms.permutations import Permutation

    if not isinstance(model, MAF):
        raise TypeError(f"model must be a flowkernels.models.MAF, got {type(model).__name__}")
    if model.context_features:
        raise ValueError("model has a context, whose first term goes through an activation in nflows, but not in MAF")
    place = torch.arange(model.features)
    chain: list[Any] = []
    for layer in model.layers:
        assert isinstance(layer, AutoregressiveTransform)
        made, law = layer.conditioner, dict(layer.law.parameters) if isinstance(layer.law, ScaleLaw) else {}
        if (
            not isinstance(layer.law, ScaleLaw)
            or layer.law.name != "softplus"
            or law["offset"]
            or layer.form != "scale_shift"
            or layer.flipped
        ):
            raise ValueError(f"model has the transform {layer.extra_repr()}; nflows has softplus(u) + floor only")
        sources: list[Any] = list(made.layers)
        widths = {source.out_features for source in sources[:-1]}
        if len(widths) != 1:
            raise ValueError(f"model has hidden layers of widths {sorted(widths)}; nflows has one width")
        order = torch.argsort(made.in_degrees.cpu())
        if not torch.equal(order, place):
            chain.append(Permutation(torch.argsort(place)[order], dim=1))
            place = order
        transform = MaskedAffineAutoregressiveTransform(
            model.features,
            widths.pop(),
            num_blocks=(len(sources) - 2) // (2 if made.residual else 1),
            use_residual_blocks=made.residual,
            activation=ACTIVATION[made.activation],
        )
        transform._epsilon = law["floor"]
        net = transform.autoregressive_net
        targets = [net.initial_layer]
        for block in net.blocks:
            targets += list(block.linear_layers) if made.residual else [block.linear]
        _, rows = _places(place)
        back = torch.argsort(rows)
        with torch.no_grad():
            for i, (to, source) in enumerate(zip([*targets, net.final_layer], sources, strict=True)):
                weight, bias, mask = source.weight.detach(), source.bias.detach(), source.mask()
                if i == 0:
                    weight, mask = weight[:, place], mask[:, place]
                if i == len(sources) - 1:
                    weight, bias, mask = weight[back], bias[back], mask[back]
                else:
                    to.degrees.copy_(source.out_degrees)
                to.to(weight.dtype)
                to.weight.copy_(weight)
                to.bias.copy_(bias)
                to.mask.copy_(mask)
        chain.append(transform)
    if not torch.equal(place, torch.arange(model.features)):
        chain.append(Permutation(torch.argsort(place), dim=1))
    like = next(model.parameters())
    flow = Flow(CompositeTransform(chain), StandardNormal([model.features]))
    return flow.to(like).train(model.training)
