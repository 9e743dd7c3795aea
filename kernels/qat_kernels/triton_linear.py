"""The packed linear and its gradients on a GPU: which kernel serves which batch.

Three kernels share `quantized_matmul`: `gemv` for a few rows of x where the weight was prepared, `matmul` for batches
that fill a tile of the matrix unit, and above a crossover cuBLAS on a dense weight that is made a block at a time: of
DENSE_BYTES, or of one group of every row if that is more. `input_grad` has the latter two. The crossovers are data
(`tuning`).
"""

import math

import torch
from torch import Tensor

from qat_kernels import reference, triton_dequantize, triton_gemv, triton_matmul, triton_scale_grad, tuning
from qat_kernels.interleave import interleave

DENSE_BYTES = 2**26
"""Dense weights alive at a time."""

DENSE_ROWS = 256
"""Blocks of rows are a multiple of this, the side of cuBLAS's largest tiles, which also aligns each block's output."""


def prepare(packed: Tensor, *, bits: int, group_size: int, in_features: int) -> Tensor | None:
    """The interleaved words, or None where groups do not fit them."""
    if not triton_gemv.supports(group_size, in_features):
        return None
    return interleave(packed, bits=bits, in_features=in_features)


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
    """See `reference.quantized_matmul`."""
    (count, in_features), out_features = x.shape, packed.shape[0]
    if count == 0:
        return x.new_empty(0, out_features)
    table = tuning.table_for(x.device)
    route = table.route("quantized_matmul", count, without="gemv" if prepared is None else "")
    grid = {"bits": bits, "group_size": group_size}
    if route == "dense" or (route == "matmul" and x.dtype == torch.float32):
        return _dense_matmul(x, packed, scale, zero_point, **grid)
    use = table.pick(route, bits=bits, m=count, n=out_features, k=in_features)
    if route == "gemv" and prepared is not None:
        return triton_gemv.gemv(x, prepared, scale, zero_point, **grid, **use)
    return triton_matmul.matmul(x, packed, scale, zero_point, **grid, **use)


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
    """See `reference.input_grad`."""
    count, out_features = grad_out.shape
    grid = {"bits": bits, "group_size": group_size, "in_features": in_features}
    if count == 0:
        return grad_out.new_empty(0, in_features)
    table = tuning.table_for(grad_out.device)
    if table.route("input_grad", count) == "dense" or grad_out.dtype == torch.float32:
        return _dense_input_grad(grad_out, packed, scale, zero_point, **grid)
    use = table.pick("input_grad", bits=bits, m=count, n=out_features, k=in_features)
    return triton_matmul.input_grad(grad_out, packed, scale, zero_point, **grid, **use)


def scale_grad(
    grad_out: Tensor, x: Tensor, packed: Tensor, zero_point: Tensor, *, bits: int, group_size: int
) -> Tensor:
    """See `reference.scale_grad`; fp32, which the matrix unit would round, takes cuBLAS and blocks of dW."""
    (count, in_features), out_features = x.shape, packed.shape[0]
    grid = {"bits": bits, "group_size": group_size}
    table = tuning.table_for(x.device)
    if table.route("scale_grad", count) == "dense" or x.dtype == torch.float32:
        return reference.scale_grad(grad_out, x, packed, zero_point, **grid, dequantize=triton_dequantize.dequantize)
    use = table.pick("scale_grad", bits=bits, m=count, n=out_features, k=in_features)
    return triton_scale_grad.scale_grad(grad_out, x, packed, zero_point, **grid, **use)


def _dense_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int
) -> Tensor:
    """x W^T with blocks of rows of W."""
    (count, in_features), out_features = x.shape, packed.shape[0]
    out = torch.empty(count, out_features, dtype=x.dtype, device=x.device)
    block = _even(out_features, max(1, DENSE_BYTES // x.element_size() // in_features), DENSE_ROWS)
    for start in range(0, out_features, block):
        rows = slice(start, start + block)
        weight = triton_dequantize.dequantize(
            packed[rows],
            scale[rows],
            zero_point[rows],
            bits=bits,
            group_size=group_size,
            in_features=in_features,
            dtype=x.dtype,
        )
        torch.mm(x, weight.t(), out=out[:, rows])
        del weight  # before the next one is made
    return out


def _dense_input_grad(
    grad_out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """grad_out W with blocks of columns of W, so that no sum is cut: blocks of whole words and whole groups."""
    count, out_features = grad_out.shape
    out = torch.empty(count, in_features, dtype=grad_out.dtype, device=grad_out.device)
    group_size = -1 if group_size == in_features else group_size  # a group for each row binds no columns together
    whole = 32 if group_size == -1 else math.lcm(32, group_size)
    elements = DENSE_BYTES // grad_out.element_size()
    block = _even(in_features, max(1, elements // (out_features * whole)) * whole, whole)
    for start in range(0, in_features, block):
        columns = slice(start, min(start + block, in_features))
        words = slice(start * bits // 32, -(-columns.stop * bits // 32))
        groups = slice(None) if group_size == -1 else slice(start // group_size, -(-columns.stop // group_size))
        weight = triton_dequantize.dequantize(
            packed[:, words],
            scale[:, groups],
            zero_point[:, groups],
            bits=bits,
            group_size=group_size,
            in_features=columns.stop - start,
            dtype=grad_out.dtype,
        )
        torch.mm(grad_out, weight, out=out[:, columns])
        del weight
    return out


def _even(length: int, longest: int, step: int) -> int:
    """The length of blocks, at most longest, that leaves none much shorter: a multiple of step where one fits."""
    if longest < step:
        return longest
    blocks = -(-length // (longest // step * step))
    return -(-length // (blocks * step)) * step
