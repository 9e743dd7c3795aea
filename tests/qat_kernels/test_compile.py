"""Every Triton kernel compiles ahead of time for A100 (sm_80) and H100 (sm_90), which needs no GPU.

The interpreter accepts programs that the compiler rejects, and cannot show which instructions are chosen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qat_kernels import triton_dequantize, triton_fake_quant, triton_packing

grid = {"QMAX": 3, "MIN_SCALE": 1e-4, "MAX_SCALE": 1e4, "GROUP_SIZE": 96, "GROUPS": 16, "COLUMNS": 128}
long = {**grid, "GROUP_SIZE": 11008, "GROUPS": 1, "COLUMNS": 2048}
inputs = {"weight_ptr": "*fp32", "scale_ptr": "*fp32", "zero_point_ptr": "*fp32", "n_groups": "i32"}
forward = {"out_ptr": "*bf16", **inputs}
backward = {"d_weight_ptr": "*fp32", "d_scale_ptr": "*fp32", "d_zero_point_ptr": "*fp32", "grad_ptr": "*bf16", **inputs}
weights = {"out_ptr": "*bf16", "packed_ptr": "*i32", "scale_ptr": "*fp16", "zero_point_ptr": "*u8",
           "in_features": "i32", "words": "i32", "groups": "i32"}
kernels = [
    ("fake_quant", triton_fake_quant._fake_quant_kernel, forward, {**grid, "CODES": False}),
    ("quantize", triton_fake_quant._fake_quant_kernel, {**forward, "out_ptr": "*u8"}, {**grid, "CODES": True}),
    ("fake_quant_backward", triton_fake_quant._fake_quant_backward_kernel, backward, grid),
    ("fake_quant_backward, one group", triton_fake_quant._fake_quant_backward_kernel, backward, long),
]
packed = {"packed_ptr": "*i32", "codes_ptr": "*u8", "length": "i32", "words": "i32"}
unpacked = {name: packed[name] for name in ("codes_ptr", "packed_ptr", "length", "words")}
tile = {"BITS": 3, "TILE": 1024}
kernels += [
    ("pack", triton_packing._pack_kernel, packed, tile),
    ("unpack", triton_packing._unpack_kernel, unpacked, tile),
    ("dequantize", triton_dequantize._dequantize_kernel, weights, {**tile, "GROUP_SIZE": 64}),
    ("dequantize, 2 bits", triton_dequantize._dequantize_kernel, weights, {**tile, "BITS": 2, "GROUP_SIZE": 64}),
]
for capability in (80, 90):
    for name, kernel, types, constants in kernels:
        signature = {**types, **{constant: "constexpr" for constant in constants}}
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": False},
        )
        ptx = compiled.asm["ptx"]
        print(json.dumps({"kernel": name, "capability": capability, "cubin": len(compiled.asm["cubin"]),
                          "div.rn.f32": "div.rn.f32" in ptx, "fma": "fma.rn.f32" in ptx, "atom": "atom." in ptx}))
"""


@pytest.mark.slow
def test_kernels_compile_for_a100_and_h100(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * 8
    for row in rows:
        assert row["cubin"] > 0, row
        assert row["div.rn.f32"] == (row["kernel"].startswith(("fake_quant", "quantize"))), row
        assert not row["fma"], row  # contraction would flip codes at ties
        assert not row["atom"], row  # the order of atomic additions varies from run to run
