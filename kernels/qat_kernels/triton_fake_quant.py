"""Triton versions of `reference.fake_quant`, `reference.fake_quant_backward` and `reference.quantize`.

Weights are taken as N * G contiguous groups of GROUP_SIZE; a program has a tile of GROUPS whole groups by COLUMNS of
each. Forwards every tile has its own program: one read and one write per weight. Backwards a program walks along its
groups: two reads and one write per weight, and the sums of the scale and zero-point gradients stay in the program, so
there are no atomics and runs repeat exactly.

Codes equal the reference's bit for bit: division is IEEE (`div_rn`), rounding is half to even, fused multiply-adds are
off, and what is not a number stays so.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat_kernels import tuning
from qat_kernels.reference import MAX_SCALE, MIN_SCALE
from qat_kernels.tiles import group_tile

Settings = dict[str, int]


def fake_quant(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    out_dtype: torch.dtype,
    use: Settings | None = None,
) -> Tensor:
    """See `reference.fake_quant`. `use` replaces the settings of `tuning`: elements per program, num_warps."""
    out = torch.empty(weight.shape, dtype=out_dtype, device=weight.device)
    _launch_forward(out, weight, scale, zero_point, bits=bits, group_size=group_size, codes=False, use=use)
    return out


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int) -> Tensor:
    """See `reference.quantize`."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    _launch_forward(codes, weight, scale, zero_point, bits=bits, group_size=group_size, codes=True, use=None)
    return codes


def fake_quant_backward(
    grad_out: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    use: Settings | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.fake_quant_backward`, and `fake_quant` for `use`."""
    weight, scale, zero_point, grad_out = (t.contiguous() for t in (weight, scale, zero_point, grad_out))
    d_weight, d_scale, d_zero_point = (torch.empty_like(t) for t in (weight, scale, zero_point))
    tile = _Tile(weight, "fake_quant_backward", bits, group_size, use)
    with torch.cuda.device_of(weight):
        _fake_quant_backward_kernel[(triton.cdiv(tile.n_groups, tile.groups),)](
            d_weight,
            d_scale,
            d_zero_point,
            grad_out,
            weight,
            scale,
            zero_point,
            tile.n_groups,
            QMAX=2**bits - 1,
            MIN_SCALE=MIN_SCALE,
            MAX_SCALE=MAX_SCALE,
            GROUP_SIZE=tile.group_size,
            GROUPS=tile.groups,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )
    return d_weight, d_scale, d_zero_point


def _launch_forward(
    out: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    codes: bool,
    use: Settings | None,
) -> None:
    tile = _Tile(weight, "fake_quant", bits, group_size, use)
    steps = triton.cdiv(tile.group_size, tile.columns)
    with torch.cuda.device_of(weight):
        _fake_quant_kernel[(triton.cdiv(tile.n_groups, tile.groups), steps)](
            out,
            weight.contiguous(),
            scale.contiguous(),
            zero_point.contiguous(),
            tile.n_groups,
            QMAX=2**bits - 1,
            MIN_SCALE=MIN_SCALE,
            MAX_SCALE=MAX_SCALE,
            GROUP_SIZE=tile.group_size,
            GROUPS=tile.groups,
            COLUMNS=tile.columns,
            CODES=codes,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )


class _Tile:
    """How a weight is cut: n_groups groups of group_size; groups per program, columns per step, warps."""

    def __init__(self, weight: Tensor, kernel: str, bits: int, group_size: int, use: Settings | None) -> None:
        rows, row = weight.shape
        use = use or tuning.table_for(weight.device).pick(kernel, bits=bits, m=0, n=rows, k=row)
        self.group_size = row if group_size == -1 else group_size
        self.n_groups = weight.numel() // self.group_size
        self.groups, self.columns = group_tile(self.group_size, use["elements"])
        self.num_warps = use["num_warps"]


@triton.jit
def rint(x):
    """Round half to even for |x| < 2**22; a larger x may change, but stays far outside every code range.

    Adding 1.5 * 2**23 leaves no bits for a fraction. `libdevice.rint` does not exist in the interpreter.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _clamp(x, lowest, highest):
    """As torch.clamp, which keeps a NaN."""
    ALL: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(tl.maximum(x, lowest, propagate_nan=ALL), highest, propagate_nan=ALL)


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
    scale = _clamp(scale, MIN_SCALE, MAX_SCALE)
    zero_point = _clamp(rint(zero_point), 0.0, QMAX)
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
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = group_mask[:, None] & (column < GROUP_SIZE)[None, :]
    index = group[:, None] * GROUP_SIZE + column[None, :]
    weight = tl.load(weight_ptr + index, mask=mask, other=0.0).to(tl.float32)
    code = _clamp(rint(tl.div_rn(weight, scale)) + zero_point, 0.0, QMAX)
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
        clamped = _clamp(code, 0.0, QMAX)
        inside = clamped == code
        d_weight = grad * inside.to(tl.float32)  # a product: what is not finite must stay so
        tl.store(d_weight_ptr + index, d_weight.to(d_weight_ptr.dtype.element_ty), mask=mask)
        d_scale += grad * (clamped - zero_point - tl.where(inside, ratio, 0.0))
        d_zero_point += d_weight - grad
    d_scale_sum = tl.sum(d_scale, axis=1)
    d_zero_point_sum = tl.sum(d_zero_point * scale, axis=1)
    tl.store(d_scale_ptr + group, d_scale_sum.to(d_scale_ptr.dtype.element_ty), mask=group_mask)
    tl.store(d_zero_point_ptr + group, d_zero_point_sum.to(d_zero_point_ptr.dtype.element_ty), mask=group_mask)
