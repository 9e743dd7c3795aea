"""Tiles of a packed weight in registers: what the kernels with a matrix product share.

A tile is [ROWS, COLUMNS], powers of two, COLUMNS a multiple of 32, its first column a multiple of COLUMNS. Each packed
word is loaded once and its fields are spread over a new axis; at 3 bits three words hold 32 fields.
"""

import torch
import triton
import triton.language as tl


def operand(dtype: torch.dtype) -> tl.dtype:
    """The type in which tensors of dtype enter `tl.dot`.

    Their own, but for bf16 in the interpreter, which would multiply bit patterns; products of bf16 are exact in fp32.
    """
    if dtype == torch.bfloat16 and not triton.knobs.runtime.interpret:
        return tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


@triton.jit
def load_code_tile(packed_ptr, row, first, words, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes int32 [ROWS, COLUMNS] of the rows `row` int64 [ROWS] from column `first`; 0 beyond the last word."""
    if BITS == 3:
        word = first // 32 * 3 + tl.arange(0, COLUMNS // 32) * 3
        word_ptr = packed_ptr + row[:, None] * words + word[None, :]
        word_0 = tl.load(word_ptr, mask=(word < words)[None, :], other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        word_1 = tl.load(word_ptr + 1, mask=(word + 1 < words)[None, :], other=0).to(tl.uint32, bitcast=True)
        word_2 = tl.load(word_ptr + 2, mask=(word + 2 < words)[None, :], other=0).to(tl.uint32, bitcast=True)
        low = word_0 | word_1.to(tl.uint64) << 32  # holds the values 0 .. 15 of 32
        high = word_1.to(tl.uint64) | word_2.to(tl.uint64) << 32  # and this the values 16 .. 31
        field = tl.arange(0, 32)[None, None, :]
        shift = tl.where(field < 16, field * 3, field * 3 - 32).to(tl.uint64)
        codes = (tl.where(field < 16, low[:, :, None], high[:, :, None]) >> shift) & 7
    else:
        FIELDS: tl.constexpr = 32 // BITS
        word = first // FIELDS + tl.arange(0, COLUMNS // FIELDS)
        packed = tl.load(packed_ptr + row[:, None] * words + word[None, :], mask=(word < words)[None, :], other=0)
        shift = (tl.arange(0, FIELDS) * BITS).to(tl.uint32)
        codes = (packed.to(tl.uint32, bitcast=True)[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    return codes.to(tl.int32).reshape(ROWS, COLUMNS)


@triton.jit
def load_group_tile(
    ptr, row, first, groups, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr
):
    """The scale or zero point of every weight of a tile, broadcast to [ROWS, COLUMNS] in DTYPE; 0 beyond the groups."""
    if GROUP % COLUMNS == 0:
        tile = tl.load(ptr + row * groups + first // GROUP).to(DTYPE)[:, None].broadcast_to(ROWS, COLUMNS)
    elif COLUMNS % GROUP == 0:
        COUNT: tl.constexpr = COLUMNS // GROUP
        group = first // GROUP + tl.arange(0, COUNT)
        tile = tl.load(ptr + row[:, None] * groups + group[None, :], mask=(group < groups)[None, :], other=0).to(DTYPE)
        tile = tile[:, :, None].broadcast_to(ROWS, COUNT, GROUP).reshape(ROWS, COLUMNS)
    else:
        group = (first + tl.arange(0, COLUMNS)) // GROUP
        tile = tl.load(ptr + row[:, None] * groups + group[None, :], mask=(group < groups)[None, :], other=0).to(DTYPE)
    return tile


@triton.jit
def load_weight_tile(
    packed_ptr,
    scale_ptr,
    zero_point_ptr,
    row,
    first,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Weights (q - z) s [ROWS, COLUMNS], computed in fp32 and rounded once to DTYPE as `dequantize` does.

    Columns beyond in_features hold anything finite.
    """
    code = load_code_tile(packed_ptr, row, first, words, BITS, ROWS, COLUMNS)
    zero_point = load_group_tile(zero_point_ptr, row, first, groups, GROUP, ROWS, COLUMNS, tl.int32)
    scale = load_group_tile(scale_ptr, row, first, groups, GROUP, ROWS, COLUMNS, tl.float32)
    return ((code - zero_point).to(tl.float32) * scale).to(DTYPE)
