"""zuko (tested with 1.6): https://github.com/probabilists/zuko

A lazy transform keeps its network and gives, for each context, a transform of `torch.distributions`. That one is
replaced by a subclass of zuko's, so that whatever is done with it afterwards runs through the kernels.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.distributions.transforms import Transform, _InverseTransform

from flowkernels.integrations._common import Adapter, Left, Network, Reader, Replaced, Structure, law_of
from flowkernels.scales import ScaleLaw

TESTED = ("1.6", "1.7")


class MaskedNetwork(Network):
    """Network and law of a `MaskedAutoregressiveTransform`."""

    transform: Any

    def __init__(self, transform: Any) -> None:
        import zuko

        self.transform, self.zuko = transform, zuko
        super().__init__(self._read)
        if self.structure is not None and self.steps > transform.passes:
            self.structure = None
            self.reason = f"its inverse stops after {transform.passes} of {self.steps} passes: it is not exact"

    def _read(self, reader: Reader) -> Structure:
        zuko = self.zuko
        transform = self.transform
        self.law = _law(zuko, reader.value(transform, "univariate"), reader.value(transform, "shapes"))
        reader.value(transform, "passes")
        net = reader.module(transform, "hyper", zuko.nn.MaskedMLP)
        linears: list[nn.Module] = []
        activation: list[str] = []
        residual: list[int | None] = []

        def add(layer: nn.Module, label: str, source: int | None = None) -> None:
            linears.append(reader.linear(layer, label, zuko.nn.MaskedLinear))
            activation.append("identity")
            residual.append(source)

        for i, layer in enumerate(reader.children(net, "hyper")):
            label = f"hyper.{i}"
            if isinstance(layer, zuko.nn.MaskedLinear):
                add(layer, label)
            elif isinstance(layer, zuko.nn.Residual):
                reader.check(layer, label, zuko.nn.Residual)
                inner = reader.children(layer, label)
                if len(inner) != 3:
                    raise Left(f"{label} has {len(inner)} layers, not 3")
                source = len(linears) - 1
                add(inner[0], f"{label}.0")
                activation[-1] = reader.activation_name(inner[1], f"{label}.1", inplace=True)
                add(inner[2], f"{label}.2", source)
            else:
                if not activation or activation[-1] != "identity":
                    raise Left(f"{label}: two activations in a row")
                activation[-1] = reader.activation_name(layer, label, inplace=True)
        if not linears or activation[-1] != "identity" or residual[-1] is not None:
            raise Left("the network does not end with a masked linear layer")
        features = linears[-1]._buffers["mask"].shape[0] // 2  # type: ignore[union-attr]
        return Structure(
            tuple(linears), tuple(activation[:-1]), tuple(residual[:-1]), ("shift", "scale"), columns=(0, features)
        )


def _law(zuko: Any, univariate: Any, shapes: Any) -> ScaleLaw:
    slope = 1e-3
    if isinstance(univariate, functools.partial) and not univariate.args and set(univariate.keywords) <= {"slope"}:
        slope = univariate.keywords.get("slope", slope)
        univariate = univariate.func
    if univariate is not zuko.transforms.MonotonicAffineTransform or [tuple(s) for s in shapes] != [(), ()]:
        raise Left(f"no kernel for the univariate transform {getattr(univariate, '__name__', univariate)}")
    if not (isinstance(slope, float) and 0 < slope < 1):
        raise Left(f"no kernel for the slope {slope}")
    return law_of("softclip", bound=slope)


class LazyMasked(Replaced):
    """forward of `zuko.flows.autoregressive.MaskedAutoregressiveTransform`."""

    def forward(self, c: Tensor | None = None) -> Any:
        network: MaskedNetwork = self._flowkernels.data
        if network.transform is not self or not network.ready():
            return self._flowkernels_class.forward(self, c)
        return _transform_class()(functools.partial(self.meta, c), self.passes, network, c)


@functools.cache
def _transform_class() -> Any:
    """Made when first needed: zuko is imported by then."""
    from zuko.transforms import AutoregressiveTransform

    class Autoregressive(AutoregressiveTransform):  # type: ignore[misc]
        """z_i = sigma(x_<i, c) x_i + t(x_<i, c), both ways by one operator."""

        def __init__(self, meta: Any, passes: int, network: MaskedNetwork, context: Tensor | None) -> None:
            super().__init__(meta, passes)
            self._network, self._context = network, context

        def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
            if not self._network.ready():
                return None
            return self._network.run(x, self._context, inverse, self._network.law)

        def _call(self, x: Tensor) -> Any:
            done = self._run(x, False)
            return super()._call(x) if done is None else done[0]

        def _inverse(self, y: Tensor) -> Any:
            done = self._run(y, True)
            return super()._inverse(y) if done is None else done[0]

        def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Any:
            done = self._run(x, False)
            return super().log_abs_det_jacobian(x, y) if done is None else done[1]

        def call_and_ladj(self, x: Tensor) -> Any:
            done = self._run(x, False)
            return super().call_and_ladj(x) if done is None else done

        @property
        def inv(self) -> Transform:
            return _Inverse(self)

    Autoregressive.__name__ = AutoregressiveTransform.__name__
    Autoregressive.__qualname__ = AutoregressiveTransform.__qualname__
    return Autoregressive


class _Inverse(_InverseTransform):
    """The inverse with its log-det from the same sweep, where zuko adds a density pass for it."""

    def call_and_ladj(self, y: Tensor) -> Any:
        assert self._inv is not None
        done = self._inv._run(y, True)  # type: ignore[attr-defined]
        return super().call_and_ladj(y) if done is None else done  # type: ignore[misc]


_Inverse.__name__ = _InverseTransform.__name__


def adapters() -> list[Adapter]:
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform

    return [
        Adapter(
            MaskedAutoregressiveTransform,
            ("forward", "meta"),
            LazyMasked,
            MaskedNetwork,
            "transform by maf_forward, its inverse by maf_inverse",
        )
    ]
