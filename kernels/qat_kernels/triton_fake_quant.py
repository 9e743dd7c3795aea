"""Triton versions of `reference.fake_quant`, `reference.fake_quant_backward` and `reference.quantize`.

Weights are taken as N * G contiguous groups of GROUP_SIZE. A program owns GROUPS whole groups and walks along them in
steps of COLUMNS: one read and one write per weight forwards, two reads and one write backwards, and the sums of the
scale and zero-point gradients stay in the program, so there are no atomics and runs repeat exactly.

Codes equal the reference's bit for bit: division is IEEE (`div_rn`), rounding is half to even, and fused multiply-adds
are off.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat_kernels.reference import MAX_SCALE, MIN_SCALE
from qat_kernels.tiles import group_tile


def fake_quant(
    weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int, out_dtype: torch.dtype
) -> Tensor:
    """See `reference.fake_quant`."""
    out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
    _launch_forward(out, weight, scale, zero_point, bits=bits, group_size=group_size, codes=False)
    return out


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int) -> Tensor:
    """See `reference.quantize`."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    _launch_forward(codes, weight, scale, zero_point, bits=bits, group_size=group_size, codes=True)
    return codes


def fake_quant_backward(
    grad_out: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.fake_quant_backward`."""
    weight, scale, zero_point, grad_out = (t.contiguous() for t in (weight, scale, zero_point, grad_out))
    d_weight, d_scale, d_zero_point = (torch.empty_like(t) for t in (weight, scale, zero_point))
    n_groups, columns_per_group, groups, columns = _partition(weight, group_size)
    with torch.cuda.device_of(weight):
        _fake_quant_backward_kernel[(triton.cdiv(n_groups, groups),)](
            d_weight,
            d_scale,
            d_zero_point,
            grad_out,
            weight,
            scale,
            zero_point,
            n_groups,
            QMAX=2**bits - 1,
            MIN_SCALE=MIN_SCALE,
            MAX_SCALE=MAX_SCALE,
            GROUP_SIZE=columns_per_group,
            GROUPS=groups,
            COLUMNS=columns,
            enable_fp_fusion=False,
        )
    return d_weight, d_scale, d_zero_point


def _launch_forward(
    out: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int, codes: bool
) -> None:
    n_groups, columns_per_group, groups, columns = _partition(weight, group_size)
    with torch.cuda.device_of(weight):
        _fake_quant_kernel[(triton.cdiv(n_groups, groups),)](
            out,
            weight.contiguous(),
            scale.contiguous(),
            zero_point.contiguous(),
            n_groups,
            QMAX=2**bits - 1,
            MIN_SCALE=MIN_SCALE,
            MAX_SCALE=MAX_SCALE,
            GROUP_SIZE=columns_per_group,
            GROUPS=groups,
            COLUMNS=columns,
            CODES=codes,
            enable_fp_fusion=False,
        )


def _partition(weight: Tensor, group_size: int) -> tuple[int, int, int, int]:
    """(groups in the weight, columns per group, groups per program, columns per step)."""
    columns_per_group = weight.shape[1] if group_size == -1 else group_size
    return (weight.numel() // columns_per_group, columns_per_group, *group_tile(columns_per_group))


@triton.jit
def rint(x):
    """Round half to even for |x| < 2**22; a larger x may change, but stays far outside every code range.

    Adding 1.5 * 2**23 leaves no bits for a fraction. `libdevice.rint` does not exist in the interpreter.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _load_grid(
    scale_ptr,
    zero_point_ptr,
    group,
    group_mask,
    QMAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    MAX_SCALE: tl.constexpr,
):
    """Scale and zero point of each group, clamped: two [GROUPS, 1]."""
    scale = tl.load(scale_ptr + group, mask=group_mask, other=1.0).to(tl.float32)
    zero_point = tl.load(zero_point_ptr + group, mask=group_mask, other=0.0).to(tl.float32)
    scale = tl.minimum(tl.maximum(scale, MIN_SCALE), MAX_SCALE)
    zero_point = tl.minimum(tl.maximum(rint(zero_point), 0.0), QMAX)
    return scale[:, None], zero_point[:, None]


@triton.jit
def _fake_quant_kernel(
    out_ptr,
    weight_ptr,
    scale_ptr,
    zero_point_ptr,
    n_groups,
    QMAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CODES: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    group_mask = group < n_groups
    scale, zero_point = _load_grid(scale_ptr, zero_point_ptr, group, group_mask, QMAX, MIN_SCALE, MAX_SCALE)
    for start in range(0, GROUP_SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = group_mask[:, None] & (column < GROUP_SIZE)[None, :]
        index = group[:, None] * GROUP_SIZE + column[None, :]
        weight = tl.load(weight_ptr + index, mask=mask, other=0.0).to(tl.float32)
        code = tl.minimum(tl.maximum(rint(tl.div_rn(weight, scale)) + zero_point, 0.0), QMAX)
        result = code if CODES else (code - zero_point) * scale
        tl.store(out_ptr + index, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fake_quant_backward_kernel(
    d_weight_ptr,
    d_scale_ptr,
    d_zero_point_ptr,
    grad_ptr,
    weight_ptr,
    scale_ptr,
    zero_point_ptr,
    n_groups,
    QMAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    group_mask = group < n_groups
    scale, zero_point = _load_grid(scale_ptr, zero_point_ptr, group, group_mask, QMAX, MIN_SCALE, MAX_SCALE)
    d_scale = tl.zeros((GROUPS, COLUMNS), dtype=tl.float32)
    d_zero_point = tl.zeros((GROUPS, COLUMNS), dtype=tl.float32)
    for start in range(0, GROUP_SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = group_mask[:, None] & (column < GROUP_SIZE)[None, :]
        index = group[:, None] * GROUP_SIZE + column[None, :]
        weight = tl.load(weight_ptr + index, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
        ratio = tl.div_rn(weight, scale)
        code = rint(ratio) + zero_point
        clamped = tl.minimum(tl.maximum(code, 0.0), QMAX)
        inside = clamped == code
        d_weight = tl.where(inside, grad, 0.0)
        tl.store(d_weight_ptr + index, d_weight.to(d_weight_ptr.dtype.element_ty), mask=mask)
        d_scale += grad * (clamped - zero_point - tl.where(inside, ratio, 0.0))
        d_zero_point += d_weight - grad
    d_scale_sum = tl.sum(d_scale, axis=1)
    d_zero_point_sum = tl.sum(d_zero_point * scale, axis=1)
    tl.store(d_scale_ptr + group, d_scale_sum.to(d_scale_ptr.dtype.element_ty), mask=group_mask)
    tl.store(d_zero_point_ptr + group, d_zero_point_sum.to(d_zero_point_ptr.dtype.element_ty), mask=group_mask)
