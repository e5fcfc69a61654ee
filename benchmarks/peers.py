"""The peers' flows with the weights of a `flowkernels.models.MAF` (alternating order, ReLU, no residual blocks).

nflows and zuko then compute the same flow, each with its own scale law; normflows has no activation after its first
layer.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import peer
from benchmarks.plain import Net


def _copy(target: Any, source: Tensor) -> None:
    assert target.shape == source.shape
    with torch.no_grad():
        target.copy_(source)


def _copy_made(made: Any, net: Net, middle: list[Any]) -> None:
    """Into nflows' and normflows' MADE: features in generating order, rows in pairs [scale, shift]."""
    linear = [made.initial_layer, *middle, made.final_layer]
    columns = [net.order, *(torch.arange(w.shape[0]) for w in net.weights[:-1])]
    pairs = torch.stack([2 * net.order + 1, 2 * net.order], 1).flatten()
    for i, (layer, weight, bias, column) in enumerate(zip(linear, net.weights, net.biases, columns, strict=True)):
        rows = pairs if i == len(linear) - 1 else torch.arange(weight.shape[0])
        _copy(layer.weight, weight.detach()[rows][:, column])
        _copy(layer.bias, bias.detach()[rows])


def nflows_flow(nets: list[Net]) -> Any:
    """nflows' Flow: its transforms all run in natural order, with a reversal of the features between them."""
    transforms = peer("nflows.transforms")
    chain = []
    for i, net in enumerate(nets):
        if i:
            chain.append(transforms.ReversePermutation(net.features))
        layer = transforms.MaskedAffineAutoregressiveTransform(
            net.features, len(net.biases[0]), num_blocks=len(net.weights) - 2, use_residual_blocks=False
        )
        made = layer.autoregressive_net
        _copy_made(made, net, [block.linear for block in made.blocks])
        chain.append(layer)
    if len(nets) % 2 == 0:
        chain.append(transforms.ReversePermutation(nets[0].features))
    base = peer("nflows.distributions.normal").StandardNormal([nets[0].features])
    return peer("nflows.flows").Flow(transforms.CompositeTransform(chain), base)


def nflows_gradients(flow: Any, nets: list[Net]) -> list[Tensor]:
    """nflows' gradients, in the layout of `nets`: weight_0, bias_0, weight_1, ..."""
    layers = [t for t in flow._transform._transforms if hasattr(t, "autoregressive_net")]
    gradients = []
    for layer, net in zip(layers, nets, strict=True):
        made = layer.autoregressive_net
        linear = [made.initial_layer, *(block.linear for block in made.blocks), made.final_layer]
        pairs = torch.stack([2 * net.order + 1, 2 * net.order], 1).flatten()
        for i, one in enumerate(linear):
            weight, bias = one.weight.grad, one.bias.grad
            if i == 0:
                weight = weight[:, torch.argsort(net.order)]
            if i == len(linear) - 1:
                weight, bias = weight[torch.argsort(pairs)], bias[torch.argsort(pairs)]
            gradients += [weight, bias]
    return gradients


def zuko_flow(nets: list[Net]) -> Any:
    """zuko's MAF: alternating order and [shift, scale] as here, so weights go over as they are."""
    flow = peer("zuko.flows").MAF(
        nets[0].features, 0, transforms=len(nets), hidden_features=[len(b) for b in nets[0].biases[:-1]]
    )
    for transform, net in zip(flow.transform.transforms, nets, strict=True):
        for layer, weight, bias in zip(_zuko_linear(transform), net.weights, net.biases, strict=True):
            _copy(layer.weight, weight.detach())
            _copy(layer.bias, bias.detach())
    return flow


def _zuko_linear(transform: Any) -> list[Any]:
    return [m for m in transform.hyper if hasattr(m, "weight")]


def zuko_gradients(flow: Any) -> list[Tensor]:
    linear = [layer for transform in flow.transform.transforms for layer in _zuko_linear(transform)]
    return [g for layer in linear for g in (layer.weight.grad, layer.bias.grad)]


def normflows_layer(net: Net) -> tuple[Any, Net]:
    """normflows' MaskedAffineAutoregressive and the network that it is: no activation after the first layer."""
    with contextlib.redirect_stdout(io.StringIO()), _quiet():
        flows = peer("normflows.flows")
    layer = flows.MaskedAffineAutoregressive(
        net.features, len(net.biases[0]), num_blocks=len(net.weights) - 2, use_residual_blocks=False
    )
    made = layer.autoregressive_net
    _copy_made(made, net, [block.linear for block in made.blocks])
    layer.eval()
    return layer, Net(net.weights, net.biases, net.masks, net.order, net.degrees, relu_from=1)


@contextlib.contextmanager
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
