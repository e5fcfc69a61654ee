"""Transforms that follow one another, in one call of the `maf` operator: small flows spend their time on calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels._backend import runs_reference
from flowkernels.integrations._common import STATE, Hooks, Left, Replaced, is_replaced
from flowkernels.integrations._made import MadeNetwork
from flowkernels.ops.maf import Step, run_chain
from flowkernels.plan import Plan


def run_together(
    x: Any, networks: Sequence[Any], contexts: Sequence[Any], inverse: bool, *, places: Sequence[Places] | None = None
) -> tuple[Tensor, Tensor] | None:
    """(y, logdet) of x (..., D) through networks with a context each, or None: the peer has to do this call.

    The networks come in the order of the density direction; `inverse` goes through them from the last to the first.
    """
    if not isinstance(x, Tensor) or runs_reference(x) or not x.dim() or x.dtype not in (torch.float32, torch.float64):
        return None
    features = x.shape[-1]
    steps: list[Step] = []
    for i, (network, context) in enumerate(zip(networks, contexts, strict=True)):
        if not network.ready() or network.features != features:
            return None
        step = network.step(x, context, inverse, network.law, "scale_shift")
        if step is None:
            return None
        steps.append(step if places is None else step._replace(plan=places[i](step.plan)))
    if inverse:
        steps.reverse()
    if x.dim() == 2:
        return run_chain(x, steps)
    y, logdet = run_chain(x.reshape(-1, features), steps)
    return y.reshape(x.shape), logdet.reshape(x.shape[:-1])


class Places:
    """The plans of one network at its place behind permutations: its feature i is column order[i]."""

    def __init__(self, order: Tensor | None) -> None:
        self.order = order
        self._placed: tuple[Plan, Plan] | None = None  # a plan, and the same plan here

    def __call__(self, plan: Plan) -> Plan:
        if self.order is None:
            return plan
        if self._placed is None or self._placed[0] is not plan:
            self._placed = plan, plan.on(self.order)
        return self._placed[1]


class Run:
    """Children of a composite that one call can stand for: autoregressive transforms, and permutations between them.

    What goes through keeps its columns where they are; each network finds its features by its place, and one
    permutation at the end (in the sampling direction at the beginning) does for all.
    """

    def __init__(self, children: Sequence[nn.Module], permutations: Permutations) -> None:
        self.children = children
        self.networks: list[MadeNetwork] = []
        self.places: list[Places] = []
        order: Tensor | None = None
        found = [permutations.of(child) for child in children]
        self.lengths = {len(permutation) for permutation in found if permutation is not None}
        for child, permutation in zip(children, found, strict=True):
            if permutation is None:
                self.networks.append(child.__dict__[STATE].data)
                self.places.append(Places(order))
            elif len(self.lengths) == 1:  # others fit no input, and the peer says so
                order = permutation.clone() if order is None else order[permutation]
        if order is not None and torch.equal(order, torch.arange(len(order))):
            order = None
        self.order, self.back = order, None if order is None else order.argsort()

    def __call__(self, x: Any, context: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
        if not isinstance(x, Tensor) or x.dim() != 2 or any(n != x.shape[1] for n in self.lengths):
            return None
        if not (x.is_cpu or x.is_cuda):
            return None
        if self.order is not None and self.order.device != x.device:
            self.order, self.back = self.order.to(x.device), self.order.argsort().to(x.device)
        if inverse and self.back is not None:
            x = x.index_select(1, self.back)
        done = run_together(x, self.networks, [context] * len(self.networks), inverse, places=self.places)
        if done is None or inverse or self.order is None:
            return done
        return done[0].index_select(1, self.order), done[1]


@dataclass(frozen=True)
class Permutations:
    """A library's modules that only permute features: its classes, their buffer, and whether one is of that kind."""

    kinds: frozenset[type[nn.Module]]
    buffer: str
    fits: Callable[[Any], bool]

    def of(self, child: nn.Module) -> Tensor | None:
        """The column that each feature is taken from; None for other modules."""
        if type(child) not in self.kinds or "forward" in child.__dict__ or "inverse" in child.__dict__:
            return None
        found = child._buffers.get(self.buffer)
        if found is None or found.is_inference() or not (found.is_cpu or found.is_cuda) or found.dtype != torch.long:
            return None
        found = found.cpu()
        known = found.dim() == 1 and torch.equal(found.sort().values, torch.arange(len(found)))
        return found if known and self.fits(child) else None

    def version(self, child: nn.Module) -> tuple[int, int] | None:
        """Changes when the permutation does."""
        if type(child) not in self.kinds:
            return None
        found = child._buffers.get(self.buffer)
        return None if found is None or found.is_inference() else (id(found), found._version)


class Cascade:
    """The runs among the children in `owner`'s list of modules `name`, found anew when the children change.

    Raises:
        Left: `made` children, the autoregressive transforms, and permutations never follow one another.
    """

    def __init__(
        self, owner: nn.Module, name: str, made: tuple[type[nn.Module], ...], permutations: Permutations
    ) -> None:
        self.owner, self.name = owner, name
        is_made = [isinstance(child, made) for child in self.children]
        fits = [m or permutations.of(child) is not None for m, child in zip(is_made, self.children, strict=True)]
        if not any(all(fits[i : i + 2]) and any(is_made[i : i + 2]) for i in range(len(fits) - 1)):
            raise Left("no autoregressive transform or permutation follows another in it")
        self.permutations = permutations
        self.seen: list[Any] = []
        self.parts: list[nn.Module | Run] = []
        self.hooks = Hooks([])

    @property
    def children(self) -> list[Any]:
        """Those of now: a list of modules makes itself new tables when it loses one."""
        return list(self.owner._modules[self.name]._modules.values())  # type: ignore[union-attr]

    def refresh(self) -> None:
        """Looks whether the children are what they were, and accelerated or not as they were."""
        children = self.children
        now = [(child, type(child), child.__dict__.get(STATE), self.permutations.version(child)) for child in children]
        if now != self.seen:
            self.parts, self.hooks = self._find(children), Hooks(children)
            self.seen = now

    def _find(self, children: list[Any]) -> list[nn.Module | Run]:
        parts: list[nn.Module | Run] = []
        run: list[nn.Module] = []
        for child in (*children, None):
            if child is not None and (_made(child) or self.permutations.of(child) is not None):
                run.append(child)
                continue
            parts += [Run(run, self.permutations)] if len(run) > 1 and any(map(_made, run)) else run
            run = []
            if child is not None:
                parts.append(child)
        return parts

    def __call__(self, x: Any, inverse: bool, *context: Any) -> tuple[Tensor, Tensor] | None:
        """(y, summed log-dets) of what the children do one after the other, or None: nothing was done."""
        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.dim() < 1:
            return None
        self.refresh()
        if not any(isinstance(part, Run) for part in self.parts) or self.hooks.any():
            return None
        total: Tensor | None = None
        for part in reversed(self.parts) if inverse else self.parts:
            done = part(x, context[0] if context else None, inverse) if isinstance(part, Run) else None
            if done is not None:
                x, logdet = done
                total = logdet if total is None else total + logdet
                continue
            alone: Sequence[Any] = part.children if isinstance(part, Run) else (part,)
            for child in reversed(alone) if inverse else alone:
                x, logdet = child.inverse(x, *context) if inverse else child(x, *context)
                total = logdet if total is None else total + logdet
        assert total is not None
        return x, total


def _made(child: nn.Module) -> bool:
    """Whether a child is an accelerated autoregressive transform whose network a kernel has."""
    if not is_replaced(child):
        return False
    data = child.__dict__[STATE].data
    return isinstance(data, MadeNetwork) and data.transform is child


class Composite(Replaced):
    """nflows' `CompositeTransform`."""

    def forward(self, inputs: Any, context: Any = None) -> Any:
        done = self._flowkernels.data(inputs, False, context)
        return self._flowkernels_class.forward(self, inputs, context) if done is None else done

    def inverse(self, inputs: Any, context: Any = None) -> Any:
        done = self._flowkernels.data(inputs, True, context)
        return self._flowkernels_class.inverse(self, inputs, context) if done is None else done


class NormalizingFlow(Replaced):
    """normflows' `NormalizingFlow`: its methods that pass one batch through all flows.

    As there, log-dets come back in the default dtype, but for `log_prob`.
    """

    def forward(self, z: Any) -> Any:
        done = self._flowkernels.data(z, False)
        return self._flowkernels_class.forward(self, z) if done is None else done[0]

    def inverse(self, x: Any) -> Any:
        done = self._flowkernels.data(x, True)
        return self._flowkernels_class.inverse(self, x) if done is None else done[0]

    def forward_and_log_det(self, z: Any) -> Any:
        done = self._flowkernels.data(z, False)
        if done is None:
            return self._flowkernels_class.forward_and_log_det(self, z)
        return done[0], done[1].to(torch.get_default_dtype())

    def inverse_and_log_det(self, x: Any) -> Any:
        done = self._flowkernels.data(x, True)
        if done is None:
            return self._flowkernels_class.inverse_and_log_det(self, x)
        return done[0], done[1].to(torch.get_default_dtype())

    def log_prob(self, x: Any) -> Any:
        done = self._flowkernels.data(x, True)
        if done is None:
            return self._flowkernels_class.log_prob(self, x)
        return (done[1] + self.q0.log_prob(done[0])).to(x.dtype)  # type: ignore[attr-defined]

    def forward_kld(self, x: Any) -> Any:
        done = self._flowkernels.data(x, True)
        if done is None:
            return self._flowkernels_class.forward_kld(self, x)
        log_q = done[1] + self.q0.log_prob(done[0])  # type: ignore[attr-defined]
        return -torch.mean(log_q.to(torch.get_default_dtype()))
