"""Triton version of `quantized_matmul` for a few rows of x: the packed weight is read once, nothing else is its size.

The codes come in the layout of `interleave`. Three things keep the work near two instructions per weight and row of x:

* A field is masked where it lies in its word and taken for the bits of an fp32 number: a subnormal, q 2^(p - 149) for a
  field at bit p. The activation carries the factor 2^(75 - p), so that the product is q x 2^-74: no shift and no
  conversion per weight, and the scaling by powers of two is exact for |x| < 2^52. GPUs multiply subnormals at full
  speed.
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
    """y = x W^T [M, N] in the dtype of x [M, K], for the interleaved words [N, bits, U] of W [N, K].

    Args:
        rows: rows of W per program, a power of two.
        batch: rows of x per program, a power of two.
        splits: programs that share the columns of a row.
        num_warps: warps per program; each takes 32 blocks of columns at a time.
    """
    count, in_features = x.shape
    out_features, _, lanes = words.shape
    blocks = 32 * num_warps
    splits = min(splits, triton.cdiv(lanes // LANES, blocks))
    out = torch.empty(count, out_features, dtype=x.dtype, device=x.device)
    parts = make_parts(out, splits)
    with torch.cuda.device_of(x):
        _gemv_kernel[(triton.cdiv(out_features, rows), triton.cdiv(count, batch), splits)](
            parts,
            x.contiguous(),
            words,
            scale.contiguous(),
            zero_point.contiguous(),
            count,
            out_features,
            in_features,
            lanes,
            scale.shape[1],
            BITS=bits,
            GROUP=0 if group_size in (-1, in_features) else group_size,
            WHOLE=in_features % BLOCK == 0,
            BATCH=batch,
            ROWS=rows,
            BLOCKS=blocks,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return add_parts(parts, out)


@triton.jit
def _gemv_kernel(
    out_ptr,
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_point_ptr,
    count,
    out_features,
    in_features,
    lanes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Axes of every tile: [BATCH, ROWS, BLOCKS, lanes of a block]. With other ranks Triton would change layouts."""
    PER_WORD: tl.constexpr = 32 // BITS
    HALF: tl.constexpr = PER_WORD // 2
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :, None, None]
    m = (tl.program_id(1) * BATCH + tl.arange(0, BATCH))[:, None, None, None]
    step = tl.arange(0, BLOCKS)[None, None, :, None]
    w = tl.arange(0, _LANES)[None, None, None, :]
    row = tl.minimum(n, out_features - 1).to(tl.int64)  # surplus rows repeat the last one and are not stored
    x_row = tl.minimum(m, count - 1).to(tl.int64)
    blocks = lanes // _LANES
    share = tl.cdiv(tl.cdiv(blocks, BLOCKS), tl.num_programs(2)) * BLOCKS
    first = tl.program_id(2) * share
    y = tl.zeros((BATCH, ROWS, BLOCKS, 1), dtype=tl.float32)
    for start in range(first, tl.minimum(first + share, blocks), BLOCKS):
        block = start + step
        live = block < blocks
        word_ptr = words_ptr + row * (BITS * lanes) + (block * _LANES + w)
        x_column = block * _BLOCK + w
        q_x = tl.zeros((BATCH, ROWS, BLOCKS, _LANES), dtype=tl.float32)
        sum_x = tl.zeros((BATCH, 1, BLOCKS, _LANES), dtype=tl.float32)
        top_30 = tl.zeros((1, ROWS, BLOCKS, _LANES), dtype=tl.uint32)
        top_31 = tl.zeros((1, ROWS, BLOCKS, _LANES), dtype=tl.uint32)
        for field in tl.static_range(32):
            if field < PER_WORD * BITS:
                if field % PER_WORD == 0:
                    word = tl.load(word_ptr + field // PER_WORD * lanes, mask=live, other=0)
                    word = word.to(tl.uint32, bitcast=True)
                    if BITS == 3:
                        if field == 0:
                            top_30 = word >> 30
                        elif field == PER_WORD:
                            top_31 = word >> 30
                        else:
                            top_30 |= (word >> 28) & 4
                            top_31 |= (word >> 29) & 4
                if field % PER_WORD == HALF:
                    word = word >> (HALF * BITS)
                q = word & (((1 << BITS) - 1) << _position(field, BITS))
            else:
                q = top_30 if field == 30 else top_31
            column = x_column + field * _LANES
            mask = live if WHOLE else column < in_features
            x = tl.load(x_ptr + x_row * in_features + column, mask=mask, other=0.0).to(tl.float32)
            sum_x += x
            q_x += q.to(tl.float32, bitcast=True) * (x * 2.0 ** (75 - _position(field, BITS)))
            if _ends_group(field, GROUP):
                group = tl.zeros_like(block) if GROUP == 0 else (block * _BLOCK + field * _LANES) // GROUP
                place = row * groups + group
                inside = live & (group < groups)
                scale = tl.load(scale_ptr + place, mask=inside, other=0.0).to(tl.float32)
                zero_point = tl.load(zero_point_ptr + place, mask=inside, other=0).to(tl.float32)
                group_q_x = tl.sum(q_x, axis=3, keep_dims=True) * 2.0**74
                y += scale * (group_q_x - zero_point * tl.sum(sum_x, axis=3, keep_dims=True))
                q_x = tl.zeros((BATCH, ROWS, BLOCKS, _LANES), dtype=tl.float32)
                sum_x = tl.zeros((BATCH, 1, BLOCKS, _LANES), dtype=tl.float32)
    total = tl.sum(y, axis=2, keep_dims=True)
    place = (tl.program_id(2).to(tl.int64) * count + m) * out_features + n
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=(m < count) & (n < out_features))


@triton.constexpr_function
def _position(field, bits):
    """The bit at which a field lies once the upper half of its word has been shifted down."""
    per_word = 32 // bits
    return field % per_word % (per_word // 2) * bits if field < per_word * bits else 0


@triton.constexpr_function
def _ends_group(field, group):
    """Whether a group, or the part of one that is in a block, ends with this field."""
    return field == FIELDS - 1 or (group in (16, 32) and (field + 1) * LANES % group == 0)
