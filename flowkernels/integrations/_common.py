"""What the integrations share: how a peer's module is replaced and restored, and how its masked network is read.

A module is replaced by changing its class to a subclass of its own class, made here, whose methods run our operators.
Its parameters, buffers, children and hooks stay where they are, so optimizers, state_dict and isinstance see no
difference; a pickle names the peer's class and holds nothing of ours; a deep copy is accelerated again.

Every call looks whether the network is still what was read (layers, masks, activations, hooks, dropout). If something
is not what the kernels do, the call goes the peer's own way, which also raises the peer's own errors for bad input.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import hashlib
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE
from flowkernels.ops.maf import Step, run_chain
from flowkernels.plan import Plan
from flowkernels.scales import ScaleLaw
from flowkernels.transforms import RQSpline, Spline

STATE = "_flowkernels"
_PLAIN = (Tensor, nn.Parameter)  # subclasses of a tensor may mean anything

_is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
_reconstructor: Any = copyreg._reconstructor  # type: ignore[attr-defined]


class Left(Exception):
    """Why a module stays with its own library."""


# ---- reading a network ---------------------------------------------------------------------------------------------

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.elu: "elu",
    F.silu: "silu",
    F.leaky_relu: "leaky_relu",
    F.gelu: "gelu",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.softplus: "softplus",
}

# Type of an activation module, its name here, and the settings that it must have.
_MODULES: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {
    nn.Identity: ("identity", {}),
    nn.ReLU: ("relu", {}),
    nn.Tanh: ("tanh", {}),
    nn.ELU: ("elu", {"alpha": 1.0}),
    nn.SiLU: ("silu", {}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
    nn.GELU: ("gelu", {"approximate": "none"}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.Softplus: ("softplus", {"beta": 1, "threshold": 20}),
}


class Reader:
    """Reads a network's parts and remembers what was read, so that a change can be noticed."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], str, Any]] = []
        self.masks: list[tuple[Tensor, int]] = []
        self.modules: list[nn.Module] = []
        self.dropouts: list[nn.Dropout] = []

    def value(self, owner: Any, name: str) -> Any:
        """A plain attribute or a child of `owner`, None if it has neither."""
        found = owner.__dict__.get(name)
        self.seen.append((owner.__dict__, name, found))
        children = owner.__dict__.get("_modules")
        if found is None and children is not None:
            found = children.get(name)
            self.seen.append((children, name, found))
        return found

    def module(self, owner: nn.Module, name: str, kind: type[nn.Module] | None = None) -> nn.Module:
        """Child `name` of `owner`, which must run `kind`'s own forward."""
        found = self.value(owner, name)
        if not isinstance(found, nn.Module):
            raise Left(f"{type(owner).__name__}.{name} is {type(found).__name__}, not a module")
        return self.check(found, f"{type(owner).__name__}.{name}", kind)

    def check(self, found: nn.Module, label: str, kind: type[nn.Module] | None = None) -> nn.Module:
        """`found` as it is, if it runs `kind`'s own forward."""
        if kind is not None:
            if not isinstance(found, kind):
                raise Left(f"{label} is a {type(found).__name__}, not a {kind.__name__}")
            if type(found).forward is not kind.forward:
                raise Left(f"{label} is a subclass of {kind.__name__} with its own forward")
        self.seen.append((found.__dict__, "forward", None))
        if "forward" in found.__dict__:
            raise Left(f"{label} has a forward of its own")
        self.modules.append(found)
        return found

    def children(self, owner: nn.Module, label: str) -> list[nn.Module]:
        """All children of a ModuleList or Sequential; one more or less is a change."""
        table: dict[str, Any] = owner.__dict__["_modules"]
        self.seen.append((owner.__dict__, "_modules", table))
        found = list(table.items())
        self.seen.extend((table, name, module) for name, module in found)
        self.seen.append((table, str(len(found)), None))
        return [module for _, module in found]

    def linear(self, found: nn.Module, label: str, kind: type[nn.Module]) -> nn.Module:
        """A masked linear layer with a weight and a bias of its own."""
        self.check(found, label, kind)
        mask = found._buffers.get("mask")
        self.seen.append((found._buffers, "mask", mask))
        if mask is None:
            raise Left(f"{label} has no mask")
        if mask.is_inference():
            raise Left(f"{label}.mask was made in inference mode: its changes cannot be seen")
        self.masks.append((mask, mask._version))
        for name in ("weight", "bias"):
            if found._parameters.get(name) is None:
                self.seen.append((found._parameters, name, None))
                raise Left(f"{label}.{name} is missing or reparametrised")
        return found

    def dropout(self, owner: nn.Module, name: str) -> None:
        self.dropouts.append(self.module(owner, name, nn.Dropout))  # type: ignore[arg-type]

    def activation(self, owner: nn.Module, name: str) -> str:
        return self.activation_name(self.value(owner, name), f"{type(owner).__name__}.{name}")

    def activation_name(self, found: Any, label: str, *, inplace: bool = False) -> str:
        """The name of a function or module in ``flowkernels.plan.ACTIVATIONS``."""
        if type(found) in _MODULES:
            known, settings = _MODULES[type(found)]
            for key, value in settings.items():
                self.seen.append((found.__dict__, key, found.__dict__[key]))
                if found.__dict__[key] != value:
                    raise Left(f"activation {found} has {key} other than {value}")
            if not inplace and getattr(found, "inplace", False):
                raise Left(f"activation {found} works in place")
            self.check(found, label)
            return known
        try:
            return _FUNCTIONS[found]
        except (KeyError, TypeError):
            name = getattr(found, "__name__", None) or type(found).__name__
            raise Left(f"no kernel for the activation {name}") from None


@dataclass(frozen=True)
class Structure:
    """A masked network as `flowkernels.plan.Plan` sees it.

    `context_layers` are the layers that get an additive context term. `columns` are the first layer's columns that
    belong to the features, where the others belong to a context that is concatenated to them.
    """

    linears: tuple[nn.Module, ...]
    activation: tuple[str, ...]
    residual: tuple[int | None, ...]
    parameters: tuple[str, ...]
    layout: str = "interleaved"
    context_layers: tuple[int, ...] = ()
    columns: tuple[int, int] | None = None


def may_run() -> bool:
    """Whether a call may go to the kernels, which know no forward-mode derivatives, no functorch and no tracing."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return forward_ad._current_level < 0 and torch._C._functorch.maybe_current_level() is None and not _is_tracing()


def takes(x: Any, *others: Any) -> bool:
    """Whether an elementwise operator may run on these tensors now: plain ones of one dtype and device."""
    if not (isinstance(x, Tensor) and may_run()) or runs_reference(x):
        return False
    for t in (x, *others):
        if not isinstance(t, Tensor) or t.dtype != x.dtype or t.device != x.device:
            return False
        if not torch.compiler.is_compiling() and type(t) not in (Tensor, nn.Parameter):
            return False
    return bool(x.is_floating_point())


class Hooks:
    """Hooks of some modules: only a call of the module runs them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self._handles, self._found = -1, False

    def any(self) -> bool:
        # Every hook that is registered anywhere counts up next_id: as long as that stands still, no hook was added.
        if RemovableHandle.next_id != self._handles or self._found:
            self._handles = RemovableHandle.next_id
            self._found = any(
                m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
                for m in self.modules
            )
        return self._found or bool(
            nn_module._global_forward_hooks
            or nn_module._global_forward_pre_hooks
            or nn_module._global_backward_hooks
            or nn_module._global_backward_pre_hooks
        )


class Network:
    """A peer's masked network, ready to be run; notices when it changes.

    Args:
        read: gives the network's structure by way of a `Reader`, or raises `Left`.
        terms: the context's additive terms, (N, plan.context_width).
    """

    def __init__(
        self,
        read: Callable[[Reader], Structure],
        terms: Callable[[Any], Tensor | None] | None = None,
    ) -> None:
        self.read, self.terms = read, terms
        self.refresh()

    def refresh(self) -> None:
        self.reader = Reader()
        self.structure: Structure | None = None
        self.reason = ""
        self._plans: dict[bool, Plan] = {}
        self._columns = _Columns()
        self._context_columns: list[_Columns] = []
        self.hooks = Hooks(self.reader.modules)
        try:
            self.structure = self.read(self.reader)
            plan = self._plan(True)
        except Left as left:
            self.structure, self.reason = None, str(left)
            return
        except ValueError as error:
            self.structure, self.reason = None, f"its masks: {error}"
            return
        self.steps = plan.steps
        self.features = plan.features
        self._tables = [linear._parameters for linear in self.structure.linears]
        self._shapes = [p.shape for table in self._tables for p in (table["weight"], table["bias"])]  # type: ignore[union-attr]
        self._has_context = self.takes_context()
        self._split = self.structure.columns if self._has_context else None
        context = self._context_mask()
        self._context_all = context is None or bool(context.all())

    def _plan(self, with_context: bool) -> Plan:
        if with_context not in self._plans:
            assert self.structure is not None
            structure = self.structure
            masks = [linear._buffers["mask"] for linear in structure.linears]
            first = masks[0]
            assert first is not None
            if structure.columns is not None:
                first = first[:, slice(*structure.columns)]
            context = structure.context_layers if structure.columns is None else (0,)
            self._plans[with_context] = _plan_of(
                [first, *masks[1:]],  # type: ignore[list-item]
                structure.activation,
                structure.residual,
                context if with_context and self.takes_context() else (),
                structure.parameters,
                structure.layout,
            )
        return self._plans[with_context]

    def takes_context(self) -> bool:
        assert self.structure is not None
        if self.structure.columns is None:
            return bool(self.structure.context_layers)
        begin, end = self.structure.columns
        return end - begin < self.structure.linears[0]._buffers["mask"].shape[1]  # type: ignore[union-attr]

    def _context_mask(self) -> Tensor | None:
        """The first layer's mask on the columns of a concatenated context."""
        assert self.structure is not None
        if self.structure.columns is None or not self.takes_context():
            return None
        mask = self.structure.linears[0]._buffers["mask"]
        assert mask is not None
        return mask[:, slice(*self._context_range())]

    def _context_range(self) -> tuple[int, int]:
        assert self.structure is not None
        assert self.structure.columns is not None
        begin, end = self.structure.columns
        width = self.structure.linears[0]._buffers["mask"].shape[1]  # type: ignore[union-attr]
        return (0, begin) if begin else (end, width)

    # -- is it still what was read? ----------------------------------------------------------------------------------

    def why_not_now(self) -> str | None:
        """Why a call would go the peer's way at this moment, or None."""
        if self._changed():
            self.refresh()
        if self.structure is None:
            return self.reason
        if self.hooks.any():
            return "hooks on inner layers have to run"
        if any(d.p and d.training for d in self.reader.dropouts):
            return "dropout in training mode"
        return None

    def _changed(self) -> bool:
        for table, name, value in self.reader.seen:
            if table.get(name) is not value:
                return True
        return any(mask._version != version for mask, version in self.reader.masks)

    def ready(self) -> bool:
        """Whether the kernels may run now: nothing has changed, and nothing but the kernels has to see this call."""
        if not may_run():
            return False
        if torch.compiler.is_compiling():
            if self.structure is None:
                return False
        elif self._stale() or self.hooks.any():
            return False
        return not any(dropout.p and dropout.training for dropout in self.reader.dropouts)

    def _stale(self) -> bool:
        if self._changed():
            self.refresh()
        return self.structure is None

    # -- running it --------------------------------------------------------------------------------------------------

    def run(
        self,
        x: Any,
        context: Any,
        inverse: bool,
        law: ScaleLaw | Spline,
        form: str = "scale_shift",
        *,
        rank: int | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """(y, logdet) for x (..., D), or None: the peer has to do this call. `ready` must have been asked before.

        `rank` is the number of dimensions that x must have, if the peer takes no other.
        """
        if not isinstance(x, Tensor):
            return None
        shape = x.shape
        dims = len(shape)
        if not dims or shape[-1] != self.features or runs_reference(x) or (rank is not None and rank != dims):
            return None
        step = self.step(x, context, inverse, law, form)
        if step is None:
            return None
        if dims == 2:
            return run_chain(x, [step])
        y, logdet = run_chain(x.reshape(-1, self.features), [step])
        return y.reshape(shape), logdet.reshape(shape[:-1])

    def step(self, x: Tensor, context: Any, inverse: bool, law: ScaleLaw | Spline, form: str) -> Step | None:
        """This network's step of a chain on rows like `x`, or None where the peer has to do it.

        What our operators would refuse, the peer's own code may know how to do, or how to refuse.
        """
        if not torch.compiler.is_compiling() and type(x) not in _PLAIN:
            return None
        try:
            parameters: list[Any] = [p for table in self._tables for p in (table["weight"], table["bias"])]
        except KeyError:  # reparametrised since
            return None
        dtype, device = x.dtype, x.device
        if dtype not in COMPUTE_DTYPE:
            return None
        for p, shape in zip(parameters, self._shapes, strict=True):
            if p is None or p.dtype != dtype or p.device != device or p.shape != shape:
                return None
        terms = None
        if context is not None:
            if not self._has_context or not isinstance(context, Tensor):
                return None
            terms = self._context_terms(parameters, context, x.shape[:-1])
            if terms is None or terms.dtype != dtype or terms.device != device:
                return None
        if self._split is not None:
            if terms is None:
                return None
            parameters[0] = self._columns(parameters[0], *self._split)
        return Step(self._plan(terms is not None), parameters, terms, law, form, inverse)

    def _context_terms(self, parameters: list[Any], context: Tensor, batch: torch.Size) -> Tensor | None:
        if self._split is not None:
            return self._concatenated(parameters[0], context, batch)
        if self.terms is None or len(batch) != 1 or context.shape[:1] != batch:
            return None
        if context.dim() != 2 or context.dtype != parameters[0].dtype:
            return None
        return self.terms(context)

    def _concatenated(self, weight: Tensor, context: Tensor, batch: torch.Size) -> Tensor | None:
        """The term of a context that the peer concatenates to x: calculated once per row of context, then spread."""
        begin, end = self._context_range()
        if context.dim() < 1 or context.shape[-1] != end - begin or context.dtype != weight.dtype:
            return None
        given = context.shape[:-1]
        if given != batch and (
            len(given) > len(batch) or any(a not in (1, b) for a, b in zip(given[::-1], batch[::-1], strict=False))
        ):
            return None
        columns = weight[:, begin:end]
        if not self._context_all:
            columns = columns * self._context_mask()  # type: ignore[operator]
        term = F.linear(context, columns)
        return term.expand(*batch, term.shape[-1]).reshape(-1, term.shape[-1])


class _Columns:
    """Some columns of a weight as a lasting view: packed weights are found again by the tensor that they came from."""

    def __init__(self) -> None:
        self.weight: Callable[[], Tensor | None] = lambda: None
        self.address = 0
        self.view = torch.empty(0)

    def __call__(self, weight: Tensor, begin: int, end: int) -> Tensor:
        if torch.compiler.is_compiling():
            return weight[:, begin:end]
        if (
            self.weight() is not weight
            or self.address != weight.data_ptr()
            or self.view.requires_grad != weight.requires_grad
        ):
            with torch.inference_mode(False), torch.enable_grad():
                self.view = weight[:, begin:end]
            self.weight, self.address = weakref.ref(weight), weight.data_ptr()
        return self.view


_plans: weakref.WeakValueDictionary[Any, Plan] = weakref.WeakValueDictionary()


def _plan_of(
    masks: Sequence[Tensor],
    activation: tuple[str, ...],
    residual: tuple[int | None, ...],
    context: tuple[int, ...],
    parameters: tuple[str, ...],
    layout: str,
) -> Plan:
    """A plan of these masks; the transforms of a flow and copies of them often share theirs, and tables are big."""
    digest = hashlib.sha1(usedforsecurity=False)
    for mask in masks:
        digest.update(bytes(str(tuple(mask.shape)), "ascii"))
        digest.update(mask.detach().to("cpu", torch.bool).contiguous().numpy().data)
    key = (digest.digest(), activation, residual, context, parameters, layout)
    known = _plans.get(key)
    if known is None:
        known = _plans[key] = Plan(
            masks, activation=activation, residual=residual, context=context, parameters=parameters, layout=layout
        )
        return known
    return copy.deepcopy(known)


@functools.lru_cache(maxsize=64)
def law_of(name: str, **parameters: float) -> ScaleLaw:
    return ScaleLaw(name, **parameters)


@functools.lru_cache(maxsize=64)
def spline_of(style: str, bins: int, **parameters: float) -> RQSpline:
    return RQSpline(style, bins, **parameters)


# ---- replacing and restoring a module ------------------------------------------------------------------------------


class Replaced:
    """Methods of every class made here. Pickles as the peer's class; deep copies are accelerated again.

    Those methods are copied into a subclass of the peer's class that has no other base: an object's class can only be
    changed to one of the same layout. So there is no super() here; the peer's methods are `self._flowkernels_class`'s.
    """

    _flowkernels_class: ClassVar[Any]
    _flowkernels: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(self, 4)
        _, _, state, *rest = reduced
        state = {**{key: value for key, value in state.items() if key != STATE}, **self._flowkernels.hidden}
        # Not copyreg.__newobj__: pickle would compare its class with ours.
        return (_reconstructor, (self._flowkernels_class, object, None), state, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        function, arguments, state, *_ = self.__reduce_ex__(4)
        new = function(*arguments)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(state, memo))
        with contextlib.suppress(Left):
            attach(new)
        return new


@dataclass(frozen=True)
class Adapter:
    """How modules of one of a peer's classes are replaced.

    Args:
        base: the peer's class. methods: those of its methods that the replacement stands for; where a subclass or an
            instance has its own, the module is left alone. mixin: the methods that replace them.
        make: gives what the mixin's methods need, or raises `Left`. what: the replacement in words.
        hides: instance attributes that would stand before the mixin's methods. closed: whether the parts inside belong
            to the replacement, so that they are not looked at on their own. variants: other mixins and words, by the
            type of what `make` gives.
    """

    base: type[nn.Module]
    methods: tuple[str, ...]
    mixin: type[Replaced]
    make: Callable[[Any], Any]
    what: str
    hides: tuple[str, ...] = ()
    closed: bool = True
    variants: Mapping[type, tuple[type[Replaced], str]] = field(default_factory=dict)

    def variant(self, data: Any) -> tuple[type[Replaced], str]:
        """The mixin and the words that fit what `make` gave."""
        return self.variants.get(type(data), (self.mixin, self.what))


class State:
    """What an accelerated module carries: `data` for its methods; instance attributes that had to step aside."""

    def __init__(self, module: nn.Module, data: Any, hidden: dict[str, Any]) -> None:
        self.owner = weakref.ref(module)
        self.data, self.hidden = data, hidden


adapters: dict[str, list[Adapter]] = {}  # by the peer's name, filled when that peer is first met


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter for a module of a peer's class or of a subclass of it."""
    for known in adapters.values():
        for adapter in known:
            if isinstance(module, adapter.base):
                return adapter
    return None


def is_replaced(module: nn.Module) -> bool:
    return STATE in module.__dict__ and hasattr(type(module), "_flowkernels_class")


def prepare(module: nn.Module) -> tuple[Adapter, Any]:
    """The adapter and what it needs; raises `Left` where the module has to stay with its library."""
    adapter = adapter_of(module)
    if adapter is None:
        raise Left("no kernel for this class")
    for name in adapter.methods:
        if getattr(type(module), name) is not getattr(adapter.base, name):
            raise Left(f"{type(module).__name__} has its own {name}")
        if name in module.__dict__ and name not in adapter.hides:
            raise Left(f"this {type(module).__name__} has its own {name}")
    if hasattr(type(module), "__deepcopy__") or type(module).__reduce__ is not object.__reduce__:
        raise Left(f"{type(module).__name__} is copied or pickled in its own way")
    return adapter, adapter.make(module)


def attach(module: nn.Module, prepared: tuple[Adapter, Any] | None = None) -> None:
    """Replaces `module`; raises `Left` where it has to stay with its library. `prepared` is what `prepare` gives."""
    adapter, data = prepare(module) if prepared is None else prepared
    reason = getattr(data, "reason", "")
    if reason:
        raise Left(reason)
    hidden = {name: module.__dict__.pop(name) for name in adapter.hides if name in module.__dict__}
    module.__dict__[STATE] = State(module, data, hidden)
    module.__class__ = _subclass(type(module), adapter.variant(data)[0])


def detach(module: nn.Module) -> None:
    """Makes an accelerated module what it was."""
    state: State = module.__dict__.pop(STATE)
    module.__class__ = module._flowkernels_class  # type: ignore[assignment]
    module.__dict__.update(state.hidden)


def _subclass(original: Any, mixin: Any) -> Any:
    """The subclass of `original` with the methods of `mixin`; made once, and named as the peer names its own."""
    key = (original, mixin)
    if key not in _subclasses:
        methods = {
            name: _named_as(value, getattr(original, name, value))
            for kind in (Replaced, mixin)
            for name, value in vars(kind).items()
            if isinstance(value, types.FunctionType)
        }
        names = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_flowkernels_class": original,
        }
        _subclasses[key] = type(original)(original.__name__, (original,), {**methods, **names})
    return _subclasses[key]


def _named_as(function: types.FunctionType, other: Any) -> types.FunctionType:
    """A copy of `function` under the name that `other` has in error messages and help()."""
    named = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    named.__kwdefaults__ = function.__kwdefaults__
    named.__qualname__ = getattr(other, "__qualname__", function.__qualname__)
    named.__doc__ = getattr(other, "__doc__", None)
    return named


_subclasses: dict[tuple[Any, Any], Any] = {}
