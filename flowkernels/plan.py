"""Plans: from the masks of an autoregressive network to the order in which its units become final.

A unit is final at time m when it depends on features of the first m steps only (m = 0: on none). Every layer's units
are sorted by that time, which makes the weights block lower triangular: a density pass skips the empty half, and a
sampling sweep uses every weight exactly once. Times come from the masks themselves by reachability, never from a
convention about degrees, so any order, any degrees, residual connections and graphs that allow several features per
step are covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "tanh", "elu", "silu", "leaky_relu", "gelu", "sigmoid", "softplus")

# Rows of the widest layer in one block of a sweep. Inside a block features go one by one; what earlier blocks
# contribute is one matrix product. Measured on D=784 H=1024 and D=63 H=512, see benchmarks/results.
BLOCK_ROWS = 48
MAX_LAYERS = 64  # csrc/common/net.h: kMaxLayers
PANEL_ROWS = 16  # csrc/cpu/panels.h


class Plan:
    """How to run one masked autoregressive network. Built once per network, shared by all calls.

    The network is a chain of masked linear layers, ``v_0 = x (W_0 M_0)^T + b_0``, ``a_l = activation_l(v_l)``,
    ``v_l = a_{l-1} (W_l M_l)^T + b_l [+ context_l] [+ v_{residual_l}]``; the last layer gives the parameters of each
    feature's transform and has no activation.

    Args:
        masks: one (out, in) tensor per linear layer, nonzero where a weight exists.
        activation: a name of `ACTIVATIONS`, for all hidden layers or one each.
        residual: per hidden layer the index of the earlier hidden layer whose pre-activation is added, or None.
        context: indices of the layers that get an additive context term.
        parameters: names of the parameters of one feature in the order of the last layer's rows.
        layout: ``"interleaved"`` (row i P + p belongs to parameter p of feature i) or ``"blocked"`` (row p D + i).

    Attributes:
        features: D. steps: number of sequential steps that sampling needs. step: (D,) the step of each feature.

    Raises:
        ValueError: shapes that do not fit together, or a network that is not autoregressive: the message names a pair
            (output, input) that breaks it.
    """

    def __init__(
        self,
        masks: Sequence[Tensor],
        *,
        activation: str | Sequence[str] = "relu",
        residual: Sequence[int | None] | None = None,
        context: Sequence[int] = (),
        parameters: Sequence[str] = ("shift", "scale"),
        layout: str = "interleaved",
    ) -> None:
        if len(masks) == 0:
            raise ValueError("masks must hold at least the output layer's mask, got none")
        if len(masks) > MAX_LAYERS:
            raise ValueError(f"masks must hold at most {MAX_LAYERS} layers, got {len(masks)}")
        for i, mask in enumerate(masks):
            if not isinstance(mask, Tensor):
                raise TypeError(f"masks[{i}] must be a torch.Tensor, got {type(mask).__name__}")
        # Copied: a mask that is changed later must not change what the kernels read.
        self.masks = tuple(m.detach().to("cpu", torch.bool, copy=True).contiguous() for m in masks)
        hidden = len(self.masks) - 1
        self.activation = (activation,) * hidden if isinstance(activation, str) else tuple(activation)
        self.residual = (None,) * hidden if residual is None else tuple(residual)
        self.context = tuple(sorted(context))
        self.parameters = tuple(parameters)
        self.layout = layout
        self._check()
        self.features = self.masks[0].shape[1]
        self.order: Tensor | None = None
        with torch.device("cpu"):  # whatever the default device: tables are read here
            self._find_times()
            self._build_tables()
        self.packs: dict[Any, Any] = {}  # of flowkernels/ops/maf/pack.py
        self._on_device: dict[torch.device, tuple[tuple[Tensor, Tensor], list[Tensor]]] = {}

    def _check(self) -> None:
        hidden = len(self.masks) - 1
        for i, mask in enumerate(self.masks):
            if mask.dim() != 2:
                raise ValueError(f"masks[{i}] must have 2 dimensions (out, in), got {mask.dim()}")
            if i and mask.shape[1] != self.masks[i - 1].shape[0]:
                raise ValueError(
                    f"masks[{i}] must have {self.masks[i - 1].shape[0]} columns, the rows of masks[{i - 1}], "
                    f"got {mask.shape[1]}"
                )
        features, per = self.masks[0].shape[1], len(self.parameters)
        if features < 1:
            raise ValueError("masks[0] must have at least one column, the features, got 0")
        if self.masks[-1].shape[0] != features * per:
            raise ValueError(
                f"masks[{hidden}] must have {features * per} rows ({per} parameters of {features} features), "
                f"got {self.masks[-1].shape[0]}"
            )
        if self.layout not in ("interleaved", "blocked"):
            raise ValueError(f"layout must be interleaved or blocked, got {self.layout!r}")
        if len(self.activation) != hidden:
            raise ValueError(
                f"activation must name {hidden} activations, one per hidden layer, got {len(self.activation)}"
            )
        for name in self.activation:
            if name not in ACTIVATIONS:
                raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
        if len(self.residual) != hidden:
            raise ValueError(f"residual must have {hidden} entries, one per hidden layer, got {len(self.residual)}")
        for i, source in enumerate(self.residual):
            if source is not None and not 0 <= source < i:
                raise ValueError(f"residual[{i}] must name an earlier hidden layer, got {source}")
            if source is not None and self.masks[source].shape[0] != self.masks[i].shape[0]:
                raise ValueError(
                    f"residual[{i}] adds layer {source} of width {self.masks[source].shape[0]} "
                    f"to one of width {self.masks[i].shape[0]}"
                )
            if source is not None and source in self.residual[:i]:
                raise ValueError(f"residual[{i}]: layer {source} is already added to another layer")
        for i in self.context:
            if not 0 <= i <= hidden:
                raise ValueError(f"context must name layers 0 to {hidden}, got {i}")
            if self.context.count(i) > 1:
                raise ValueError(f"context names layer {i} twice")

    def _find_times(self) -> None:
        """Steps of the features and times of the units, from what reaches what."""
        reach = [torch.eye(self.features, dtype=torch.bool)]
        for i, mask in enumerate(self.masks):
            now = (mask.float() @ reach[-1].float()) > 0
            if i < len(self.residual) and self.residual[i] is not None:
                now |= reach[self.residual[i] + 1]  # type: ignore[operator]
            reach.append(now)
        rows = torch.arange(self.masks[-1].shape[0])
        per = len(self.parameters)
        feature_of_row = rows // per if self.layout == "interleaved" else rows % self.features
        needs = torch.zeros(self.features, self.features, dtype=torch.int32)
        needs.index_add_(0, feature_of_row, reach[-1].int())
        needs = needs > 0

        step = torch.full((self.features,), -1)
        missing = needs.sum(1)
        steps, ready = 0, torch.nonzero(missing == 0).flatten()
        while len(ready):
            step[ready] = steps
            missing = missing - needs[:, ready].sum(1)
            ready = torch.nonzero((missing == 0) & (step < 0)).flatten()
            steps += 1
        if (step < 0).any():
            output, inp = _broken_pair(needs, step < 0)
            raise ValueError(
                f"the masks are not autoregressive: output {output} depends on input {inp}"
                + ("" if output == inp else f", and output {inp} on input {output} through others")
            )
        self.step = step
        self.steps = steps
        self.times = [_latest(r, step + 1) for r in reach[1:-1]]
        self._feature_of_row = feature_of_row

    def _build_tables(self) -> None:
        features, per = self.features, len(self.parameters)
        order = torch.argsort(self.step, stable=True)
        # Kernels read the parameters of a feature in the order of their names in CANONICAL.
        roles = torch.tensor(sorted(range(per), key=lambda p: _canonical_rank(self.parameters[p])))
        row_of = torch.empty(features, per, dtype=torch.long)
        rows = torch.arange(features * per)
        row_of[self._feature_of_row, rows % per if self.layout == "interleaved" else rows // features] = rows
        out_rows = row_of[order][:, roles].flatten()
        out_steps = self.step[order].repeat_interleave(per)

        # Units that wait for the last step reach no output: they are left out, and their gradient is zero.
        hidden = []
        for time in self.times:
            perm = torch.argsort(time, stable=True)
            hidden.append(perm[time[perm] < self.steps])

        layers = []
        for i, perm in enumerate(hidden):
            layers.append(
                _Layer(i, False, perm, self.times[i][perm], ACTIVATIONS.index(self.activation[i]), self.residual[i])
            )
        layers.append(_Layer(len(hidden), False, out_rows, out_steps + 1, 0, None))
        self.forward_table = self._table(layers, order, self.step[order] + 1)

        # Backwards the same network runs transposed, with time reversed: what was final last goes first.
        back = []
        for i in reversed(range(len(hidden))):
            perm = hidden[i].flip(0)
            to = next((j for j, source in enumerate(self.residual) if source == i), None)
            target = None if to is None else len(hidden) - 1 - to
            activation = ACTIVATIONS.index(self.activation[i])
            back.append(_Layer(i + 1, True, perm, self.steps - self.times[i][perm], activation, target))
        back.append(_Layer(0, True, order.flip(0), self.steps - self.step[order.flip(0)], 0, None))
        self.backward_table = self._table(back, out_rows.flip(0), self.steps - out_steps.flip(0))
        self.packed_sizes = (int(self.forward_table[4]), int(self.backward_table[4]))
        # Inputs, every layer's outputs, and the pre-activations that slopes need, each in whole chunks of rows:
        # `kept_of` in csrc/cpu/maf.h.
        saved = _round_up(features, PANEL_ROWS) + sum(
            _round_up(len(layer.perm), PANEL_ROWS) * (2 if ACTIVATIONS[layer.activation] in ("silu", "gelu") else 1)
            for layer in layers
        )
        # Indexed by direction: the sampling direction also keeps z.
        self.saved_rows = (saved, saved + _round_up(features, PANEL_ROWS))

    def _table(self, layers: list[_Layer], input_perm: Tensor, input_time: Tensor) -> Tensor:
        """The plan as one int64 tensor, as csrc/common/net.h reads it."""
        steps = self.steps
        blocks = _blocks([layer.time for layer in layers], steps)
        body: list[Tensor] = []
        size = 0

        def put(values: Any) -> int:
            nonlocal size
            tensor = torch.as_tensor(values, dtype=torch.long).flatten()
            body.append(tensor)
            size += len(tensor)
            return size - len(tensor)

        header_size = 16 + 16 * len(layers)
        packed = 0
        records = []
        columns = input_perm
        positions = {}
        for index, layer in enumerate(layers):
            mask = self.masks[layer.weight]
            mask = (mask.T if layer.transposed else mask)[layer.perm][:, columns]
            positions[index] = layer.perm
            panels, groups = [], [0]
            edges = _up_to(layer.time, steps)[torch.tensor(blocks)].tolist()
            for begin, end in zip([0, *edges[:-1]], edges, strict=True):
                for row in range(begin, end, PANEL_ROWS):
                    count = min(PANEL_ROWS, end - row)
                    height = -(-count // 4) * 4
                    used = torch.nonzero(mask[row : row + count].any(0)).flatten()
                    depth = int(used[-1]) + 1 if len(used) else 0
                    panels.append((row, count, height, depth, packed))
                    packed += height * depth
                groups.append(len(panels))
            residual_rows = -1
            if layer.residual is not None:
                source = positions[layer.residual]
                where = torch.full((max(mask.shape[0] for mask in self.masks),), -1)
                where[source] = torch.arange(len(source))
                residual_rows = put(where[layer.perm])
            bias = -1
            if not layer.transposed:
                bias, packed = packed, packed + _round_up(len(layer.perm), PANEL_ROWS)
            records.append(
                [
                    len(layer.perm),
                    len(columns),
                    layer.weight,
                    int(layer.transposed),
                    layer.activation,
                    -1 if layer.residual is None else layer.residual,
                    residual_rows,
                    put(layer.perm),
                    put(_up_to(layer.time, steps)),
                    put(groups),
                    put(panels) if panels else put([0]),
                    len(panels),
                    bias,
                    self._context_column(layer) if not layer.transposed else -1,
                    self.masks[layer.weight].shape[1],
                    0,
                ]
            )
            columns = layer.perm
        header = [
            steps,
            len(layers),
            len(blocks) - 1,
            len(input_perm),
            packed,
            put(input_perm),
            put(_up_to(input_time, steps)),
            put(blocks),
            self.features,
            len(self.parameters),
            self.context_width,
            max(len(layer.perm) for layer in layers),
        ]
        header.append(header[5])
        header += [0] * (16 - len(header))
        head = torch.tensor([*header, *(value for record in records for value in record)], dtype=torch.long)
        table = torch.cat([head, *body])
        # Offsets were counted from the body's start.
        for at in (5, 6, 7, 12):
            table[at] += header_size
        for index in range(len(layers)):
            start = 16 + 16 * index
            for at in (6, 7, 8, 9, 10):
                if table[start + at] >= 0:
                    table[start + at] += header_size
        return table

    def _context_column(self, layer: _Layer) -> int:
        """Where the layer's context term begins among the columns of all context terms, or -1."""
        if layer.weight not in self.context:
            return -1
        return sum(self.masks[i].shape[0] for i in self.context if i < layer.weight)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The forward and the backward table on `device`."""
        return self._at(device)[0]

    def masks_on(self, device: torch.device) -> list[Tensor]:
        return self._at(device)[1]

    def _at(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        if device.type == "cpu":
            return (self.forward_table, self.backward_table), list(self.masks)
        if device not in self._on_device:
            tables = (self.forward_table.to(device), self.backward_table.to(device))
            self._on_device[device] = (tables, [m.to(device) for m in self.masks])
        return self._on_device[device]

    def on(self, order: Tensor) -> Plan:
        """This network between permutations: its feature i is column ``order[i]`` of what goes in and comes out.

        Shares all else, packed weights too.
        """
        placed = object.__new__(Plan)
        placed.__dict__ = {**self.__dict__, "order": order, "_on_device": {}}
        # Only what the data is read and written by: the weights keep their columns.
        columns = order[torch.argsort(self.step, stable=True)]
        placed.forward_table = torch.cat([self.forward_table, columns])
        placed.forward_table[12] = len(self.forward_table)
        return placed

    @property
    def context_width(self) -> int:
        """Columns of all context terms together."""
        return sum(self.masks[i].shape[0] for i in self.context)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            self.masks,
            {
                "activation": self.activation,
                "residual": self.residual,
                "context": self.context,
                "parameters": self.parameters,
                "layout": self.layout,
            },
            self.order,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        copy = object.__new__(Plan)
        copy.__dict__ = {**self.__dict__, "packs": {}}  # A plan never changes, but each owner packs its own weights.
        return copy

    def __repr__(self) -> str:
        widths = ", ".join(str(m.shape[0]) for m in self.masks[:-1])
        return f"Plan(features={self.features}, hidden=({widths}), steps={self.steps})"


class _Layer:
    """One layer of a table: which weight it multiplies by, the units in their order, and when each is final."""

    def __init__(
        self, weight: int, transposed: bool, perm: Tensor, time: Tensor, activation: int, residual: int | None
    ) -> None:
        self.weight, self.transposed = weight, transposed
        self.perm, self.time = perm, time
        self.activation, self.residual = activation, residual


CANONICAL = ("shift", "scale")


def _canonical_rank(name: str) -> int:
    return CANONICAL.index(name) if name in CANONICAL else len(CANONICAL)


def _rebuild(masks: Sequence[Tensor], options: dict[str, Any], order: Tensor | None = None) -> Plan:
    plan = Plan(masks, **options)
    return plan if order is None else plan.on(order)


def _up_to(time: Tensor, steps: int) -> Tensor:
    """(steps + 1,) how many of the sorted units are final at time 0, 1, ..., steps."""
    return torch.bincount(time, minlength=steps + 1)[: steps + 1].cumsum(0)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _latest(reach: Tensor, time: Tensor) -> Tensor:
    """(units,) the latest `time` among the features that reach each unit, 0 where none does."""
    if reach.shape[0] == 0:
        return torch.zeros(0, dtype=torch.long)
    return (reach.long() * time).amax(1)


def _blocks(times: list[Tensor], steps: int) -> list[int]:
    """Boundaries 0 = t_0 < ... < t_n = steps: no layer has more than BLOCK_ROWS rows in a block, if that can be."""
    counts = torch.stack([torch.bincount(t, minlength=steps + 1)[: steps + 1] for t in times]).tolist()
    edges, rows = [0], [0] * len(times)
    for t in range(1, steps + 1):
        grown = [r + c[t] for r, c in zip(rows, counts, strict=True)]
        if max(grown) > BLOCK_ROWS and t - 1 > edges[-1]:
            edges.append(t - 1)
            grown = [c[t] for c in counts]
        rows = grown
    edges.append(steps)
    return edges


def _broken_pair(needs: Tensor, stuck: Tensor) -> tuple[int, int]:
    """A pair (output, input) on a cycle of the dependency graph."""
    diagonal = torch.nonzero(needs.diagonal()).flatten()
    if len(diagonal):
        return int(diagonal[0]), int(diagonal[0])
    # Every stuck output needs another stuck one: walking along must come back to where it has been.
    here = int(torch.nonzero(stuck).flatten()[0])
    seen: list[int] = []
    while here not in seen:
        seen.append(here)
        here = int(torch.nonzero(needs[here] & stuck).flatten()[0])
    return seen[-1], here
