"""Triton versions of `quantized_matmul` and `input_grad` for batches that fill tensor cores.

A tile of the packed weight is dequantized in registers and multiplied; no dense weight is written. Weights are rounded
to the dtype of the activations before the product, exactly as where a dense weight is made, and products are
accumulated in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat_kernels.triton_parts import add_parts, make_parts
from qat_kernels.triton_tile import load_weight_tile, operand


def matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    block_m: int,
    block_n: int,
    block_k: int,
    splits: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """y = x W^T [M, N] in the dtype of x [M, K]. Tiles of [block_m, block_n]; splits programs share the columns K."""
    count, in_features = x.shape
    out_features, words = packed.shape
    splits = min(splits, triton.cdiv(in_features, block_k))
    out = torch.empty(count, out_features, dtype=x.dtype, device=x.device)
    parts = make_parts(out, splits)
    with torch.cuda.device_of(x):
        _matmul_kernel[(triton.cdiv(count, block_m), triton.cdiv(out_features, block_n), splits)](
            parts,
            x.contiguous(),
            packed.contiguous(),
            scale.contiguous(),
            zero_point.contiguous(),
            count,
            out_features,
            in_features,
            words,
            scale.shape[1],
            BITS=bits,
            GROUP=in_features if group_size == -1 else group_size,
            OPERAND=operand(x.dtype),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=num_warps,
            enable_fp_fusion=True,
            num_stages=num_stages,
        )
    return add_parts(parts, out)


def input_grad(
    grad_out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    block_m: int,
    block_n: int,
    block_k: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """grad_out W [M, K] in the dtype of grad_out [M, N]. Tiles of [block_m, block_k], walked in steps of block_n."""
    count, out_features = grad_out.shape
    out = torch.empty(count, in_features, dtype=grad_out.dtype, device=grad_out.device)
    with torch.cuda.device_of(grad_out):
        _input_grad_kernel[(triton.cdiv(count, block_m), triton.cdiv(in_features, block_k))](
            out,
            grad_out.contiguous(),
            packed.contiguous(),
            scale.contiguous(),
            zero_point.contiguous(),
            count,
            out_features,
            in_features,
            packed.shape[1],
            scale.shape[1],
            BITS=bits,
            GROUP=in_features if group_size == -1 else group_size,
            OPERAND=operand(grad_out.dtype),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=num_warps,
            enable_fp_fusion=True,
            num_stages=num_stages,
        )
    return out


@triton.jit
def _matmul_kernel(
    out_ptr,
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_point_ptr,
    count,
    out_features,
    in_features,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = tl.minimum(m, count - 1).to(tl.int64)  # surplus rows repeat the last one and are not stored
    row = tl.minimum(n, out_features - 1).to(tl.int64)
    share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), tl.num_programs(2)) * BLOCK_K
    first = tl.program_id(2) * share
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)  # transposed: the weight tile is used as it is made
    for start in range(first, tl.minimum(first + share, in_features), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + x_row[:, None] * in_features + k[None, :], mask=(k < in_features)[None, :], other=0.0)
        weight = load_weight_tile(
            packed_ptr,
            scale_ptr,
            zero_point_ptr,
            row,
            start,
            words,
            groups,
            BITS,
            GROUP,
            BLOCK_N,
            BLOCK_K,
            dtype,
        )
        y = tl.dot(weight.to(OPERAND), x.to(OPERAND).T, y, input_precision="ieee")
    place = (tl.program_id(2).to(tl.int64) * count + m[None, :]) * out_features + n[:, None]
    inside = (m < count)[None, :] & (n < out_features)[:, None]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _input_grad_kernel(
    out_ptr,
    grad_ptr,
    packed_ptr,
    scale_ptr,
    zero_point_ptr,
    count,
    out_features,
    in_features,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    grad_row = tl.minimum(m, count - 1).to(tl.int64)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    d_x = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, out_features, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        place = grad_row[:, None] * out_features + n[None, :]
        grad = tl.load(grad_ptr + place, mask=(n < out_features)[None, :], other=0.0)
        weight = load_weight_tile(
            packed_ptr,
            scale_ptr,
            zero_point_ptr,
            tl.minimum(n, out_features - 1).to(tl.int64),
            first,
            words,
            groups,
            BITS,
            GROUP,
            BLOCK_N,
            BLOCK_K,
            dtype,
        )
        d_x = tl.dot(grad.to(OPERAND), weight.to(OPERAND), d_x, input_precision="ieee")
    k = first + tl.arange(0, BLOCK_K)
    place = m[:, None].to(tl.int64) * in_features + k[None, :]
    tl.store(out_ptr + place, d_x.to(dtype), mask=(m < count)[:, None] & (k < in_features)[None, :])
