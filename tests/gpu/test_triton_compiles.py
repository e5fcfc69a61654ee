"""Every Triton kernel becomes machine code for sm_80 and sm_90, and nothing spills."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills(triton: object, capability: int) -> None:
    import triton_kernels

    found = triton_kernels.variants()
    assert found
    for variant in found:
        usage = triton_kernels.compile_variant(variant, capability)
        assert usage.local == 0, (variant.label, usage)
        assert usage.stack == 0, (variant.label, usage)
        assert usage.registers <= variant.registers, (variant.label, usage)
