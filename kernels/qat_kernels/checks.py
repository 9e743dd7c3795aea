"""Argument checks of the public ops: shapes, dtypes and widths, each reported with what was expected and what came.

Values are not looked at (that would wait for the device): codes and zero points are trusted to be below 2**bits.
"""

import torch
from torch import Tensor

from qat_kernels.bitstream import words_per_row

BITS = (2, 3, 4, 8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_bits(bits: int) -> None:
    """Raise ValueError unless bits is a supported width."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}. Got: {bits!r}")


def check_groups(in_features: int, group_size: int) -> int:
    """Number of groups of a row; raise ValueError unless group_size is -1 (one group) or divides in_features."""
    if group_size == -1:
        return 1
    if group_size <= 0 or in_features % group_size != 0:
        raise ValueError(f"group_size must be -1 or divide in_features = {in_features}. Got: {group_size!r}")
    return in_features // group_size


def check_not_empty(name: str, tensor: Tensor) -> None:
    """Raise ValueError if tensor has no elements."""
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty. Got: shape {tuple(tensor.shape)}")


def check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless tensor has two dimensions and one of the dtypes."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions. Got: shape {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {_names(dtypes)}. Got: {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless tensor has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}. Got: {tuple(tensor.shape)}")


def check_same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        placed = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"tensors must be on one device. Got: {placed}")


def check_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int) -> None:
    """Check the arguments of the ops that round a weight [N, K] to a grid [N, G]."""
    check_bits(bits)
    check_matrix("weight", weight, FLOATS)
    check_not_empty("weight", weight)
    check_matrix("scale", scale, FLOATS)
    check_matrix("zero_point", zero_point, (*FLOATS, torch.uint8))
    shape = (weight.shape[0], check_groups(weight.shape[1], group_size))
    check_shape("scale", scale, shape)
    check_shape("zero_point", zero_point, shape)
    check_same_device(weight=weight, scale=scale, zero_point=zero_point)


def check_width(name: str, packed: Tensor, length: int, bits: int) -> None:
    """Raise ValueError unless packed has rows, which hold exactly length values."""
    check_not_empty(name, packed)
    words = words_per_row(length, bits)
    if packed.shape[1] != words:
        raise ValueError(
            f"{name} must have {words} words per row for {length} values of {bits} bits. Got: {packed.shape[1]}"
        )


def check_packed(
    packed: Tensor, scale: Tensor | None, zero_point: Tensor, bits: int, group_size: int, in_features: int
) -> None:
    """Check packed codes [N, ceil(K * bits / 32)] with the scales and unpacked zero points [N, G] of one weight."""
    check_bits(bits)
    shape = (packed.shape[0], check_groups(in_features, group_size))
    check_matrix("packed", packed, (torch.int32,))
    check_width("packed", packed, in_features, bits)
    check_matrix("zero_point", zero_point, (torch.uint8,))
    check_shape("zero_point", zero_point, shape)
    check_same_device(packed=packed, zero_point=zero_point)
    if scale is not None:
        check_matrix("scale", scale, FLOATS)
        check_shape("scale", scale, shape)
        check_same_device(packed=packed, scale=scale)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
