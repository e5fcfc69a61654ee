"""zuko (tested with 1.6): https://github.com/probabilists/zuko

A lazy transform keeps its network and gives, for each context, a transform of `torch.distributions`. That one is
replaced by a subclass of zuko's, so that whatever is done with it afterwards runs through the kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.transforms import Transform, _InverseTransform

from flowkernels.integrations._chain import run_together
from flowkernels.integrations._common import (
    Adapter,
    Left,
    Network,
    Reader,
    Replaced,
    Structure,
    law_of,
    spline_of,
    takes,
)
from flowkernels.ops.affine_coupling import affine_coupling
from flowkernels.ops.rq_spline import rq_spline
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import RQSpline

TESTED = ("1.6", "1.7")


class MaskedNetwork(Network):
    """Network and law of a `MaskedAutoregressiveTransform`."""

    transform: Any

    def __init__(self, transform: Any) -> None:
        import zuko

        self.transform, self.zuko, self.kind = transform, zuko, _transform_class()
        super().__init__(self._read)
        if self.structure is not None and self.steps > transform.passes:
            self.structure = None
            self.reason = f"its inverse stops after {transform.passes} of {self.steps} passes: it is not exact"

    def _read(self, reader: Reader) -> Structure:
        zuko = self.zuko
        transform = self.transform
        given = reader.value(transform, "univariate"), reader.value(transform, "shapes")
        spline = _spline(zuko, *given)
        self.law: ScaleLaw | RQSpline = _law(zuko, *given) if spline is None else spline
        names = ("shift", "scale") if spline is None else spline.parameter_names
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
        features = linears[-1]._buffers["mask"].shape[0] // len(names)  # type: ignore[union-attr]
        return Structure(tuple(linears), tuple(activation[:-1]), tuple(residual[:-1]), names, columns=(0, features))


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
        return network.kind(functools.partial(self.meta, c), self.passes, network, c)


class LazyComposed(Replaced):
    """forward of `zuko.lazy.LazyComposedTransform`."""

    def forward(self, c: Tensor | None = None) -> Any:
        made = self._flowkernels_class.forward(self, c)
        together, _ = _composed_classes()
        if not torch.compiler.is_compiling() and all(type(t) is _transform_class() for t in made.transforms):
            made.__class__ = together
        return made


class _Runs:
    """Before one of zuko's transforms: both directions and their log-dets by `_run`, or zuko's where it gives None."""

    _run: Callable[[Any, bool], tuple[Tensor, Tensor] | None]

    def _call(self, x: Tensor) -> Any:
        done = self._run(x, False)
        return super()._call(x) if done is None else done[0]  # type: ignore[misc]

    def _inverse(self, y: Tensor) -> Any:
        done = self._run(y, True)
        return super()._inverse(y) if done is None else done[0]  # type: ignore[misc]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Any:
        done = self._run(x, False)
        return super().log_abs_det_jacobian(x, y) if done is None else done[1]  # type: ignore[misc]

    def call_and_ladj(self, x: Tensor) -> Any:
        done = self._run(x, False)
        return super().call_and_ladj(x) if done is None else done  # type: ignore[misc]


@functools.cache
def _composed_classes() -> tuple[Any, Any]:
    from zuko.transforms import ComposedTransform

    class Composed(_Runs, ComposedTransform):  # type: ignore[misc]
        """Masked autoregressive transforms only: all of them in one call."""

        def _run(self, x: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
            parts = self.transforms
            return run_together(x, [t._network for t in parts], [t._context for t in parts], inverse)

        @property
        def inv(self) -> Transform:
            made: Any = super().inv
            made.__class__, made._forward = Inverse, self
            return made  # type: ignore[no-any-return]

    class Inverse(_Runs, ComposedTransform):  # type: ignore[misc]
        _forward: Composed

        def _run(self, x: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
            return self._forward._run(x, not inverse)

    return _as(Composed, ComposedTransform), _as(Inverse, ComposedTransform)


class SplineNetwork:
    """A `MaskedAutoregressiveTransform` or `GeneralCouplingTransform` whose network stays zuko's.

    `univariate` is what the kernels calculate of its parameters: a spline, or for couplings an affine transform.
    """

    def __init__(self, transform: Any) -> None:
        import zuko

        self.zuko, self.transform = zuko, transform
        coupling = isinstance(transform, zuko.flows.coupling.GeneralCouplingTransform)
        self.kind = _coupling_class() if coupling else _spline_class()
        self.univariate: Any = None
        self.reason = ""
        self.read()

    def read(self) -> None:
        transform = self.transform
        self.seen = (transform.univariate, transform.shapes)
        try:
            self.univariate = _spline(self.zuko, *self.seen)
            if self.univariate is None:
                self.univariate = _law(self.zuko, *self.seen)
            self.reason = ""
        except Left as left:
            self.univariate, self.reason = None, str(left)

    def why_not_now(self) -> str | None:
        if self.seen != (self.transform.univariate, self.transform.shapes):
            self.read()
        return self.reason or None

    def parameters(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(..., D, P), from zuko's network."""
        if context is not None:
            x = torch.cat(self.zuko.utils.broadcast(x, context, ignore=1), dim=-1)
        phi: Any = self.transform.hyper(x)
        theta: Tensor = phi.unflatten(-1, (-1, self.transform.total))
        return theta


def _spline(zuko: Any, univariate: Any, shapes: Any) -> RQSpline | None:
    """The spline of a neural spline flow, None for other transforms."""
    options: dict[str, Any] = {}
    if isinstance(univariate, functools.partial) and not univariate.args:
        options, univariate = univariate.keywords, univariate.func
    if univariate is not zuko.transforms.MonotonicRQSTransform:
        return None
    sizes = [math.prod(shape) for shape in shapes]
    if not set(options) <= {"slope", "bound"} or len(sizes) != 3 or sizes[0] != sizes[1] or sizes[2] != sizes[0] - 1:
        raise Left(f"no kernel for splines with {options} and shapes {list(shapes)}")
    try:
        return spline_of(
            "zuko", sizes[0], bound=float(options.get("bound", 5.0)), min_slope=float(options.get("slope", 1e-3))
        )
    except (TypeError, ValueError) as error:
        raise Left(f"no kernel for this spline: {error}") from None


class LazySpline(Replaced):
    """forward of a `MaskedAutoregressiveTransform` of splines."""

    def forward(self, c: Tensor | None = None) -> Any:
        network: SplineNetwork = self._flowkernels.data
        if network.transform is not self or network.why_not_now() or not isinstance(network.univariate, RQSpline):
            return self._flowkernels_class.forward(self, c)
        this: Any = self
        return network.kind(functools.partial(this.meta, c), this.passes, network, c)


@functools.cache
def _spline_class() -> Any:
    from zuko.transforms import AutoregressiveTransform

    class Autoregressive(_Runs, AutoregressiveTransform):  # type: ignore[misc]
        """x_i -> spline(x_i; parameters of x_<i and c): zuko's network and passes, the spline by one operator."""

        def __init__(self, meta: Any, passes: int, network: SplineNetwork, context: Tensor | None) -> None:
            super().__init__(meta, passes)
            self._network, self._context = network, context

        def _run(self, x: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
            if not _fits(x, self._context):
                return None
            if not inverse:
                return self._at(x, x, False)
            found, ladj = torch.zeros_like(x), x.new_zeros(x.shape[:-1])
            for _ in range(self.passes):
                found, ladj = self._at(x, found, True)
            return found, ladj

        def _at(self, x: Tensor, at: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
            network = self._network
            return rq_spline(x, network.parameters(at, self._context), spline=network.univariate, inverse=inverse)

    return _as(Autoregressive, AutoregressiveTransform)


class LazyCoupling(Replaced):
    """forward of `zuko.flows.coupling.GeneralCouplingTransform`."""

    def forward(self, c: Tensor | None = None) -> Any:
        network: SplineNetwork = self._flowkernels.data
        if network.transform is not self or network.why_not_now():
            return self._flowkernels_class.forward(self, c)
        this: Any = self
        return network.kind(functools.partial(this.meta, c), this.mask, network, c)


@functools.cache
def _coupling_class() -> Any:
    from zuko.transforms import CouplingTransform

    class Coupling(_Runs, CouplingTransform):  # type: ignore[misc]
        """The transformed split, and for affine transforms the merge with the other one, by one operator."""

        def __init__(self, meta: Any, mask: Tensor, network: SplineNetwork, context: Tensor | None) -> None:
            super().__init__(meta, mask)
            self._network, self._context = network, context

        def _run(self, x: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
            c = self._context
            if not _fits(x, c):
                return None
            univariate = self._network.univariate
            theta = self._network.parameters(x[..., self.idx_a], c)
            if isinstance(univariate, RQSpline):
                kept, moved = self.split(x)
                moved, ladj = rq_spline(moved, theta, spline=univariate, inverse=inverse)
                return self.merge(kept, moved, x.shape), ladj
            return affine_coupling(x, theta[..., 0], theta[..., 1], mask=self.idx_b, law=univariate, inverse=inverse)

    return _as(Coupling, CouplingTransform)


def _fits(x: Any, context: Any) -> bool:
    """Whether the operators may run on features x with this context."""
    return takes(x, x if context is None else context) and x.dim() > 0 and (context is None or _spreads(context, x))


def _spreads(context: Tensor, x: Tensor) -> bool:
    """Whether a context's batch shape broadcasts to x's, so that the result has x's shape."""
    given, batch = context.shape[:-1], x.shape[:-1]
    return given == batch or (
        len(given) <= len(batch) and all(a in (1, b) for a, b in zip(given[::-1], batch[::-1], strict=False))
    )


def _as(made: Any, peer: Any) -> Any:
    made.__name__, made.__qualname__ = peer.__name__, peer.__qualname__
    return made


@functools.cache
def _transform_class() -> Any:
    """Made when first needed: zuko is imported by then."""
    from zuko.transforms import AutoregressiveTransform

    class Autoregressive(_Runs, AutoregressiveTransform):  # type: ignore[misc]
        """z_i = sigma(x_<i, c) x_i + t(x_<i, c), both ways by one operator."""

        def __init__(self, meta: Any, passes: int, network: MaskedNetwork, context: Tensor | None) -> None:
            super().__init__(meta, passes)
            self._network, self._context = network, context

        def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
            if not self._network.ready():
                return None
            return self._network.run(x, self._context, inverse, self._network.law)

        @property
        def inv(self) -> Transform:
            return _Inverse(self)

    return _as(Autoregressive, AutoregressiveTransform)


class _Inverse(_InverseTransform):
    """The inverse with its log-det from the same sweep, where zuko adds a density pass for it."""

    def call_and_ladj(self, y: Tensor) -> Any:
        assert self._inv is not None
        done = self._inv._run(y, True)  # type: ignore[attr-defined]
        return super().call_and_ladj(y) if done is None else done  # type: ignore[misc]


_Inverse.__name__ = _InverseTransform.__name__


def _masked(transform: Any) -> MaskedNetwork | SplineNetwork:
    import zuko

    univariate = transform.univariate
    if isinstance(univariate, functools.partial):
        univariate = univariate.func
    network = MaskedNetwork(transform)
    if network.reason and univariate is zuko.transforms.MonotonicRQSTransform:
        return SplineNetwork(transform)  # a network that no kernel has: the spline only
    return network


def adapters() -> list[Adapter]:
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.lazy import LazyComposedTransform

    def composed(lazy: Any) -> None:
        if len(lazy.transforms) < 2 or not all(isinstance(t, MaskedAutoregressiveTransform) for t in lazy.transforms):
            raise Left("not all of its parts are masked autoregressive transforms")

    return [
        Adapter(
            LazyComposedTransform,
            ("forward",),
            LazyComposed,
            composed,
            "its autoregressive transforms go in one call",
            closed=False,
        ),
        Adapter(
            MaskedAutoregressiveTransform,
            ("forward", "meta"),
            LazyMasked,
            _masked,
            "transform by maf_forward, its inverse by maf_inverse",
            variants={
                SplineNetwork: (
                    LazySpline,
                    "spline by rq_spline; its network stays with zuko, and so do the passes of the inverse",
                )
            },
        ),
        Adapter(
            GeneralCouplingTransform,
            ("forward", "meta"),
            LazyCoupling,
            SplineNetwork,
            "split, transform and merge by affine_coupling or rq_spline; its network stays with zuko",
        ),
    ]
