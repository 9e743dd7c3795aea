"""How large a packed model is, counted from its tensors: nothing is estimated and nothing left out."""

from __future__ import annotations

from typing import Any

from qatcli.packed import PACKED, SCALE, ZERO_POINT, PackedCheckpoint


def bits_per_weight(checkpoint: PackedCheckpoint) -> dict[str, Any]:
    """Bytes by part, and bits per weight of the quantized linears and of the whole model.

    `bits_per_weight` counts codes, scales and zero points over the quantized weights; `bits_per_parameter` counts
    every byte over every parameter, embeddings and head included.
    """
    parts = {"codes": 0, "scales": 0, "zero_points": 0, "other": 0}
    suffixes = {PACKED: "codes", SCALE: "scales", ZERO_POINT: "zero_points"}
    dense = 0
    for name in checkpoint.shards:
        tensor = checkpoint.tensor(name)
        suffix = next((s for s in suffixes if name.endswith(s) and name.removesuffix(s) in checkpoint.modules), None)
        parts[suffixes[suffix] if suffix else "other"] += tensor.numel() * tensor.element_size()
        dense += 0 if suffix else tensor.numel()
    quantized = sum(m.in_features * m.out_features for m in checkpoint.modules.values())
    packed = parts["codes"] + parts["scales"] + parts["zero_points"]
    return {
        "bits_per_weight": round(8 * packed / quantized, 4),
        "bits_per_parameter": round(8 * (packed + parts["other"]) / (quantized + dense), 4),
        "bytes": parts,
        "quantized_weights": quantized,
        "other_parameters": dense,
    }
