"""How large a model is on disk, whatever its format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qatcli.formats.importing.linears import VALUES
from qatcli.linear import PackedLinear
from qatcli.shards import read_header, shard_map


def model_size(files: Path, model: Any) -> dict[str, int | float | None]:
    """Bytes of the weights' files, and bits per parameter and per quantized weight.

    files: a safetensors directory or a GGUF file. bits_per_parameter: every byte of the tensors, or of the GGUF file,
    over every parameter, embeddings included, tied ones counted once. bits_per_weight: codes, scales and zero points
    over the weights of the quantized linears; None where no linear of `model` runs packed.
    """
    shards = sorted(set(shard_map(files).values())) if files.is_dir() else []
    total = sum(file.stat().st_size for file in [files / name for name in shards] or [files])
    tensors = {name: entry.bytes for shard in shards for name, entry in read_header(files / shard).items()}
    packed = sum(size for name, size in tensors.items() if name.endswith(tuple(f".{part}" for part in VALUES)))
    quantized = sum(q.in_features * q.out_features for q in _quants(model))
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
    return plain + sum(quant.in_features * quant.out_features for quant in _quants(model))


def _quants(model: Any) -> list[Any]:
    return [module.quant for module in model.modules() if isinstance(module, PackedLinear)]
