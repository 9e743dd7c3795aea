"""gguf-py as a verifier: its reader and its own dequantizer against our dense weights."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np

from qatcli.formats import source
from qatcli.formats.gguf_compare import file_rows, gguf_name
from qatcli.formats.layouts.gguf_blocks import TYPES
from qatcli.packed import PackedCheckpoint

_HALF_ULP = 2.0**-11  # Q4_1 rounds its offset -s z to fp16


def check_with_gguf_py(checkpoint: PackedCheckpoint, out: Path) -> tuple[list[str], list[str]]:
    """Differences and notes from dequantizing every quantized linear with gguf-py."""
    import gguf

    known = {int(kind) for kind in gguf.GGMLQuantizationType}
    if TYPES["Q2_0"].type_id not in known and _has_unknown_type(out, known):
        return [], [f"gguf {version('gguf')} does not know block type Q2_0; our own reader compared the integers"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(next(out.glob("*.gguf"))).tensors}
    differences = []
    for name in checkpoint.modules:
        tensor = tensors[gguf_name(checkpoint, name + ".weight")]
        linear = source.arrays(checkpoint, name)
        columns = linear.codes.shape[1] // linear.scale.shape[1]
        zero, scale = (np.repeat(a.astype(np.float32), columns, axis=1) for a in (linear.zero_point, linear.scale))
        expected = (linear.codes - zero) * scale
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)[
            file_rows(checkpoint, name + ".weight", len(scale))
        ]
        tolerance = np.abs(zero * scale) * _HALF_ULP if tensor.tensor_type.name == "Q4_1" else 0.0
        wrong = np.count_nonzero(np.abs(weight - expected) > tolerance)
        if wrong:
            differences.append(f"gguf-py reads {wrong} of {expected.size} weights of {name} differently")
    return differences, [f"gguf-py dequantized {len(checkpoint.modules)} linears"]


def _has_unknown_type(out: Path, known: set[int]) -> bool:
    from qatcli.formats.gguf_readback import open_gguf

    types = {entry.type_name for entry in open_gguf(next(out.glob("*.gguf"))).tensors.values()}
    return any(TYPES[name].type_id not in known for name in types & TYPES.keys())
