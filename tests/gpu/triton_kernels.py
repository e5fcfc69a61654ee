"""Every Triton kernel with the argument types it is compiled with: the proof that it compiles and does not spill."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variant:
    label: str
    kernel: Any
    signature: dict[str, str]  # pointers and scalars; what is missing is a constant
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=lambda: {"num_warps": 4})
    registers: int = 128


_FLOAT = {"fp64": "fp64", "fp32": "fp32", "bf16": "fp32", "fp16": "fp32"}


def _arguments(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """64-bit strides and sizes are the worst case for registers."""
    names = kernel.arg_names
    return {n: pointers.get(n, "constexpr" if n in constants else "i64") for n in names}


def affine_variants() -> Iterator[Variant]:
    import triton.language as tl

    from flowkernels.ops.affine_coupling import triton as module
    from flowkernels.scales import NAMES, ScaleLaw

    for dtype, compute in _FLOAT.items():
        element = tl.float64 if compute == "fp64" else tl.float32
        for law in NAMES if dtype == "fp32" else ("softplus",):
            numbers = dict(zip("ABC", ScaleLaw(law).numbers, strict=True))
            for inverse in (False, True):
                common = {
                    "LAW": NAMES.index(law), **numbers, "FORM": 2 if law == "sigmoid" else 0, "INVERSE": inverse,
                    "MASKED": law == "tanh",
                    "COMPUTE": element, "ROWS": 1, "BLOCK": 1024,
                }  # fmt: skip
                for kernel, more in ((module.forward_kernel, {"RUNNING": True}), (module.backward_kernel, {})):
                    sums = "fp64" if compute == "fp64" else "fp32"
                    pointers = {
                        n: "*i64" if "positions" in n else f"*{sums if 'logdet' in n else dtype}"
                        for n in kernel.arg_names
                        if n.endswith("_ptr")
                    }
                    constants = {**common, **more}
                    yield Variant(
                        f"affine {kernel.__name__} {law} {dtype} inverse={inverse}", kernel,
                        _arguments(kernel, pointers, constants), constants, registers=255 if dtype == "fp64" else 128,
                    )  # fmt: skip


def variants() -> list[Variant]:
    found = list(affine_variants())
    for name in ("masked_linear", "maf", "rq_spline", "gumbel_softmax", "gumbel_argmax"):
        try:
            module = __import__(f"flowkernels.ops.{name}.triton", fromlist=["variants"])
        except ImportError:
            continue
        for label, kernel, pointers, constants, options in module.variants():
            found.append(Variant(label, kernel, _arguments(kernel, pointers, constants), constants, options, 255))
    return found


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    local: int


def compile_variant(variant: Variant, capability: int) -> Usage:
    """To machine code by Triton's own ptxas; what cuobjdump says of the result. Needs no GPU and no driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=variant.kernel, signature=variant.signature, constexprs=variant.constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return Usage(int(numbers["REG"]), int(numbers["STACK"]), int(numbers["LOCAL"]))
