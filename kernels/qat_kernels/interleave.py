"""The run-time layout of packed codes for small batches, made once from the checkpoint's layout.

A block is 64 consecutive columns of a row, held by eight lanes of `bits` bytes each: field f of lane w is column
8 f + w of the block, f = 0 .. 7, lowest bits first. A thread that owns a block reads its codes and its activations in
pieces of 8 to 16 bytes: in step f it meets 8 neighbouring activations, one for each lane. A group of 16, 32 or 64
columns is a run of whole fields.

Lanes are stored in planes of 16 bits, so that eight of them are as many bytes as eight activations: one plane for 2-bit
codes, two for 4 and four for 8 bits; 3 bits have one of 16 and one of 8. (With planes of 32 bits Triton shuffles words
between threads.) A row holds its planes one after the other, each over all of its lanes.

The tensor is int32 [N, 2 bits ceil(K / 64)], padded with zeros: as many bytes as the packed checkpoint if 64 divides K.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qat_kernels import bitstream

BLOCK = 64
"""Columns per block."""

LANES = 8
"""Lanes of a block that lie side by side."""

FIELDS = BLOCK // LANES
"""Columns per lane."""

PLANES = {2: (2,), 3: (2, 1), 4: (2, 2), 8: (2, 2, 2, 2)}
"""Bytes of a lane in each plane, by bits."""

ROWS_AT_A_TIME = 256
"""Rows expanded at a time, which bounds the scratch memory."""


def words_per_row(in_features: int, bits: int) -> int:
    """int32 words of a row, its last block filled up."""
    return bitstream.words_per_row(-(-in_features // BLOCK) * BLOCK, bits)


def interleave(packed: Tensor, *, bits: int, in_features: int) -> Tensor:
    """Packed codes int32 [N, ceil(K * bits / 32)] in the run-time layout, int32 [N, 2 bits ceil(K / 64)]."""
    rows = packed.shape[0]
    words = torch.empty(rows, words_per_row(in_features, bits), dtype=torch.int32, device=packed.device)
    for start in range(0, rows, ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        words[part] = _words(bitstream.unpack(packed[part], bits=bits, length=in_features), bits)
    return words


def _words(codes: Tensor, bits: int) -> Tensor:
    rows, in_features = codes.shape
    fields = pad(codes, (0, -in_features % BLOCK)).view(rows, -1, FIELDS, LANES).transpose(2, 3).long()
    values = (fields << bits * torch.arange(FIELDS, device=codes.device)).sum(-1)  # no two fields share a bit
    lanes = values.contiguous().view(torch.uint8).view(rows, -1, 8)[..., :bits]  # little-endian
    planes = [plane.reshape(rows, -1) for plane in lanes.split(PLANES[bits], dim=2)]
    return torch.cat(planes, dim=1).view(torch.int32)
