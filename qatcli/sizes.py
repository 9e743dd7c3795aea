"""How large a model is, counted from the headers of its files: nothing is estimated and nothing left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qatcli.formats.importing.linears import OF_MLX, VALUES
from qatcli.linear import PackedLinear
from qatcli.packed import PACKED, SCALE, ZERO_POINT, ModuleQuant, PackedCheckpoint
from qatcli.shards import TensorEntry, read_header, shard_map


def packed_size(checkpoint: PackedCheckpoint) -> dict[str, Any]:
    """Bytes by part, and bits per weight of the quantized linears and of the whole model.

    `bits_per_weight` counts codes, scales and zero points over the quantized weights; `bits_per_parameter` counts
    every byte over every parameter, embeddings and head included.
    """
    parts = {"codes": 0, "scales": 0, "zero_points": 0, "other": 0}
    suffixes = {PACKED: "codes", SCALE: "scales", ZERO_POINT: "zero_points"}
    dense = 0
    for name, entry in _headers(checkpoint.path, set(checkpoint.shards.values())).items():
        suffix = next((s for s in suffixes if name.endswith(s) and name.removesuffix(s) in checkpoint.modules), None)
        parts[suffixes[suffix] if suffix else "other"] += entry.bytes
        dense += 0 if suffix else math.prod(entry.shape)
    quantized = sum(quant.weights for quant in checkpoint.modules.values())
    packed = parts["codes"] + parts["scales"] + parts["zero_points"]
    return {
        "bits_per_weight": round(8 * packed / quantized, 4),
        "bits_per_parameter": round(8 * (packed + parts["other"]) / (quantized + dense), 4),
        "bytes": parts,
        "quantized_weights": quantized,
        "other_parameters": dense,
    }


def model_size(files: Path, model: Any) -> dict[str, int | float | None]:
    """Bytes of the weights' files, and bits per parameter and per quantized weight, whatever the format.

    files: a safetensors directory or a GGUF file. bits_per_parameter: every byte of the tensors, or of the GGUF file,
    over every parameter, embeddings included, tied ones counted once. bits_per_weight: codes, scales and zero points
    over the weights of the quantized linears; None where no linear of `model` runs packed.
    """
    shards = set(shard_map(files).values()) if files.is_dir() else set()
    total = sum(file.stat().st_size for file in [files / name for name in shards] or [files])
    tensors = {name: entry.bytes for name, entry in _headers(files, shards).items()}
    of_mlx = {
        f"{name.removesuffix('.biases')}.{part}" for name in tensors if name.endswith(".biases") for part in OF_MLX
    }
    packed = sum(size for name, size in tensors.items() if name.rpartition(".")[2] in VALUES or name in of_mlx)
    quantized = sum(quant.weights for quant in _quants(model))
    return {
        "file_bytes": total,
        "parameters": parameter_count(model),
        "bits_per_parameter": round(8 * (sum(tensors.values()) or total) / parameter_count(model), 4),
        "bits_per_weight": round(8 * packed / quantized, 4) if quantized else None,
    }


def parameter_count(model: Any) -> int:
    """Weights, a packed linear's as those it stands for, tied ones once."""
    scales = {id(module.weight_scale) for module in model.modules() if isinstance(module, PackedLinear)}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in scales)
    return plain + sum(quant.weights for quant in _quants(model))


def _headers(path: Path, shards: set[str]) -> dict[str, TensorEntry]:
    return {name: entry for shard in sorted(shards) for name, entry in read_header(path / shard).items()}


def _quants(model: Any) -> list[ModuleQuant]:
    return [module.quant for module in model.modules() if isinstance(module, PackedLinear)]
