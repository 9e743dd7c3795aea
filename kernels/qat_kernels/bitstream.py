"""Dense bit-packing: value i of a row occupies bits [i * b, (i + 1) * b) of the row's little-endian stream.

The stream is cut into 32-bit words, lowest bits first, and padded with zeros (docs/export-formats.md): the
layout of GPTQ along its axis and of compressed-tensors "pack-quantized".

Eight values of b bits are exactly b bytes, whatever b is. Read as one 64-bit integer (a lane), eight uint8 codes
become b bytes by closing the gaps between neighbours, then between pairs, then between quadruples; unpacking opens the
gaps in the opposite order. So three shift-or-mask steps serve 2, 3 and 4 bits alike, with no special case for 3, and
8 bits are the bytes themselves. A little-endian host is assumed.
"""

import torch
from torch import Tensor

VALUES = 8
"""Values per lane."""


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Pack codes uint8 [R, C], each below 2**bits, into int32 [R, ceil(C * bits / 32)]."""
    rows, length = codes.shape
    words = words_per_row(length, bits)
    padded = torch.zeros(rows, -(-length // 32) * 32, dtype=torch.uint8, device=codes.device)
    padded[:, :length] = codes
    if bits < 8:
        lanes = padded.view(torch.int64)
        for count in (1, 2, 4):
            gap = (8 - bits) * count
            lanes.bitwise_or_(lanes >> gap).bitwise_and_(_fields(2 * count * bits, every=16 * count))
        padded = padded.view(rows, -1, VALUES)[:, :, :bits].reshape(rows, -1)
    return padded.view(torch.int32)[:, :words].contiguous()


def unpack(packed: Tensor, *, bits: int, length: int) -> Tensor:
    """Unpack the first length values of each row of packed int32 [R, W] into uint8 [R, length]."""
    packed = packed.contiguous().view(-1).view(packed.shape)  # a column's strides count as contiguous, but are not 1
    if bits == 8:
        return packed.view(torch.uint8)[:, :length].clone(memory_format=torch.contiguous_format)
    lanes = _lanes(packed, bits=bits, count=-(-length // VALUES))
    for count in (4, 2, 1):
        gap = (8 - bits) * count
        lanes.bitwise_or_(lanes << gap).bitwise_and_(_fields(count * bits, every=8 * count))
    return lanes.view(torch.uint8)[:, :length].contiguous()


def words_per_row(length: int, bits: int) -> int:
    """32-bit words that length values of the given width fill: ceil(length * bits / 32)."""
    return -(-length * bits // 32)


def _fields(width: int, *, every: int) -> int:
    """64-bit mask of the lowest width bits in each stretch of `every` bits."""
    return sum(((1 << width) - 1) << start for start in range(0, 64, every))


def _lanes(packed: Tensor, *, bits: int, count: int) -> Tensor:
    """The first count runs of `bits` bytes of each row, each zero-extended to one int64: [R, count]."""
    if bits in (2, 4):
        run_dtype = torch.uint16 if bits == 2 else torch.uint32
        return packed.view(run_dtype)[:, :count].to(torch.int64)
    rows = packed.shape[0]
    stream = packed.view(torch.uint8)
    lanes = torch.zeros(rows, count, dtype=torch.int64, device=packed.device)
    runs = lanes.view(torch.uint8).view(rows, count, VALUES)
    for i in range(bits):
        column = stream[:, i : count * bits : bits]  # the last run may be cut short by the end of the row
        runs[:, : column.shape[1], i] = column
    return lanes
