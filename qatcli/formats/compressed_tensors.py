"""compressed-tensors export ("pack-quantized"): the only 2/3-bit format that a current vLLM detects by itself.

Tensors are in `layouts.compressed_tensors`, which is our own packed layout plus the dense shape. A symmetric model
(every zero point 2^(bits-1)) is declared so and stores no zero points, which older releases read, too. Linears with
other bits or group sizes than most get a config group of their own that names them.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qatcli.formats import deployment, readback, source
from qatcli.formats.compare import Kind, Settings, TensorFiles, compare_directory
from qatcli.formats.contract import ExportOptions, Verification
from qatcli.formats.layouts import compressed_tensors as layout
from qatcli.formats.model_directory import write_directory
from qatcli.packed import PackedCheckpoint

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def write(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> None:
    """Write the compressed-tensors directory; any bits, sizes and groups."""
    symmetric = source.survey(checkpoint)
    write_directory(
        checkpoint,
        out,
        format_name="compressed-tensors",
        pack_linear=partial(_pack, symmetric=symmetric),
        quantization=quantization_config(checkpoint, symmetric=symmetric),
        deployments=deployment.compressed_tensors(checkpoint, symmetric=symmetric),
        options=options,
    )


def compare(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> Verification:
    """Compare the integers."""
    return compare_directory(checkpoint, out, "compressed-tensors", _read, _declared, suffixes=SUFFIXES)


def quantization_config(checkpoint: PackedCheckpoint, *, symmetric: bool) -> dict[str, Any]:
    """The quantization_config: one config group per (bits, group size), the most common one for all other linears."""
    kinds: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, quant in checkpoint.modules.items():
        kinds[quant.kind].append(name)
    common = source.majority(checkpoint)
    groups = {}
    for number, kind in enumerate(sorted(kinds, key=lambda kind: kind == common)):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if kind == common else sorted(kinds[kind]),
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "weights": _weights(*kind, symmetric=symmetric),
        }
    head = [] if any(name.endswith("lm_head") for name in checkpoint.modules) else ["lm_head"]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": head + source.dense_linears(checkpoint),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(bits: int, group_size: int, *, symmetric: bool) -> dict[str, Any]:
    channel = group_size == -1
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _pack(linear: source.Arrays, *, symmetric: bool) -> layout.Arrays:
    tensors = layout.pack_linear(linear.codes, linear.zero_point, linear.scale, bits=linear.bits)
    return {name: array for name, array in tensors.items() if not (symmetric and name == "weight_zero_point")}


def _scheme(settings: Settings, name: str) -> dict[str, Any] | None:
    """The weights' scheme of a linear, None where the settings leave it dense; a name goes before a type."""
    if name in settings["ignore"]:
        return None
    groups = settings["config_groups"].values()
    named = (group["weights"] for target in (name, "Linear") for group in groups if target in group["targets"])
    return next(named, None)


def _declared(settings: Settings, name: str) -> Kind | None:
    scheme = _scheme(settings, name)
    if scheme is None:
        return None
    return scheme["num_bits"], -1 if scheme["strategy"] == "channel" else scheme["group_size"]


def _read(settings: Settings, files: TensorFiles, name: str) -> readback.Triple:
    scheme = _scheme(settings, name)
    if scheme is None or settings["format"] != "pack-quantized":
        raise ValueError("the settings say that it is not quantized, or another layout")
    bits = scheme["num_bits"]
    rows, columns = (int(side) for side in files.array(name + ".weight_shape"))
    packed, scale = files.array(name + ".weight_packed"), files.array(name + ".weight_scale")
    if not scheme["symmetric"]:
        zero_point = files.array(name + ".weight_zero_point")
        return readback.pack_quantized(packed, zero_point, scale, bits=bits, in_features=columns)
    middle = np.full((rows, scale.shape[1]), 1 << (bits - 1), np.uint8)
    return readback.Triple(readback.stream(packed, bits, columns), middle, scale)
