"""Native export: our own packed layout as `pack` writes it, everything else cast to half precision, with a model card.

    X.weight_packed int32 [N, ceil(K*b/32)]; X.weight_scale fp16 [N, G]; X.weight_zero_point int32 [ceil(N*b/32), G]

Format reference: docs/checkpoint-format.md.
"""

from __future__ import annotations

from pathlib import Path

import torch

from qatcli.formats import deployment, readback, source
from qatcli.formats.compare import Kind, Settings, TensorFiles, compare_directory
from qatcli.formats.contract import ExportOptions, Verification
from qatcli.formats.layouts import compressed_tensors as layout
from qatcli.formats.model_directory import write_directory
from qatcli.packed import QUANT_METHOD, PackedCheckpoint

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point")


def write(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> None:
    """Write the packed checkpoint as it is published: fp16 scales, half-precision tensors, model card."""
    source.survey(checkpoint)
    write_directory(
        checkpoint,
        out,
        format_name="native",
        pack_linear=_pack,
        quantization={**checkpoint.config["quantization_config"], "scale_dtype": "float16"},
        deployments=deployment.native(),
        options=options,
        dtype=getattr(torch, options.dtype),
    )


def compare(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> Verification:
    """Compare the integers and every other tensor."""
    dtype = getattr(torch, options.dtype)
    return compare_directory(checkpoint, out, "native", _read, _declared, suffixes=SUFFIXES, dtype=dtype)


def _pack(linear: source.Arrays) -> layout.Arrays:
    tensors = layout.pack_linear(linear.codes, linear.zero_point, linear.scale, bits=linear.bits)
    return {suffix: tensors[suffix] for suffix in SUFFIXES}


def _declared(settings: Settings, name: str) -> Kind | None:
    entry = settings["modules"].get(name)
    return entry and (entry["bits"], entry["group_size"])


def _read(settings: Settings, files: TensorFiles, name: str) -> readback.Triple:
    quant = settings["modules"][name]
    packed, scale, zero = (files.array(f"{name}.{suffix}") for suffix in SUFFIXES)
    if settings["quant_method"] != QUANT_METHOD or settings["scale_dtype"] != str(scale.dtype):
        raise ValueError("the settings say another method or another type of scales")
    return readback.pack_quantized(packed, zero, scale, bits=quant["bits"], in_features=quant["in_features"])
