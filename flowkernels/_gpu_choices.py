"""Which GPU backend `auto` tries first: by a table of measurements, per operator and size.

``python -m benchmarks.gpu --table`` writes gpu_choices.json from what `make gpu` has measured::

    {device: {"capability": [9, 0], "choices": {line: {"source": file, "up_to": [[size, backend], [null, backend]]}}}}

`call` says at which line a call looks. An operator that runs one of several kernels has a line for each of them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("gpu_choices.json")
BACKENDS = ("cuda", "triton")
NOT_MEASURED = "not measured yet: C++ before Triton"

# Each line of the table by the operator that looks there, and what sizes count.
LINES = {
    "affine_coupling": ("elements", ["affine_coupling"]),
    "affine_coupling_backward": ("elements", ["affine_coupling_backward"]),
    "rq_spline": ("elements", ["rq_spline"]),
    "rq_spline_backward": ("elements", ["rq_spline_backward"]),
    "masked_linear": ("products", ["masked_linear"]),
    "masked_linear_backward": ("products", ["masked_linear_backward"]),
    "maf": ("samples", ["maf_forward", "maf_inverse"]),
    "maf_backward": ("samples", ["maf_forward_backward", "maf_inverse_backward"]),
    "maf_spline": ("samples", ["maf_spline_forward", "maf_spline_inverse"]),
    "maf_spline_backward": ("samples", ["maf_spline_forward_backward", "maf_spline_inverse_backward"]),
    "gumbel_softmax": ("elements", ["gumbel_softmax"]),
    "gumbel_softmax_backward": ("elements", ["gumbel_softmax_backward"]),
    "gumbel_argmax": ("elements", ["gumbel_argmax", "gumbel_argmax_several"]),
}

# Which of an operator's lines a call is, and its size; every call passes here.
_CALL: dict[str, Callable[[Sequence[Any]], tuple[int, int]]] = {
    "affine_coupling": lambda args: (0, args[0].numel()),
    "affine_coupling_backward": lambda args: (0, args[0].numel()),
    "rq_spline": lambda args: (0, args[0].numel()),
    "rq_spline_backward": lambda args: (0, args[0].numel()),
    "masked_linear": lambda args: (0, args[0].size(0) * args[1].numel()),
    "masked_linear_backward": lambda args: (0, args[0].size(0) * args[2].numel()),
    "maf": lambda args: (1 if args[4][2] else 0, args[0].size(0)),
    "maf_backward": lambda args: (1 if args[7][2] else 0, args[0].size(0)),
    "gumbel_softmax": lambda args: (0, args[0].numel()),
    "gumbel_softmax_backward": lambda args: (0, args[0].numel()),
    "gumbel_argmax": lambda args: (0 if args[3] == 1 else 1, args[0].numel()),
}
_CALL |= {"maf_spline": _CALL["maf"], "maf_spline_backward": _CALL["maf_backward"]}


def call(operator: str, args: Sequence[Any]) -> tuple[str, int] | None:
    """The line that a call of an operator looks at, and its size; None where there is nothing to choose by."""
    look = _CALL.get(operator)
    if look is None:
        return None
    which, size = look(args)
    return LINES[operator][1][which], size


@functools.cache
def table() -> dict[str, Any]:
    """The table, by device; empty before anything was measured."""
    found: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return found


def first_choices(line: str, device: str, capability: tuple[int, int]) -> tuple[list[tuple[float, str]], str]:
    """[(size up to which, backend), ...], the last one without end, and where that comes from.

    A device that was not measured goes by the nearest that was.
    """
    measured = {name: entry for name, entry in table().items() if line in entry["choices"]}
    if not measured:
        return [(float("inf"), BACKENDS[0])], NOT_MEASURED
    number = 10 * capability[0] + capability[1]

    def distance(name: str) -> tuple[bool, int, str]:
        major, minor = measured[name]["capability"]
        return name != device, abs(10 * major + minor - number), name

    nearest = min(measured, key=distance)
    chosen = measured[nearest]["choices"][line]
    source = f"measured on {nearest}{'' if nearest == device else ', not on this device'}: {chosen['source']}"
    return [(float("inf") if size is None else size, backend) for size, backend in chosen["up_to"]], source
