"""The safetensors directory that all formats but GGUF share: shards, config, tokenizer, model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatcli.casting import dtype_name
from qatcli.formats import source
from qatcli.formats.atomic import atomic_directory
from qatcli.formats.card import model_card
from qatcli.formats.contract import Deployment, ExportOptions
from qatcli.formats.rope import earlier_keys
from qatcli.packed import PackedCheckpoint, copy_companions, write_config
from qatcli.shards import ShardWriter

PackLinear = Callable[[source.Arrays], Mapping[str, NDArray[np.generic] | Tensor]]


def write_directory(
    checkpoint: PackedCheckpoint,
    out: Path,
    *,
    format_name: str,
    pack_linear: PackLinear,
    quantization: dict[str, Any] | None,
    deployments: list[Deployment],
    options: ExportOptions,
    dtype: torch.dtype = torch.float16,
    extra_files: Mapping[str, dict[str, Any]] | None = None,
    settings_key: str = "quantization_config",
) -> None:
    """Write a model directory, one linear at a time, complete or not at all; see `ExportOptions.resume`.

    `pack_linear` returns the arrays of one linear by the suffix of their names; biases and all other tensors are cast
    to `dtype`. `quantization` becomes config.json's `settings_key`; `extra_files` are further JSON files.
    """
    with atomic_directory(out, resume=options.resume) as work:
        shards = ShardWriter(work, max_shard_bytes=options.max_shard_bytes, resume=options.resume)
        kept = {name.rpartition(".")[0] for name in shards.kept}
        begun = [name for name in checkpoint.modules if name in kept]
        for name in checkpoint.modules:
            if name in begun[:-1]:  # the last one may go on in a shard that was not finished
                continue
            linear = source.arrays(checkpoint, name)
            for suffix, array in pack_linear(linear).items():
                tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
                shards.add(f"{name}.{suffix}", tensor)
            if linear.bias is not None:
                shards.add(name + ".bias", source.cast(name + ".bias", linear.bias, dtype))
        for name in source.dense_tensor_names(checkpoint):
            if name not in shards.kept:
                shards.add(name, source.cast(name, checkpoint.tensor(name), dtype))
        shards.close()
        settings = {settings_key: quantization} if quantization else {}
        write_config(work, model_config(checkpoint, dtype) | settings)
        for file_name, content in (extra_files or {}).items():
            (work / file_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        copy_companions(checkpoint.path, work)
        card = model_card(checkpoint, format_name, deployments)
        (work / "README.md").write_text(card, encoding="utf-8")


def model_config(checkpoint: PackedCheckpoint, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of an export without its quantization: the model's own, tied embeddings, of which readers have other
    defaults, and the dtype and settings of rotary embeddings under the names before transformers 5, too."""
    config = source.base_config(checkpoint.config)
    full, keys = source.full_config(config), earlier_keys(config)
    if _rope(source.full_config({**config, **keys})) != _rope(full):  # which reads the keys before the new ones
        keys = {}
    name = dtype_name(dtype)
    return {"tie_word_embeddings": full.tie_word_embeddings, **config, **keys, "dtype": name, "torch_dtype": name}


def _rope(full: Any) -> dict[str, Any]:
    """Its settings; the kind's earlier name says nothing more."""
    return {key: value for key, value in (getattr(full, "rope_parameters", None) or {}).items() if key != "type"}


def bias_and_dense(checkpoint: PackedCheckpoint, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Every tensor an export copies, by name, read when called; for the verifier."""

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: source.cast(name, checkpoint.tensor(name), dtype)

    return {name: reader(name) for name in source.copied_names(checkpoint)}
