"""The ops on a CPU: compiled where they are hot and a compiler is there, else the reference.

Each call decides for itself. The reference takes weights too small for a compilation to pay, dtypes that training on
a CPU does not use, groups that are not whole units of eight codes, and tensors without memory (tracing, meta).
Up to FEW_ROWS rows of x are multiplied with the packed codes as they are, so a dense weight never exists; above that,
blocks of rows of the weight are dequantized one at a time and go through torch's matrix product.
"""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qat_kernels import cpu_build, reference

SMALLEST = 2**16
"""Weights from which an op is compiled: below, the reference takes less than a millisecond."""

FEW_ROWS = 16
"""Rows of x up to which decoding the weight once per four rows beats dequantizing it once."""

BLOCK_ELEMENTS = 2**21
"""Dequantized weights alive at a time: the matrix product is efficient, and they fit in the last cache."""

UNIT = 8
"""Codes decoded together; the width of cpu.cpp's vectors."""


def fake_quant(
    weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int, out_dtype: torch.dtype
) -> Tensor:
    """As `reference.fake_quant`, equal to it bit for bit."""
    compiled = _compiled(weight) if weight.dtype == torch.float32 and _storable(out_dtype) else None
    if compiled is None:
        return reference.fake_quant(weight, scale, zero_point, bits=bits, group_size=group_size, out_dtype=out_dtype)
    weight, scale, zero_point = weight.contiguous(), _floats(scale), _floats(zero_point)
    out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
    compiled.qat_fake_quant(
        *_addresses(weight, scale, zero_point, out), _is_bf16(out), *_groups(weight, scale), bits, _threads()
    )
    return out


def fake_quant_backward(
    grad_out: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.fake_quant_backward`; the sums over groups differ from it by their order."""
    compiled = _compiled(weight) if weight.dtype == torch.float32 and _storable(grad_out.dtype) else None
    if compiled is None:
        return reference.fake_quant_backward(grad_out, weight, scale, zero_point, bits=bits, group_size=group_size)
    grad_out, weight = grad_out.contiguous(), weight.contiguous()
    scale_floats, zero_floats = _floats(scale), _floats(zero_point)
    d_weight, d_scale, d_zero = (torch.empty_like(tensor) for tensor in (weight, scale_floats, zero_floats))
    compiled.qat_fake_quant_backward(
        *_addresses(grad_out, weight, scale_floats, zero_floats, d_weight, d_scale, d_zero),
        _is_bf16(grad_out),
        *_groups(weight, scale),
        bits,
        _threads(),
    )
    return d_weight, d_scale.to(scale.dtype), d_zero.to(zero_point.dtype)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `reference.dequantize`, equal to it bit for bit."""
    compiled = _compiled(packed, weights=packed.shape[0] * in_features) if _storable(dtype) else None
    if compiled is None or not _whole_units(in_features, group_size):
        return reference.dequantize(
            packed, scale, zero_point, bits=bits, group_size=group_size, in_features=in_features, dtype=dtype
        )
    packed, scale, zero_point = packed.contiguous(), _floats(scale), zero_point.contiguous()
    out = torch.empty(packed.shape[0], in_features, dtype=dtype, device=packed.device)
    compiled.qat_dequantize(
        *_addresses(packed, scale, zero_point, out),
        _is_bf16(out),
        *_layout(packed, scale, in_features),
        bits,
        _threads(),
    )
    return out


def quantized_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    prepared: Tensor | None = None,
) -> Tensor:
    """As `reference.quantized_matmul`; a few rows are multiplied in fp32 whatever the dtype of x."""
    rows, in_features = x.shape
    grid = {"bits": bits, "group_size": group_size}
    compiled = _compiled(packed, weights=packed.shape[0] * in_features)
    if compiled is None or rows > FEW_ROWS or not _whole_units(in_features, group_size):
        y = x.new_empty(rows, packed.shape[0])
        for block in _blocks(packed.shape[0], in_features):
            weight = dequantize(
                packed[block], scale[block], zero_point[block], **grid, in_features=in_features, dtype=x.dtype
            )
            torch.mm(x, weight.t(), out=y[:, block])
            del weight  # before the next one is made
        return y
    x_floats, packed, scale, zero_point = _floats(x), packed.contiguous(), _floats(scale), zero_point.contiguous()
    y = torch.empty(rows, packed.shape[0], dtype=torch.float32, device=packed.device)
    compiled.qat_matmul(
        *_addresses(x_floats, packed, scale, zero_point, y),
        rows,
        *_layout(packed, scale, in_features),
        bits,
        _threads(),
    )
    return y.to(x.dtype)


def input_grad(
    grad_out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """As `reference.input_grad`, over blocks of rows of the weight whose products are added in fp32."""
    grid = {"bits": bits, "group_size": group_size, "in_features": in_features}
    d_x = torch.zeros(grad_out.shape[0], in_features, dtype=torch.float32, device=grad_out.device)
    for block in _blocks(packed.shape[0], in_features):
        weight = dequantize(packed[block], scale[block], zero_point[block], **grid, dtype=grad_out.dtype)
        d_x += grad_out[:, block] @ weight
        del weight
    return d_x.to(grad_out.dtype)


def scale_grad(
    grad_out: Tensor, x: Tensor, packed: Tensor, zero_point: Tensor, *, bits: int, group_size: int
) -> Tensor:
    """As `reference.scale_grad`, over the dequantization of this module."""
    return reference.scale_grad(
        grad_out, x, packed, zero_point, bits=bits, group_size=group_size, dequantize=dequantize
    )


def _compiled(tensor: Tensor, *, weights: int | None = None) -> ctypes.CDLL | None:
    """The library for an op over `tensor`, of as many weights as it has elements unless said; None: the reference."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
    if not plain or (tensor.numel() if weights is None else weights) < SMALLEST or torch.compiler.is_compiling():
        return None
    return cpu_build.library()


def _storable(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16)


def _whole_units(in_features: int, group_size: int) -> bool:
    return (in_features if group_size == -1 else group_size) % UNIT == 0


def _blocks(out_features: int, in_features: int) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // in_features)
    for start in range(0, out_features, size):
        yield slice(start, min(start + size, out_features))


def _floats(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _groups(weight: Tensor, scale: Tensor) -> tuple[int, int]:
    return scale.numel(), weight.numel() // scale.numel()


def _layout(packed: Tensor, scale: Tensor, in_features: int) -> tuple[int, int, int, int]:
    """Rows, groups, group size and bytes of a packed row."""
    rows, groups = scale.shape
    return rows, groups, in_features // groups, packed.shape[1] * packed.element_size()


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _is_bf16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def _threads() -> int:
    return torch.get_num_threads()
