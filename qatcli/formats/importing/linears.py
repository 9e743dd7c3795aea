"""How a foreign checkpoint stores a linear, told from its settings and from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qatcli.errors import InputError
from qatcli.formats import readback

KINDS = "GPTQ, AWQ, AutoRound, BitBLAS, compressed-tensors, MLX and EfficientQAT checkpoints"
REORDERED = "its columns were reordered by activation (desc_act), which the packed form cannot say"
IN_ORDER = "take a checkpoint that was made without desc_act (activation order)"
CODES = (".qweight", ".weight_packed", ".biases")  # the tensor by which a quantized linear is known, the last MLX's
VALUES = ("qweight", "qzeros", "zeros", "scales", "weight_packed", "weight_scale", "weight_zero_point")
OF_MLX = ("weight", "scales", "biases")
ORDERS = ("g_idx", "weight_g_idx")
PARTS = (*VALUES, *ORDERS, *OF_MLX, "weight_shape")
# AutoRound's `packing_format` (0.16) and the settings under which others store the same tensors.
AUTO_ROUND = {
    "auto_round": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:auto_gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round:auto_awq": {"quant_method": "awq"},
}


@dataclass(frozen=True)
class Storage:
    """The kind of checkpoint, whether zero points are stored minus one (GPTQ version 1), the bits its settings say."""

    name: str
    stored_minus_one: bool = False
    bits: int | None = None


def storage_of(path: Path, settings: Mapping[str, Any]) -> Storage:
    """The kind of checkpoint its settings describe. InputError for one that is not known here.

    No settings at all are EfficientQAT's own checkpoints. GPTQ settings without a checkpoint format are version 1.
    """
    method = settings.get("quant_method", "gptq" if settings else None)
    if method is None:
        return Storage("EfficientQAT")
    if method == "auto-round":
        packing = str(settings.get("packing_format"))
        kind, activations = settings.get("data_type"), settings.get("act_bits")
        if packing not in AUTO_ROUND or (kind or "int") != "int" or activations not in (None, 16, 32):
            raise InputError(
                f"{path} stores AutoRound {packing} of {kind or 'int'} weights, {activations or 16}-bit activations",
                hint=f"only int weights packed as {', '.join(AUTO_ROUND)} are imported, of 16-bit activations",
            )
        return storage_of(path, {"bits": settings.get("bits"), **AUTO_ROUND[packing]})
    if method == "gptq":
        layout = settings.get("checkpoint_format", settings.get("format", "gptq"))
        if layout == "bitblas":
            return Storage("BitBLAS")
        if layout not in ("gptq", "gptq_v2"):
            raise InputError(
                f"{path} stores GPTQ as {layout}", hint="only the formats gptq, gptq_v2 and bitblas are imported"
            )
        return Storage(f"GPTQ ({layout})", stored_minus_one=layout == "gptq", bits=settings.get("bits"))
    if method == "awq":
        version = str(settings.get("version", settings.get("format", "gemm"))).lower()
        if version != "gemm" or settings.get("bits", 4) != 4:
            raise InputError(
                f"{path} stores AWQ {version} at {settings.get('bits')} bits", hint="only gemm at 4 bits is imported"
            )
        return Storage("AWQ")
    if method == "compressed-tensors":
        if settings.get("format") != "pack-quantized":
            raise InputError(
                f"{path} stores compressed-tensors as {settings.get('format')}", hint="only pack-quantized is imported"
            )
        groups = settings.get("config_groups")
        each = groups.values() if isinstance(groups, dict) else ()
        if any(isinstance(group, dict) and group.get("input_activations") for group in each):
            raise InputError(f"{path} quantizes activations, too", hint="only quantized weights are imported")
        if settings.get("transform_config"):
            raise InputError(f"{path} rotates activations (transform_config)", hint="only plain weights are imported")
        return Storage("compressed-tensors")
    if method == "mlx":
        if settings.get("mode", "affine") != "affine":
            raise InputError(f"{path} stores MLX {settings['mode']}", hint="only the mode affine is imported")
        return Storage("MLX")
    raise InputError(f"{path} has quant_method {method}", hint=f"what is imported: {KINDS}")


def read_linear(tensors: Mapping[str, Tensor], storage: Storage, columns: int) -> tuple[readback.Triple, int]:
    """(codes, zero points, scales) and bits of one linear with `columns` inputs. KeyError, ValueError when they misfit.

    Scales keep their type when numpy has it; bf16 becomes fp32.
    """
    if storage.name == "compressed-tensors":
        return _pack_quantized(tensors, columns)
    scale = _scale(tensors["scales"])
    if storage.name == "MLX":
        weight = tensors["weight"].numpy()
        bits = weight.shape[1] * 32 // columns
        return readback.mlx(weight, scale, _scale(tensors["biases"]), bits=bits), bits
    qweight = tensors["qweight"].numpy()
    if storage.name == "BitBLAS":
        zeros = tensors["qzeros" if "qzeros" in tensors else "zeros"].numpy()
        bits = qweight.shape[1] * 8 // columns
        return readback.bitblas(qweight, zeros, scale, bits=bits), bits
    qzeros = tensors["qzeros"].numpy()
    if storage.name == "AWQ":
        return readback.awq(qweight, qzeros, scale), 4
    _require_order(tensors.get("g_idx"), columns, len(scale))
    if storage.bits != 4 and len(qweight) == -(-columns // 10) and columns * 3 % 32 == 0:
        # Ten codes per word is EfficientQAT's own, and its zero points are never moved. 32 inputs take four words, as
        # with 4 bits: there the settings decide.
        return readback.efficientqat_3bit(qweight, qzeros, scale, in_features=columns), 3
    bits = len(qweight) * 32 // columns
    if bits not in (2, 3, 4, 8) or bits * columns != len(qweight) * 32:
        raise ValueError(f"{len(qweight)} words per output hold no 2, 3, 4 or 8 bits for {columns} inputs")
    return readback.gptq(qweight, qzeros, scale, bits=bits, stored_minus_one=storage.stored_minus_one), bits


def _pack_quantized(tensors: Mapping[str, Tensor], columns: int) -> tuple[readback.Triple, int]:
    """A symmetric linear stores no zero points: every one is the middle of the grid."""
    packed, scale = tensors["weight_packed"].numpy(), _scale(tensors["weight_scale"])
    _require_order(tensors.get("weight_g_idx"), columns, scale.shape[1])
    bits = next((bits for bits in (2, 3, 4, 8) if packed.shape[1] == -(-columns * bits // 32)), 0)
    if not bits:
        raise ValueError(f"{packed.shape[1]} words per output hold no 2, 3, 4 or 8 bits for {columns} inputs")
    middle = np.full(scale.shape, 1 << (bits - 1), np.uint8)
    zero_point = tensors["weight_zero_point"].numpy() if "weight_zero_point" in tensors else None
    if zero_point is not None and zero_point.dtype == np.int8:  # before April 2025: one byte each, around the middle
        return readback.Triple(readback.stream(packed, bits, columns), middle + zero_point.view(np.uint8), scale), bits
    if zero_point is not None:
        return readback.pack_quantized(packed, zero_point, scale, bits=bits, in_features=columns), bits
    return readback.Triple(readback.stream(packed, bits, columns), middle, scale), bits


def _scale(scales: Tensor) -> NDArray[Any]:
    """bf16 becomes fp32, which numpy has."""
    return (scales if str(scales.dtype) in ("torch.float16", "torch.float32") else scales.float()).numpy()


def _require_order(g_idx: Tensor | None, columns: int, groups: int) -> None:
    if g_idx is not None and not np.array_equal(g_idx.numpy(), np.arange(columns) * groups // columns):
        raise ValueError(REORDERED)
