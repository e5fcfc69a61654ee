"""Masked autoregressive flows in plain PyTorch: the rivals, and the truth in float64. Calls no operator of ours.

The weights are those of a `flowkernels.models.MAF`, shared, not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkernels.models import MAF

Law = Callable[[Tensor], Tensor]  # u -> sigma


def softplus_law(u: Tensor) -> Tensor:
    return F.softplus(u) + 1e-3


def softclip_law(u: Tensor) -> Tensor:
    """zuko's."""
    return torch.exp(u / (1 + (u / 6.907755278982137).abs()))


def sigmoid_law(u: Tensor) -> Tensor:
    """normflows'."""
    return torch.sigmoid(u + 2) + 1e-3


@dataclass
class Net:
    """One transform's network: dense weights with the masks beside them, the features in generating order."""

    weights: list[Tensor]
    biases: list[Tensor]
    masks: list[Tensor]
    order: Tensor  # (D,) the feature generated at each step
    degrees: list[Tensor]  # of the hidden layers' units
    relu_from: int = 0  # the first hidden layer that has an activation; normflows has none after its first

    @property
    def features(self) -> int:
        return len(self.order)

    def double(self) -> Net:
        return self._with([w.detach().double() for w in self.weights], [b.detach().double() for b in self.biases])

    def leaves(self) -> Net:
        """float64 copies that gradients can be had for."""
        double = self.double()
        return self._with([w.requires_grad_() for w in double.weights], [b.requires_grad_() for b in double.biases])

    def masked(self) -> Net:
        """The weights multiplied by their masks once, which is enough as long as they don't change."""
        ones = [torch.ones((), dtype=w.dtype) for w in self.weights]
        return self._with([(w * m).detach() for w, m in zip(self.weights, self.masks, strict=True)], self.biases, ones)

    def unmasked(self) -> Net:
        """The dense network of the same sizes: no mask at all."""
        return self._with(self.weights, self.biases, [torch.ones((), dtype=w.dtype) for w in self.weights])

    def _with(self, weights: list[Tensor], biases: list[Tensor], masks: list[Tensor] | None = None) -> Net:
        masks = [m.to(weights[0].dtype) for m in self.masks] if masks is None else masks
        return Net(weights, biases, masks, self.order, self.degrees, self.relu_from)

    def __call__(self, x: Tensor, multiply: bool = True) -> Tensor:
        """(N, D) -> (N, D, 2), shift and scale."""
        last = len(self.weights) - 1
        for i, (weight, bias, mask) in enumerate(zip(self.weights, self.biases, self.masks, strict=True)):
            x = F.linear(x, weight * mask if multiply else weight, bias)
            if self.relu_from <= i < last:
                x = torch.relu(x)
        return x.reshape(-1, self.features, 2)


def nets_of(flow: MAF) -> list[Net]:
    nets = []
    for layer in flow.layers:
        made: Any = layer.conditioner
        linear = list(made.layers)
        nets.append(
            Net(
                weights=[m.weight for m in linear],
                biases=[m.bias for m in linear],
                masks=[m.mask().to(m.weight.dtype) for m in linear],
                order=torch.argsort(made.in_degrees),
                degrees=[m.out_degrees for m in linear[:-1]],
            )
        )
    return nets


def existing_weights(nets: list[Net]) -> int:
    """How many weights the masks leave: two operations for each and row are what a density pass or a sample needs."""
    return int(sum(m.count_nonzero() for net in nets for m in net.masks))


def density(nets: list[Net], x: Tensor, law: Law = softplus_law, multiply: bool = True) -> tuple[Tensor, Tensor]:
    """x -> z, logdet."""
    total = x.new_zeros(len(x))
    for net in nets:
        theta = net(x, multiply)
        sigma = law(theta[..., 1])
        x = sigma * x + theta[..., 0]
        total = total + sigma.log().sum(-1)
    return x, total


def log_prob(nets: list[Net], x: Tensor, law: Law = softplus_law, multiply: bool = True) -> Tensor:
    z, logdet = density(nets, x, law, multiply)
    return logdet - 0.5 * (z.square() + 1.8378770664093453).sum(-1)


def sample_naive(nets: list[Net], z: Tensor, law: Law = softplus_law, multiply: bool = True) -> tuple[Tensor, Tensor]:
    """z -> x, logdet, by D passes of each whole network: how it is done where nothing better is at hand."""
    total = z.new_zeros(len(z))
    for net in reversed(nets):
        x = torch.zeros_like(z)
        for _ in range(net.features):
            theta = net(x, multiply)
            sigma = law(theta[..., 1])
            x = (z - theta[..., 0]) / sigma
        z = x
        total = total - sigma.log().sum(-1)
    return z, total


class Blocked:
    """The sampler with which flowkernels wins, written in Python: every weight is used once.

    Units are sorted by degree. For a block of features, what earlier blocks contribute is one product per layer; inside
    the block, each feature is followed by the units that were waiting for it. Weights are sorted and masked once.
    """

    def __init__(self, net: Net, block: int = 32) -> None:
        self.block, self.relu_from, self.order = block, net.relu_from, net.order
        d = net.features
        perms = [torch.argsort(degrees, stable=True) for degrees in net.degrees]
        # edges[l][m]: how many units of layer l have a degree of at most m.
        self.edges = [
            torch.searchsorted(degrees[perm].contiguous(), torch.arange(d + 1), right=True).tolist()
            for degrees, perm in zip(net.degrees, perms, strict=True)
        ]
        assert all(edge[0] == 0 for edge in self.edges), "units that see no feature are not provided for"
        rows = [*perms, torch.stack([2 * net.order, 2 * net.order + 1], 1).flatten()]
        columns = [net.order, *perms]
        self.weights, self.biases = [], []
        for weight, bias, mask, row, column in zip(net.weights, net.biases, net.masks, rows, columns, strict=True):
            self.weights.append((weight * mask)[row][:, column])
            self.biases.append(bias[row])
        self.last_rows = [(int(2 * s), int(2 * min(s + block, d))) for s in range(0, d, block)]

    def __call__(self, z: Tensor, law: Law = softplus_law) -> tuple[Tensor, Tensor]:
        """Writes into buffers, for use without autograd."""
        n, d = z.shape
        z = z[:, self.order]
        # Feature by feature, so that what one step reads and writes lies together.
        x = z.new_empty(d, n)
        sigmas = z.new_empty(d, n)
        hidden = [z.new_empty(edge[-1], n) for edge in self.edges]
        z = z.T.contiguous()
        *inner, out = self.weights
        for begin in range(0, d, self.block):
            end = min(begin + self.block, d)
            # Rows of each layer that become final in this block, and how much of the layer before is final already.
            spans = [(edge[begin], edge[end]) for edge in self.edges]
            base = []
            for layer, (r0, r1) in enumerate(spans):
                before, done = (x, begin) if layer == 0 else (hidden[layer - 1], spans[layer - 1][0])
                base.append(torch.addmm(self.biases[layer][r0:r1, None], inner[layer][r0:r1, :done], before[:done]))
            done = spans[-1][0]
            theta = torch.addmm(
                self.biases[-1][2 * begin : 2 * end, None], out[2 * begin : 2 * end, :done], hidden[-1][:done]
            )
            for i in range(begin, end):
                last = self.edges[-1][i]
                pair = theta[2 * (i - begin) : 2 * (i - begin) + 2]
                if last > done:
                    pair = torch.addmm(pair, out[2 * i : 2 * i + 2, done:last], hidden[-1][done:last])
                sigma = law(pair[1])
                torch.div(z[i] - pair[0], sigma, out=x[i])
                sigmas[i] = sigma
                for layer, (r0, _) in enumerate(spans):
                    a, b = self.edges[layer][i], self.edges[layer][i + 1]
                    if a == b:
                        continue
                    before, c0, c1 = (
                        (x, begin, i + 1)
                        if layer == 0
                        else (hidden[layer - 1], spans[layer - 1][0], self.edges[layer - 1][i + 1])
                    )
                    v = torch.addmm(base[layer][a - r0 : b - r0], inner[layer][a:b, c0:c1], before[c0:c1])
                    hidden[layer][a:b] = v.relu_() if layer >= self.relu_from else v
        samples = z.new_empty(n, d)
        samples[:, self.order] = x.T
        return samples, -sigmas.log().sum(0)

    def differentiable(self, z: Tensor, law: Law = softplus_law) -> tuple[Tensor, Tensor]:
        """The same without writing into anything that autograd has seen."""
        z = z[:, self.order].T
        d = len(z)
        *inner, out = self.weights
        x_done: list[Tensor] = []
        h_done: list[list[Tensor]] = [[] for _ in inner]
        total = z.new_zeros(z.shape[1])

        def product(bias: Tensor, weight: Tensor, parts: list[Tensor]) -> Tensor:
            return torch.addmm(bias, weight, torch.cat(parts)) if parts else bias

        for begin in range(0, d, self.block):
            end = min(begin + self.block, d)
            spans = [(edge[begin], edge[end]) for edge in self.edges]
            base = []
            for layer, (r0, r1) in enumerate(spans):
                parts, done = (x_done, begin) if layer == 0 else (h_done[layer - 1], spans[layer - 1][0])
                bias = self.biases[layer][r0:r1, None].expand(-1, z.shape[1])
                base.append(product(bias, inner[layer][r0:r1, :done], parts))
            done = spans[-1][0]
            bias = self.biases[-1][2 * begin : 2 * end, None].expand(-1, z.shape[1])
            theta = product(bias, out[2 * begin : 2 * end, :done], h_done[-1])
            x_now: list[Tensor] = []
            h_now: list[list[Tensor]] = [[] for _ in inner]
            for i in range(begin, end):
                pair = theta[2 * (i - begin) : 2 * (i - begin) + 2]
                pair = product(pair, out[2 * i : 2 * i + 2, done : self.edges[-1][i]], h_now[-1])
                sigma = law(pair[1])
                total = total - sigma.log()
                x_now.append(((z[i] - pair[0]) / sigma)[None])
                for layer, (r0, _) in enumerate(spans):
                    a, b = self.edges[layer][i], self.edges[layer][i + 1]
                    if a == b:
                        continue
                    parts, c0, c1 = (
                        (x_now, begin, i + 1)
                        if layer == 0
                        else (h_now[layer - 1], spans[layer - 1][0], self.edges[layer - 1][i + 1])
                    )
                    v = product(base[layer][a - r0 : b - r0], inner[layer][a:b, c0:c1], parts)
                    h_now[layer].append(torch.relu(v) if layer >= self.relu_from else v)
            x_done.append(torch.cat(x_now))
            for h, now in zip(h_done, h_now, strict=True):
                h += [torch.cat(now)] if now else []
        return torch.cat(x_done).T[:, torch.argsort(self.order)], total


def sample_blocked(samplers: list[Blocked], z: Tensor, law: Law = softplus_law) -> tuple[Tensor, Tensor]:
    total = z.new_zeros(len(z))
    for sampler in reversed(samplers):
        z, logdet = sampler(z, law)
        total = total + logdet
    return z, total


def sample_blocked_differentiable(samplers: list[Blocked], z: Tensor, law: Law = softplus_law) -> tuple[Tensor, Tensor]:
    total = z.new_zeros(len(z))
    for sampler in reversed(samplers):
        z, logdet = sampler.differentiable(z, law)
        total = total + logdet
    return z, total
