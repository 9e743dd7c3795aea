"""Triton version of `quantized_matmul` for a few rows of x: the packed weight is read once, nothing else is its size.

The codes come in the layout of `interleave`. Four things keep the work near two instructions per weight and row of x:

* Codes and activations are read 8 to 16 bytes at a time.
* A field is masked where it lies in its lane and taken for the bits of an fp32 number: a subnormal, q 2^(p - 149) for a
  field at bit p. The activation carries the factor 2^(75 - p), so that the product is q x 2^-74: no shift and no
  conversion per weight, and the scaling by powers of two is exact for 2^-52 < |x| < 2^52. GPUs multiply subnormals at
  full speed. (A field may touch bit 23, the lowest of the exponent: the numbers go on evenly there, but not above.)
* The zero point is one correction per group: sum of (q - z) x = sum of q x - z sum of x.
* Accumulators are fp32 and stay in a thread until the end of the row.

Where rows are too few to fill the device, the columns are shared by several programs; their sums go to memory and a
second kernel adds them in order, so that runs repeat exactly. A program whose warps all lie along the columns needs no
other memory than registers, which `num_warps` of 1 ensures.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat_kernels.interleave import BLOCK, FIELDS, LANES
from qat_kernels.triton_parts import add_parts, make_parts

_BLOCK = tl.constexpr(BLOCK)
_LANES = tl.constexpr(LANES)
_FIELDS = tl.constexpr(FIELDS)
_THREADS_ALONG_FIRST_AXIS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


def supports(group_size: int, in_features: int) -> bool:
    """Whether a block of the layout is made of whole groups, or a group of whole blocks."""
    return group_size in (16, 32, -1, in_features) or group_size % BLOCK == 0


def gemv(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    group_size: int,
    rows: int,
    batch: int,
    splits: int,
    num_warps: int,
) -> Tensor:
    """y = x W^T [M, N] in the dtype of x [M, K], for the interleaved words of W [N, K].

    Args:
        rows: rows of W per program, a power of two.
        batch: rows of x per program, a power of two.
        splits: programs that share the columns of a row.
        num_warps: warps per program; each takes 32 blocks of columns at a time.
    """
    count, in_features = x.shape
    out_features = words.shape[0]
    blocks, step = triton.cdiv(in_features, BLOCK), 32 * num_warps
    splits = min(splits, triton.cdiv(blocks, step))
    out = torch.empty(count, out_features, dtype=x.dtype, device=x.device)
    parts = make_parts(out, splits)
    with torch.cuda.device_of(x):
        _gemv_kernel[(triton.cdiv(out_features, rows), triton.cdiv(count, batch), splits)](
            parts,
            x.contiguous(),
            words.view(torch.int16),
            words.view(torch.uint8),
            scale.contiguous(),
            zero_point.contiguous(),
            count,
            out_features,
            in_features,
            blocks,
            scale.shape[1],
            BITS=bits,
            GROUP=0 if group_size in (-1, in_features) else group_size,
            WHOLE=in_features % BLOCK == 0,
            BATCH=batch,
            ROWS=rows,
            BLOCKS=step,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return add_parts(parts, out)


# Rows of x, blocks and groups differ from model to model; a binary made for each would gain nothing.
@triton.jit(do_not_specialize=["count", "blocks", "groups"])
def _gemv_kernel(
    out_ptr,
    x_ptr,
    planes_ptr,
    bytes_ptr,
    scale_ptr,
    zero_point_ptr,
    count,
    out_features,
    in_features,
    blocks,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Axes of every tile: [BEFORE, BATCH, ROWS, AFTER, LANES]; planes_ptr and bytes_ptr are the words, read 16 or 8
    bits at a time.

    Blocks of columns lie along BEFORE or along AFTER. In every tile alike neighbouring threads must have neighbouring
    blocks, or each activation goes through shared memory; Triton gives what the last axis leaves of the threads to the
    first of the others (3.6) or to the last (3.7 and later).
    """
    BEFORE: tl.constexpr = BLOCKS if _THREADS_ALONG_FIRST_AXIS else 1
    AFTER: tl.constexpr = BLOCKS // BEFORE
    PER_LANE: tl.constexpr = 8 if BITS <= 3 else 16 // BITS  # fields of a lane in each plane
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, None, :, None, None]
    m = (tl.program_id(1) * BATCH + tl.arange(0, BATCH))[None, :, None, None, None]
    step = tl.arange(0, BEFORE)[:, None, None, None, None] * AFTER + tl.arange(0, AFTER)[None, None, None, :, None]
    w = tl.arange(0, _LANES)[None, None, None, None, :]
    row = tl.minimum(n, out_features - 1).to(tl.int64)  # surplus rows repeat the last one and are not stored
    x_row = tl.minimum(m, count - 1).to(tl.int64)
    share = tl.cdiv(tl.cdiv(blocks, BLOCKS), tl.num_programs(2)) * BLOCKS
    first = tl.program_id(2) * share
    y = tl.zeros((BEFORE, BATCH, ROWS, AFTER, 1), dtype=tl.float32)
    for start in range(first, tl.minimum(first + share, blocks), BLOCKS):
        block = start + step
        live = block < blocks
        lane = block * _LANES + w
        x_column = block * _BLOCK + w
        plane_ptr = planes_ptr + row * (blocks * (4 * BITS)) + lane
        q_x = tl.zeros((BEFORE, BATCH, ROWS, AFTER, _LANES), dtype=tl.float32)
        sum_x = tl.zeros((BEFORE, BATCH, 1, AFTER, _LANES), dtype=tl.float32)
        for field in tl.static_range(_FIELDS):
            if field % PER_LANE == 0:
                word = tl.load(plane_ptr + field // PER_LANE * (blocks * _LANES), mask=live, other=0)
                word = word.to(tl.uint16, bitcast=True).to(tl.uint32)
            if BITS == 3 and field == 0:
                high_ptr = bytes_ptr + (row * 3 + 2) * (blocks * _LANES) + lane
                word |= tl.load(high_ptr, mask=live, other=0).to(tl.uint32) << 16
            q = word & (((1 << BITS) - 1) << (field % PER_LANE * BITS))
            column = x_column + field * _LANES
            mask = live if WHOLE else column < in_features
            x = tl.load(x_ptr + x_row * in_features + column, mask=mask, other=0.0).to(tl.float32)
            sum_x += x
            q_x += q.to(tl.float32, bitcast=True) * (x * 2.0 ** (75 - field % PER_LANE * BITS))
            if _ends_group(field, GROUP):
                group = tl.zeros_like(block) if GROUP == 0 else (block * _BLOCK + field * _LANES) // GROUP
                place = row * groups + group
                inside = live & (group < groups)
                scale = tl.load(scale_ptr + place, mask=inside, other=0.0).to(tl.float32)
                zero_point = tl.load(zero_point_ptr + place, mask=inside, other=0).to(tl.float32)
                group_q_x = tl.sum(q_x, axis=4, keep_dims=True) * 2.0**74
                y += scale * (group_q_x - zero_point * tl.sum(sum_x, axis=4, keep_dims=True))
                q_x = tl.zeros((BEFORE, BATCH, ROWS, AFTER, _LANES), dtype=tl.float32)
                sum_x = tl.zeros((BEFORE, BATCH, 1, AFTER, _LANES), dtype=tl.float32)
    total = tl.sum(tl.sum(y, axis=3, keep_dims=True), axis=0, keep_dims=True)
    place = (tl.program_id(2).to(tl.int64) * count + m) * out_features + n
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=(m < count) & (n < out_features))


@triton.constexpr_function
def _ends_group(field, group):
    """Whether a group, or the part of one that is in a block, ends with this field."""
    return field == FIELDS - 1 or (group in (16, 32) and (field + 1) * LANES % group == 0)
