"""Triton version of `reference.dequantize`: packed codes in, weights out, nothing in between written to memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat_kernels.tiles import row_tile
from qat_kernels.triton_packing import load_codes


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
    """See `reference.dequantize`."""
    rows, words = packed.shape
    out = torch.empty(rows, in_features, dtype=dtype, device=packed.device)
    tile = row_tile(in_features)
    with torch.cuda.device_of(packed):
        _dequantize_kernel[(rows, triton.cdiv(in_features, tile))](
            out,
            packed.contiguous(),
            scale.contiguous(),
            zero_point.contiguous(),
            in_features,
            words,
            scale.shape[1],
            BITS=bits,
            GROUP_SIZE=in_features if group_size == -1 else group_size,
            TILE=tile,
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _dequantize_kernel(
    out_ptr,
    packed_ptr,
    scale_ptr,
    zero_point_ptr,
    in_features,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < in_features
    code = load_codes(packed_ptr + row * words, column, in_features, words, BITS)
    group = row * groups + column // GROUP_SIZE
    scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
    zero_point = tl.load(zero_point_ptr + group, mask=mask, other=0).to(tl.int32)
    weight = (code - zero_point).to(tl.float32) * scale
    tl.store(out_ptr + row * in_features + column, weight.to(out_ptr.dtype.element_ty), mask=mask)
