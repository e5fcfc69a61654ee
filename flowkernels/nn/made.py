"""MADE: a masked network whose output for feature i sees only features before i."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.nn.masked_linear import MaskedLinear, mask_of
from flowkernels.ops.maf.reference import ACTIVATION
from flowkernels.plan import ACTIVATIONS, Plan


def input_degrees(features: int, order: str | Sequence[int] | Tensor) -> Tensor:
    """(D,) degrees 1..D: the place of each feature in the order.

    `order` is ``"natural"``, ``"reversed"``, ``"random"`` (from torch's generator), or the features in the order in
    which they are generated, a permutation of 0..D-1.
    """
    if isinstance(order, str):
        if order == "natural":
            return torch.arange(1, features + 1)
        if order == "reversed":
            return torch.arange(features, 0, -1)
        if order == "random":
            return torch.randperm(features) + 1
        raise ValueError(f"order must be natural, reversed, random or a permutation, got {order!r}")
    permutation = torch.as_tensor(order)
    if permutation.shape != (features,) or not torch.equal(permutation.sort().values, torch.arange(features)):
        raise ValueError(f"order must be a permutation of 0..{features - 1}, got {permutation.tolist()}")
    degrees = torch.empty(features, dtype=torch.long)
    degrees[permutation] = torch.arange(1, features + 1)
    return degrees


class MADE(nn.Module):
    r"""Masked autoencoder for distribution estimation: (N, D) features [and (N, K) context] to (N, D, P) parameters.

    Hidden unit k of degree m(k) sees units of degree <= m(k), output i sees hidden units of degree < i; so output i
    depends on the features before i in `order` alone.

    Args:
        features: D.
        hidden_features: width of each hidden layer; with `residual`, of each residual block of two layers (all equal).
        context_features: K, width of a conditioning input; its linear image is added to the first pre-activation (and,
            with `residual`, to the first of every block).
        params_per_feature: P.
        order: see `input_degrees`.
        degrees: ``"sequential"`` (1, 2, ..., D-1, 1, ...), ``"random"``, or one sequence of integers in 0..D-1 per
            hidden layer. With context, sequential and random degrees start from 0, so that the first feature sees the
            context too.
        residual: pre-activation residual blocks, v + W2 act(W1 act(v)).
        activation: one of ``flowkernels.plan.ACTIVATIONS``.
        parameter_names: names of the P parameters, in their order.

    Under ``torch.device("meta")`` it is built without memory; ``to_empty`` and ``load_state_dict``, which brings the
    degrees too, make it work.

    Raises:
        ValueError: the argument, what it was and what it should be; degrees that let no information through are
            allowed.

    Source: Germain et al. 2015, arXiv:1502.03509.
    """

    in_degrees: Tensor

    def __init__(
        self,
        features: int,
        hidden_features: Sequence[int] = (512, 512),
        *,
        context_features: int = 0,
        params_per_feature: int = 2,
        order: str | Sequence[int] | Tensor = "natural",
        degrees: str | Sequence[Sequence[int] | Tensor] = "sequential",
        residual: bool = False,
        activation: str = "relu",
        parameter_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        hidden_features = tuple(hidden_features)
        _check_sizes(features, hidden_features, context_features, params_per_feature, residual, activation)
        self.features = features
        self.context_features = context_features
        self.params_per_feature = params_per_feature
        self.activation = activation
        self.residual = residual
        if parameter_names is None:
            parameter_names = (
                ("shift", "scale") if params_per_feature == 2 else tuple(map(str, range(params_per_feature)))
            )
        self.parameter_names = tuple(parameter_names)

        widths = (
            [hidden_features[0]] + [h for h in hidden_features for _ in range(2)] if residual else [*hidden_features]
        )
        # On the CPU, whatever the default device: they are read here, and on "meta" there would be nothing to read.
        with torch.device("cpu"):
            chain = [input_degrees(features, order)]
            for i, width in enumerate(widths):
                same = residual and i > 0
                chain.append(_hidden_degrees(features, width, chain[-1], degrees, i, context_features > 0, same))
            chain.append(chain[0].repeat_interleave(params_per_feature))
        strict = [False] * len(widths) + [True]
        self.register_buffer("in_degrees", torch.as_tensor(chain[0]).clone())
        layers = [MaskedLinear(*ends, strict=s) for ends, s in zip(pairwise(chain), strict, strict=True)]
        self.layers = nn.ModuleList(layers)
        self.context_layers = nn.ModuleDict()
        if context_features:
            for i in self._context_indices():
                self.context_layers[str(i)] = nn.Linear(context_features, layers[i].out_features, bias=False)
        # Built here and not when first needed: that may be inside a functorch transform or under torch.compile.
        self.plan = self._make_plan([mask_of(*ends, s) for ends, s in zip(pairwise(chain), strict, strict=True)])
        self.register_load_state_dict_post_hook(_plan_again)

    def _context_indices(self) -> tuple[int, ...]:
        if not self.context_features:
            return ()
        return (0, *range(1, len(self.layers) - 1, 2)) if self.residual else (0,)

    def _make_plan(self, masks: Sequence[Tensor]) -> Plan:
        """The order in which units become final."""
        hidden = len(self.layers) - 1
        residual: list[int | None] = [None] * hidden
        activation = [self.activation] * hidden
        if self.residual:
            residual[2::2] = list(range(0, hidden - 2, 2))
            activation[-1] = "identity"
        return Plan(
            masks,
            activation=activation,
            residual=residual,
            context=self._context_indices(),
            parameters=self.parameter_names,
        )

    def _masked_layers(self) -> list[MaskedLinear]:
        return list(self.layers)  # type: ignore[arg-type]

    def plan_parameters(self) -> list[Tensor]:
        """weight_0, bias_0, weight_1, ...: what the operators of `plan` take."""
        # Straight from the dictionaries: attribute access of a Module costs more than a small network's arithmetic.
        found: list[Tensor] = []
        for layer in self._modules["layers"]._modules.values():  # type: ignore[union-attr]
            own = layer._parameters  # type: ignore[union-attr]
            for name in ("weight", "bias"):
                plain = own.get(name)
                found.append(getattr(layer, name) if plain is None else plain)  # a parametrization is computed
        return found

    def context_terms(self, context: Tensor | None) -> Tensor | None:
        """(N, plan.context_width) what the context adds to the pre-activations, or None without context."""
        if not self.context_features:
            if context is not None:
                raise ValueError("context was given, but this network was built with context_features=0")
            return None
        if context is None:
            raise ValueError(f"context is missing: this network needs one of shape (N, {self.context_features})")
        if context.dim() != 2 or context.shape[1] != self.context_features:
            raise ValueError(f"context must have shape (N, {self.context_features}), got {tuple(context.shape)}")
        terms = [layer(context) for layer in self.context_layers.values()]
        return terms[0] if len(terms) == 1 else torch.cat(terms, dim=1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, D, P): the parameters of every feature, from the features before it."""
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"x must have shape (N, {self.features}), got {tuple(x.shape)}")
        joined = self.context_terms(context)
        indices = self._context_indices()
        layers = self._masked_layers()
        terms: dict[int, Tensor] = {}
        if joined is not None:
            terms = dict(zip(indices, joined.split([layers[i].out_features for i in indices], dim=1), strict=True))
        before: list[Tensor] = []
        a = x
        for i, layer in enumerate(layers[:-1]):
            v = layer(a) + terms[i] if i in terms else layer(a)
            source = self.plan.residual[i]
            if source is not None:
                v = v + before[source]
            before.append(v)
            a = ACTIVATION[self.plan.activation[i]](v)
        out: Tensor = layers[-1](a)
        if len(layers) == 1 and joined is not None:
            out = out + joined
        return out.reshape(-1, self.features, self.params_per_feature)

    def extra_repr(self) -> str:
        return f"features={self.features}, context_features={self.context_features}, residual={self.residual}"


def _plan_again(module: MADE, _: Any) -> None:
    """Degrees are part of the state: other ones may just have been loaded."""
    masks = [layer.mask() for layer in module._masked_layers()]
    if not any(mask.is_meta for mask in masks):  # nothing can be loaded into what has no data yet
        module.plan = module._make_plan(masks)


def _check_sizes(
    features: int, hidden: tuple[int, ...], context: int, per: int, residual: bool, activation: str
) -> None:
    for name, value, least in (
        ("features", features, 1),
        ("context_features", context, 0),
        ("params_per_feature", per, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    for width in hidden:
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"hidden_features must be positive integers, got {hidden}")
    if residual and (not hidden or len(set(hidden)) != 1):
        raise ValueError(f"hidden_features of a residual network must be equal and at least one, got {hidden}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _hidden_degrees(
    features: int,
    width: int,
    previous: Tensor,
    degrees: str | Sequence[Sequence[int] | Tensor],
    layer: int,
    with_context: bool,
    same: bool,
) -> Tensor:
    if isinstance(degrees, str):
        least = 0 if with_context else min(1, features - 1)
        if degrees == "sequential":
            return torch.arange(width) % max(1, features - least) + least
        if degrees == "random":
            # The skip connection of a residual block keeps degrees, so every layer has those of the first.
            if same:
                return previous.clone()
            low = min(int(previous.min()) if layer else least, features - 1)
            return torch.randint(low, max(features, low + 1), (width,))
        raise ValueError(f"degrees must be sequential, random or a list of sequences, got {degrees!r}")
    if layer >= len(degrees):
        raise ValueError(f"degrees must hold a sequence for each hidden layer, got {len(degrees)}")
    given = torch.as_tensor(degrees[layer])
    if given.shape != (width,) or given.is_floating_point():
        raise ValueError(f"degrees[{layer}] must hold {width} integers, got {tuple(given.shape)} of {given.dtype}")
    if len(given) and (int(given.min()) < 0 or int(given.max()) >= max(features, 1)):
        raise ValueError(f"degrees[{layer}] must lie in 0..{features - 1}, got {int(given.min())}..{int(given.max())}")
    return given.long()
