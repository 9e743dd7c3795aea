"""Dense export: an ordinary half-precision Hugging Face checkpoint with the quantized values, for any tool.

`X.weight` = (q - z) * s from fp16 scales: exact in fp32, rounded once to `dtype`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qatcli.formats import deployment, readback, source
from qatcli.formats.compare import Kind, Settings, TensorFiles, compare_directory, parts_of
from qatcli.formats.contract import ExportOptions, Verification
from qatcli.formats.model_directory import write_directory
from qatcli.packed import PackedCheckpoint


def write(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> None:
    """Write the dense directory in `options.dtype`."""
    source.survey(checkpoint)
    dtype = getattr(torch, options.dtype)
    write_directory(
        checkpoint,
        out,
        format_name="dense",
        pack_linear=partial(_weight, dtype=dtype),
        quantization=None,
        deployments=deployment.dense(),
        options=options,
        dtype=dtype,
    )


def compare(checkpoint: PackedCheckpoint, out: Path, options: ExportOptions) -> Verification:
    """Recover the codes by division and compare every weight bit for bit."""
    dtype = getattr(torch, options.dtype)
    read = partial(_read, checkpoint, dtype)
    return compare_directory(checkpoint, out, "dense", read, _declared, suffixes=("weight",), kinds={}, dtype=dtype)


def _weight(linear: source.Arrays, *, dtype: torch.dtype) -> dict[str, Tensor]:
    groups = linear.scale.shape[1]
    level = torch.from_numpy(linear.codes.reshape(len(linear.codes), groups, -1)).float()
    level -= torch.from_numpy(linear.zero_point)[..., None]
    weight = level * torch.from_numpy(linear.scale)[..., None].float()
    return {"weight": source.cast("weight", weight.reshape(linear.codes.shape), dtype)}


def _declared(settings: Settings, name: str) -> Kind | None:
    return (0, 0) if settings else None  # a dense checkpoint has no quantization_config


def _read(
    checkpoint: PackedCheckpoint, dtype: torch.dtype, settings: Settings, files: TensorFiles, name: str
) -> readback.Triple:
    weight = files.tensor(name + ".weight")
    linear = source.arrays(checkpoint, name)
    if weight.dtype != dtype or tuple(weight.shape) != linear.codes.shape:
        raise ValueError(f"it is {weight.dtype} {list(weight.shape)}, not {dtype} {list(linear.codes.shape)}")
    columns, wrong = weight.shape[1] // linear.scale.shape[1], 0
    codes = np.empty_like(linear.codes)
    for part in parts_of(codes.shape):
        stored = weight[part].double().numpy()
        zero, scale = (np.repeat(a[part].astype(float), columns, axis=1) for a in (linear.zero_point, linear.scale))
        found = np.clip(np.rint(stored / np.where(scale == 0, 1, scale)) + zero, 0, 255)
        wrong += np.count_nonzero(stored != torch.from_numpy((found - zero) * scale).to(dtype).double().numpy())
        codes[part] = found
    if wrong:
        raise ValueError(f"{wrong} weights are no multiples of their step")
    return readback.Triple(codes, linear.zero_point, linear.scale)
