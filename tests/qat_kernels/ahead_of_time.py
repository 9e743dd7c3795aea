"""Compiles every Triton kernel in every shipped configuration without a GPU: `python ahead_of_time.py CAPABILITY`.

A program of its own, because Triton decides when it is imported whether kernels are interpreted. Prints one JSON object
per kernel: registers, stack and shared memory as `cuobjdump -res-usage` reads them from the binary, and what the
instructions tell.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qat_kernels import (
    tiles,
    triton_dequantize,
    triton_fake_quant,
    triton_gemv,
    triton_matmul,
    triton_packing,
    triton_parts,
    triton_scale_grad,
    tuning,
)

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]  # name, kernel, types, constants, options

BITS = (2, 3, 4, 8)
EXACT, FUSED = {"enable_fp_fusion": False}, {"enable_fp_fusion": True}
WEIGHT = {"scale_ptr": "*fp16", "zero_point_ptr": "*u8"}
UNALIGNED = ("count", "blocks", "groups", "n_groups", "length")  # sizes that are no multiple of 16 in some model
SIZES = {"count": "i32", "out_features": "i32", "in_features": "i32", "words": "i32", "groups": "i32"}


def main(capability: int) -> None:
    """Compile all and print what came out."""
    for name, kernel, types, constants, options in cases():
        signature = {**types, **dict.fromkeys(constants, "constexpr")}
        aligned = [place for place, argument in enumerate(types) if argument not in UNALIGNED]
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, {(place,): [["tt.divisibility", 16]] for place in aligned}),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        ptx = compiled.asm["ptx"]
        row = {"kernel": name, **resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared}
        row |= {
            "division": "div.rn.f32" in ptx,
            "fma": "fma.rn" in ptx,
            "atomic": bool(re.search(r"\b(atom|red)\.", ptx)),
        }
        row |= {"flush": ".ftz" in ptx, "matrix": bool(re.search(r"\b(wgmma|mma)\.", ptx))}
        print(json.dumps(row), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack (spills, above all) per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {"registers": int(found[1]), "stack": int(found[2])}


def cases() -> Iterator[Case]:
    """Every kernel as its wrapper launches it, once: the number of splits is no part of it."""
    made: set[str] = set()
    for table in map(tuning.load, sorted(tuning.CONFIGS.glob("*.json"))):
        for kernel, rules in table.settings.items():
            for rule in rules:
                launch = {name: value for name, value in rule["use"].items() if name != "splits"}
                for bits in rule.get("bits", BITS) if "fake_quant" not in kernel else (2,):
                    for name, *rest in configured(kernel, bits, launch):
                        name = f"{name}, {bits} bits, {launch}"
                        if name not in made:
                            made.add(name)
                            yield name, *rest
    codes = {"packed_ptr": "*i32", "codes_ptr": "*u8", "length": "i32", "words": "i32"}
    weight = {"out_ptr": "*bf16", "packed_ptr": "*i32", **WEIGHT, "in_features": "i32", "words": "i32", "groups": "i32"}
    for bits in (2, 3):
        tile = {"BITS": bits, "TILE": tiles.ROW_TILE}
        turned = {name: codes[name] for name in ("codes_ptr", "packed_ptr", "length", "words")}
        yield f"pack, {bits} bits", triton_packing._pack_kernel, codes, tile, EXACT
        yield f"unpack, {bits} bits", triton_packing._unpack_kernel, turned, tile, EXACT
        yield (
            f"dequantize, {bits} bits",
            triton_dequantize._dequantize_kernel,
            weight,
            {**tile, "GROUP_SIZE": 64},
            EXACT,
        )
    parts = {"out_ptr": "*bf16", "parts_ptr": "*fp32", "length": "i32"}
    yield "add_parts", triton_parts._add_parts_kernel, parts, {"SPLITS": 4, "TILE": triton_parts.TILE}, FUSED


def configured(kernel: str, bits: int, use: dict[str, int]) -> Iterator[Case]:
    """One row of settings as launches: bf16 activations, fp16 scales, groups of 64, and what else shapes change."""
    blocks = {name.upper(): value for name, value in use.items() if name.startswith("block_")}
    options = {name: value for name, value in use.items() if name in ("num_warps", "num_stages")} | FUSED
    grid = {"BITS": bits, "GROUP": 64, "OPERAND": tl.bfloat16, **blocks}
    packed = {"packed_ptr": "*i32", **WEIGHT, **SIZES}
    if kernel == "gemv":
        types = {"out_ptr": "*bf16", "x_ptr": "*bf16", "planes_ptr": "*i16", "bytes_ptr": "*u8", **WEIGHT, **SIZES}
        types = {("blocks" if name == "words" else name): kind for name, kind in types.items()}
        constants = {"BITS": bits, "GROUP": 64, "WHOLE": True, "BATCH": use["batch"], "ROWS": use["rows"]}
        constants["BLOCKS"] = 32 * use["num_warps"]
        yield "gemv", triton_gemv._gemv_kernel, types, constants, options
    elif kernel == "matmul":
        types = {"out_ptr": "*bf16", "x_ptr": "*bf16", **packed}
        yield "matmul", triton_matmul._matmul_kernel, types, grid, options
    elif kernel == "input_grad":
        yield (
            "input_grad",
            triton_matmul._input_grad_kernel,
            {"out_ptr": "*bf16", "grad_ptr": "*bf16", **packed},
            grid,
            options,
        )
    elif kernel == "scale_grad":
        types = {"out_ptr": "*fp32", "grad_ptr": "*bf16", "x_ptr": "*bf16", **packed}
        del types["scale_ptr"]
        yield "scale_grad", triton_scale_grad._scale_grad_kernel, types, {**grid, "WIDTH": 64}, options
    else:
        yield from fake_quant(kernel, use["elements"], {**options, **EXACT})


def fake_quant(kernel: str, elements: int, options: dict[str, Any]) -> Iterator[Case]:
    """Groups that are a power of two, that are not, and that are a row."""
    inputs = {"weight_ptr": "*fp32", "scale_ptr": "*fp32", "zero_point_ptr": "*fp32", "n_groups": "i32"}
    forward = {"out_ptr": "*bf16", **inputs}
    backward = {
        "d_weight_ptr": "*fp32",
        "d_scale_ptr": "*fp32",
        "d_zero_point_ptr": "*fp32",
        "grad_ptr": "*bf16",
        **inputs,
    }
    for size in (64, 96, 11008):
        groups, columns = tiles.group_tile(size, elements)
        grid = {
            "QMAX": 3,
            "MIN_SCALE": 1e-4,
            "MAX_SCALE": 1e4,
            "GROUP_SIZE": size,
            "GROUPS": groups,
            "COLUMNS": columns,
        }
        if kernel == "fake_quant_backward":
            yield f"{kernel}, group {size}", triton_fake_quant._fake_quant_backward_kernel, backward, grid, options
            continue
        yield (
            f"{kernel}, group {size}",
            triton_fake_quant._fake_quant_kernel,
            forward,
            {**grid, "CODES": False},
            options,
        )
    if kernel == "fake_quant":
        types = {**forward, "out_ptr": "*u8"}
        yield "quantize", triton_fake_quant._fake_quant_kernel, types, {**grid, "CODES": True}, options


if __name__ == "__main__":
    main(int(sys.argv[1]))
