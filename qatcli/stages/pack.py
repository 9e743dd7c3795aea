"""pack: the checkpoint that is published: half-precision scales, Hugging Face shards, nothing else in the directory.

Reads:  quantized (block-ap or e2e-qp) or calibration.
Writes: packed. Loads with `import qatcli; AutoModelForCausalLM.from_pretrained(dir)`.
Codes and zero points are copied bit for bit; only the stored precision of scales and of what is not quantized changes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from qatcli.casting import all_finite, dtype_name
from qatcli.errors import VerificationError
from qatcli.packed import DTYPE_KEYS, PACKED, SCALE, ZERO_POINT, PackedCheckpoint, copy_companions, write_config
from qatcli.shards import ShardWriter
from qatcli.sizes import packed_size
from qatcli.stages import Job


def run(job: Job) -> dict[str, Any]:
    """Rewrite the shards in their published precision."""
    checkpoint = PackedCheckpoint.open(job.input.path)
    config = copy.deepcopy(checkpoint.config)
    scale_dtype = getattr(torch, job.recipe.pack.scale_dtype)
    kept = {name + suffix for name in checkpoint.modules for suffix in (PACKED, ZERO_POINT)}
    scales = {name + SCALE for name in checkpoint.modules}
    dense_dtype = _dense_dtype(job.recipe.pack.dtype, config)
    writer = ShardWriter(job.out)
    largest = 0.0
    with job.log.progress("pack", len(checkpoint.shards)) as bar:
        for name in checkpoint.shards:
            tensor = checkpoint.tensor(name)
            if name in scales:
                rounded = tensor.to(scale_dtype)
                largest = max(largest, float(((rounded.float() - tensor) / tensor).abs().max()))
                _check_fit(name, rounded, lost=bool(((rounded == 0) & (tensor != 0)).any()))
                tensor = rounded
            elif name not in kept and tensor.is_floating_point():
                tensor = tensor.to(dense_dtype)
                _check_fit(name, tensor)
            writer.add(name, tensor)
            bar.advance()
    writer.close()
    config["quantization_config"]["scale_dtype"] = job.recipe.pack.scale_dtype
    if job.recipe.pack.dtype != "auto":
        config |= dict.fromkeys(DTYPE_KEYS, job.recipe.pack.dtype)
    write_config(job.out, config)
    copy_companions(checkpoint.path, job.out)
    return {"largest_relative_scale_rounding": largest, **packed_size(PackedCheckpoint.open(job.out))}


def _dense_dtype(choice: str, config: dict[str, Any]) -> torch.dtype:
    """Stored type of what is not quantized; of fp32 sources fp16 keeps more than bf16."""
    source = next((config[key] for key in DTYPE_KEYS if config.get(key)), "float32")
    name = {"float32": "float16"}.get(source, source) if choice == "auto" else choice
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_fit(name: str, tensor: torch.Tensor, *, lost: bool = False) -> None:
    if lost or not all_finite(tensor):
        raise VerificationError(
            f"{name} does not fit {dtype_name(tensor.dtype)}",
            hint="set pack.scale_dtype or pack.dtype to float32",
        )
