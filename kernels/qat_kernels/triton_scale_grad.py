"""Triton version of `reference.scale_grad`: the weight gradient lives in registers, a tile at a time.

A program owns a tile of rows and of whole groups (or of a piece of one long group), accumulates dW = grad_out^T x there
with the matrix unit in fp32, multiplies it by q - z and sums over each group. Pieces of a long group go to memory as
fp32 and are added in order. No atomics; dW is never written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat_kernels.tiles import next_power_of_two
from qat_kernels.triton_packing import load_codes
from qat_kernels.triton_parts import add_parts, make_parts
from qat_kernels.triton_tile import operand


def scale_grad(
    grad_out: Tensor,
    x: Tensor,
    packed: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    block_m: int,
    block_n: int,
    block_k: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """See `reference.scale_grad`. Tiles of [block_n, block_k] of dW, accumulated over block_m rows of x at a time."""
    count, in_features = x.shape
    out_features, groups = zero_point.shape
    group = in_features if group_size == -1 else group_size
    width = min(block_k, next_power_of_two(group))
    pieces = triton.cdiv(group, width)
    out = torch.empty(out_features, groups, dtype=torch.float32, device=x.device)
    parts = make_parts(out, pieces)
    tiles = triton.cdiv(groups, block_k // width)
    with torch.cuda.device_of(x):
        _scale_grad_kernel[(triton.cdiv(out_features, block_n), tiles, pieces)](
            parts,
            grad_out.contiguous(),
            x.contiguous(),
            packed.contiguous(),
            zero_point.contiguous(),
            count,
            out_features,
            in_features,
            packed.shape[1],
            groups,
            BITS=bits,
            GROUP=group,
            WIDTH=width,
            OPERAND=operand(x.dtype),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=num_warps,
            enable_fp_fusion=True,
            num_stages=num_stages,
        )
    return add_parts(parts, out)


@triton.jit
def _scale_grad_kernel(
    out_ptr,
    grad_ptr,
    x_ptr,
    packed_ptr,
    zero_point_ptr,
    count,
    out_features,
    in_features,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The columns of a tile are BLOCK_K // WIDTH groups, each padded to WIDTH, or piece program_id(2) of one group."""
    COUNT: tl.constexpr = BLOCK_K // WIDTH
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, out_features - 1).to(tl.int64)  # surplus rows repeat the last one and are not stored
    tile_column = tl.arange(0, BLOCK_K)
    group = tl.program_id(1) * COUNT + tile_column // WIDTH
    within = tl.program_id(2) * WIDTH + tile_column % WIDTH
    inside = (group < groups) & (within < GROUP)
    k = group * GROUP + within
    d_weight = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, count, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        live = (m < count)[:, None]
        place = m.to(tl.int64)[:, None]
        grad = tl.load(grad_ptr + place * out_features + row[None, :], mask=live, other=0.0)
        x = tl.load(x_ptr + place * in_features + k[None, :], mask=live & inside[None, :], other=0.0)
        d_weight = tl.dot(grad.to(OPERAND).T, x.to(OPERAND), d_weight, input_precision="ieee")
    column = tl.where(inside, k, in_features)[None, :]  # beyond the row: code 0 is loaded, and dW is 0
    code = load_codes(packed_ptr + row[:, None] * words, column, in_features, words, BITS)
    zero_place = row[:, None] * groups + tl.minimum(group, groups - 1)[None, :]
    steps = code - tl.load(zero_point_ptr + zero_place).to(tl.int32)
    terms = (d_weight * steps.to(tl.float32)).reshape(BLOCK_N, COUNT, WIDTH)
    sums = tl.sum(terms, axis=2)
    out_group = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    place = (tl.program_id(2).to(tl.int64) * out_features + n[:, None]) * groups + out_group[None, :]
    tl.store(out_ptr + place, sums, mask=(n < out_features)[:, None] & (out_group < groups)[None, :])
