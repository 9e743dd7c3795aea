"""Quantization kernels: fake quantization for training, bit-packing, and linear layers over packed weights.

A weight W [N, K] is held as codes q [N, K], scales s [N, G] and integer zero points z [N, G]:
W[n, k] = (q[n, k] - z[n, k // g]) * s[n, k // g], with G = K / g groups of g columns; group_size -1 means one group
per row. Widths are 2, 3, 4 and 8 bits.

Every op has a plain torch reference, which defines its result and runs on CPU, and a Triton version used for CUDA
tensors (see `dispatch`). Importing this package needs torch only and touches no device.
"""

import torch
from torch import Tensor

from qat_kernels import checks, interleave, ops
from qat_kernels.autograd import FakeQuant, QuantizedMatmul
from qat_kernels.dispatch import backend_for

__all__ = ["dequantize", "fake_quant", "pack", "prepare", "quantize", "quantized_matmul", "scale_grad", "unpack"]


def fake_quant(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize and dequantize weight, differentiably.

    Computes (clamp(rint(w / s) + z, 0, 2**bits - 1) - z) * s in fp32, with s clamped to [1e-4, 1e4] and
    z = clamp(rint(zero_point), 0, 2**bits - 1). Roundings and the clamps of s and z are straight-through in the
    backward pass (EfficientQAT, arXiv 2407.11062; UniformAffineQuantizer).

    Args:
        weight: [N, K], fp32, bf16 or fp16.
        scale: [N, G], fp32, bf16 or fp16.
        zero_point: [N, G], fp32, bf16 or fp16 when trained; uint8 also when constant.
        bits: 2, 3, 4 or 8.
        group_size: a divisor of K, or -1.
        out_dtype: dtype of the result, and so of the incoming gradient; default that of weight.

    Returns:
        [N, K] in out_dtype. The gradients have the dtypes of the tensors they belong to.

    Raises:
        ValueError: a width, group size, shape, dtype or device that does not fit.
    """
    checks.check_grid(weight, scale, zero_point, bits, group_size)
    dtype = _float_dtype("out_dtype", out_dtype, default=weight.dtype)
    grid = (weight, scale, zero_point, bits, group_size, dtype)
    if torch.compiler.is_compiling():
        return ops.fake_quant(*grid)
    fake_quantized: Tensor = FakeQuant.apply(*grid, backend_for(weight))
    return fake_quantized


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Codes uint8 [N, K] of weight, rounded exactly as in `fake_quant`, whose arguments it takes. Not differentiable.

    Raises:
        ValueError: a width, group size, shape, dtype or device that does not fit.
    """
    checks.check_grid(weight, scale, zero_point, bits, group_size)
    with torch.no_grad():
        return backend_for(weight).quantize(weight, scale, zero_point, bits=bits, group_size=group_size)


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Pack codes uint8 [R, C], each below 2**bits, into int32 [R, ceil(C * bits / 32)].

    A dense little-endian bitstream along the last axis, lowest bits first, padded with zeros to whole words: the
    layout of GPTQ and of compressed-tensors "pack-quantized", without gaps for 3 bits too.

    Raises:
        ValueError: bits is not 2, 3, 4 or 8, or codes is not a uint8 matrix.
    """
    checks.check_bits(bits)
    checks.check_matrix("codes", codes, (torch.uint8,))
    checks.check_not_empty("codes", codes)
    return backend_for(codes).pack(codes, bits=bits)


def unpack(packed: Tensor, *, bits: int, length: int) -> Tensor:
    """The inverse of `pack`: codes uint8 [R, length] from packed int32 [R, ceil(length * bits / 32)].

    Raises:
        ValueError: bits is not 2, 3, 4 or 8, or packed is not an int32 matrix of that width.
    """
    checks.check_bits(bits)
    checks.check_matrix("packed", packed, (torch.int32,))
    checks.check_width("packed", packed, length, bits)
    return backend_for(packed).unpack(packed, bits=bits, length=length)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Weights (q - z) * s [N, K] from packed codes, computed in fp32 and rounded once to dtype. Not differentiable.

    Args:
        packed: int32 [N, ceil(K * bits / 32)], from `pack`.
        scale: [N, G], fp32, bf16 or fp16; not clamped.
        zero_point: uint8 [N, G], not packed.
        bits: 2, 3, 4 or 8.
        group_size: a divisor of K, or -1.
        in_features: K.
        dtype: dtype of the result; default that of scale.

    Raises:
        ValueError: a width, group size, shape, dtype or device that does not fit.
    """
    checks.check_packed(packed, scale, zero_point, bits, group_size, in_features)
    out_dtype = _float_dtype("dtype", dtype, default=scale.dtype)
    with torch.no_grad():
        return backend_for(packed).dequantize(
            packed, scale, zero_point, bits=bits, group_size=group_size, in_features=in_features, dtype=out_dtype
        )


def prepare(packed: Tensor, *, bits: int, group_size: int, in_features: int) -> Tensor | None:
    """The codes of `dequantize` in the layout that `quantized_matmul` reads fastest on this device for a few rows of x.

    Costs at most about the memory of packed, which is still needed. Made once by whoever keeps packed; it follows from
    packed alone and is never stored in a checkpoint. None where nothing is faster than the packed codes themselves.

    Raises:
        ValueError: a width, group size, shape or dtype that does not fit.
    """
    checks.check_bits(bits)
    checks.check_groups(in_features, group_size)
    checks.check_matrix("packed", packed, (torch.int32,))
    checks.check_width("packed", packed, in_features, bits)
    with torch.no_grad():
        return backend_for(packed).prepare(packed, bits=bits, group_size=group_size, in_features=in_features)


def quantized_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    prepared: Tensor | None = None,
) -> Tensor:
    """A linear layer over packed weights: x W^T + bias, differentiable in x, scale and bias.

    Keeps x and the packed tensors for the backward pass, never a dense W. Under autocast x is cast as
    torch.nn.functional.linear would cast it.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        packed, scale, zero_point, bits, group_size: the weight, as for `dequantize`. packed and zero_point are
            constants.
        bias: [N] or None.
        prepared: what `prepare` gave for packed, or None.

    Returns:
        [..., N] in the dtype of x (under autocast, in the autocast dtype).

    Raises:
        ValueError: a width, group size, shape, dtype or device that does not fit.
    """
    if x.dim() == 0 or x.dtype not in checks.FLOATS:
        raise ValueError(f"x must be a floating-point tensor [..., in_features]. Got: {x.dtype} {tuple(x.shape)}")
    checks.check_packed(packed, scale, zero_point, bits, group_size, x.shape[-1])
    checks.check_same_device(x=x, packed=packed)
    if bias is not None:
        checks.check_shape("bias", bias, (packed.shape[0],))
    if prepared is not None:
        checks.check_matrix("prepared", prepared, (torch.int32,))
        checks.check_shape("prepared", prepared, (packed.shape[0], interleave.words_per_row(x.shape[-1], bits)))
        checks.check_same_device(packed=packed, prepared=prepared)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    linear = (x.reshape(-1, x.shape[-1]), packed, scale, zero_point, bits, group_size)
    y: Tensor
    if torch.compiler.is_compiling():
        y = ops.quantized_matmul(*linear, prepared)
    elif torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        y = QuantizedMatmul.apply(*linear, backend_for(x), prepared)
    else:  # a fifth of the time of a small layer on a CPU would go into autograd
        y = backend_for(x).quantized_matmul(*linear[:4], bits=bits, group_size=group_size, prepared=prepared)
    y = y.view(*x.shape[:-1], y.shape[1])
    return y if bias is None else y + bias.to(y.dtype)


def scale_grad(
    grad_out: Tensor, x: Tensor, packed: Tensor, zero_point: Tensor, *, bits: int, group_size: int
) -> Tensor:
    """Gradient fp32 [N, G] of the scales of `quantized_matmul`: sum over each group of (grad_out^T x) * (q - z).

    Args:
        grad_out: [M, N], the gradient of the layer's output.
        x: [M, K], the layer's input, of the dtype of grad_out.
        packed, zero_point, bits, group_size: the weight, as for `dequantize`.

    Raises:
        ValueError: a width, group size, shape, dtype or device that does not fit.
    """
    checks.check_matrix("x", x, checks.FLOATS)
    checks.check_matrix("grad_out", grad_out, (x.dtype,))
    checks.check_shape("grad_out", grad_out, (x.shape[0], packed.shape[0]))
    checks.check_packed(packed, None, zero_point, bits, group_size, x.shape[1])
    checks.check_same_device(grad_out=grad_out, x=x, packed=packed)
    with torch.no_grad():
        return backend_for(x).scale_grad(grad_out, x, packed, zero_point, bits=bits, group_size=group_size)


def _float_dtype(name: str, dtype: torch.dtype | None, *, default: torch.dtype) -> torch.dtype:
    if dtype is not None and dtype not in checks.FLOATS:
        raise ValueError(f"{name} must be one of {checks.FLOATS}. Got: {dtype}")
    return dtype or default
