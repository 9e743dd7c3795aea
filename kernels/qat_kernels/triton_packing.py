"""Triton versions of `bitstream.pack` and `bitstream.unpack`. The layout is described in `bitstream`.

A program handles a stretch of one row. Nothing is special about 3 bits but that a value may lie across two words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat_kernels.bitstream import words_per_row
from qat_kernels.tiles import row_tile


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """See `bitstream.pack`."""
    rows, length = codes.shape
    words = words_per_row(length, bits)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    tile = row_tile(words)
    with torch.cuda.device_of(codes):
        _pack_kernel[(rows, triton.cdiv(words, tile))](
            packed, codes.contiguous(), length, words, BITS=bits, TILE=tile, enable_fp_fusion=False
        )
    return packed


def unpack(packed: Tensor, *, bits: int, length: int) -> Tensor:
    """See `bitstream.unpack`."""
    rows, words = packed.shape
    codes = torch.empty(rows, length, dtype=torch.uint8, device=packed.device)
    tile = row_tile(length)
    with torch.cuda.device_of(packed):
        _unpack_kernel[(rows, triton.cdiv(length, tile))](
            codes, packed.contiguous(), length, words, BITS=bits, TILE=tile, enable_fp_fusion=False
        )
    return codes


@triton.jit
def load_codes(packed_row_ptr, column, length, words, BITS: tl.constexpr):
    """Codes int32 of the given columns of one packed row of `words` words; 0 beyond length."""
    mask = column < length
    word = column * BITS // 32
    shift = (column * BITS % 32).to(tl.uint32)
    low = tl.load(packed_row_ptr + word, mask=mask, other=0).to(tl.uint32, bitcast=True)
    code = low >> shift
    if 32 % BITS != 0:
        across = mask & (shift + BITS > 32) & (word + 1 < words)
        high = tl.load(packed_row_ptr + word + 1, mask=across, other=0).to(tl.uint32, bitcast=True)
        code |= (high << 1) << (31 - shift)  # in two steps: a shift by 32, for shift = 0, is undefined
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _unpack_kernel(codes_ptr, packed_ptr, length, words, BITS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    codes = load_codes(packed_ptr + row * words, column, length, words, BITS)
    tl.store(codes_ptr + row * length + column, codes.to(tl.uint8), mask=column < length)


@triton.jit
def _pack_kernel(packed_ptr, codes_ptr, length, words, BITS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * TILE + tl.arange(0, TILE)
    first = word * 32 // BITS  # the first value with a bit in the word
    packed = tl.zeros((TILE,), dtype=tl.uint32)
    for i in tl.static_range(32 // BITS if 32 % BITS == 0 else 32 // BITS + 2):  # 2 more: cut by the word's ends
        column = first + i
        shift = column * BITS - word * 32  # negative for a value that began in the word before
        mask = (column < length) & (shift < 32)
        code = tl.load(codes_ptr + row * length + column, mask=mask, other=0).to(tl.uint32)
        left = tl.minimum(tl.maximum(shift, 0), 31).to(tl.uint32)
        right = tl.maximum(-shift, 0).to(tl.uint32)
        packed |= (code >> right) << left
    tl.store(packed_ptr + row * words + word, packed.to(tl.int32, bitcast=True), mask=word < words)
