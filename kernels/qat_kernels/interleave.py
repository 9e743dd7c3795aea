"""The run-time layout of packed codes for small batches, made once from the checkpoint's layout.

A block is 64 consecutive columns of a row, held by two lanes of `bits` words each: field f of lane w is column 2 f + w
of the block, f = 0 .. 31. A thread that loads the two words of a block meets two neighbouring activations in every
step, neighbouring threads read neighbouring words, and a group of 16, 32 or 64 columns is a run of whole fields.

Word j of a lane holds the fields j F .. j F + F - 1, F = 32 // bits, lowest bits first. For 2, 4 and 8 bits that is
all. 3 bits have 10 fields in each of 3 words, and the 2 bits left at the top of each word make two more: field 30 is
bits 30 and 31 of word 0 below bit 30 of word 2, field 31 is bits 30 and 31 of word 1 below bit 31 of word 2. (A 2-bit
and a 1-bit plane would cost one more mask and one more multiply-add per weight.)

The tensor is int32 [N, bits, U], U = 2 ceil(K / 64), padded with zeros: as many bytes as the packed checkpoint if 64
divides K.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qat_kernels.bitstream import unpack

BLOCK = 64
"""Columns per block."""

LANES = 2
"""Words of a block that lie side by side."""

FIELDS = BLOCK // LANES
"""Columns per lane."""

ROWS_AT_A_TIME = 256
"""Rows expanded at a time, which bounds the scratch memory."""


def lanes_per_row(in_features: int) -> int:
    """U: words of a row in each of its `bits` planes."""
    return -(-in_features // BLOCK) * LANES


def interleave(packed: Tensor, *, bits: int, in_features: int) -> Tensor:
    """Packed codes int32 [N, ceil(K * bits / 32)] in the run-time layout, int32 [N, bits, U]."""
    rows, lanes = packed.shape[0], lanes_per_row(in_features)
    words = torch.empty(rows, bits, lanes, dtype=torch.int32, device=packed.device)
    for start in range(0, rows, ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        words[part] = _words(unpack(packed[part], bits=bits, length=in_features), bits=bits, lanes=lanes)
    return words


def deinterleave(words: Tensor, *, bits: int, in_features: int) -> Tensor:
    """The inverse of `interleave`, to codes uint8 [N, K]."""
    rows, _, lanes = words.shape
    fields = torch.stack([_field(words, field, bits) for field in range(FIELDS)], dim=1)
    codes = fields.view(rows, FIELDS, lanes // LANES, LANES).transpose(1, 2)
    return codes.reshape(rows, -1)[:, :in_features].to(torch.uint8)


def _words(codes: Tensor, *, bits: int, lanes: int) -> Tensor:
    rows, in_features = codes.shape
    padded = pad(codes, (0, lanes * FIELDS - in_features))
    fields = padded.view(rows, -1, FIELDS, LANES).transpose(1, 2).reshape(rows, FIELDS, lanes).int()
    words = torch.zeros(rows, bits, lanes, dtype=torch.int32, device=codes.device)
    per_word = 32 // bits
    for field in range(per_word * bits):
        words[:, field // per_word] |= fields[:, field] << field % per_word * bits
    if bits == 3:
        words[:, 0] |= fields[:, 30] << 30
        words[:, 1] |= fields[:, 31] << 30
        words[:, 2] |= (fields[:, 30] >> 2) << 30 | (fields[:, 31] >> 2) << 31
    return words


def _field(words: Tensor, field: int, bits: int) -> Tensor:
    per_word = 32 // bits
    if field < per_word * bits:
        return words[:, field // per_word] >> field % per_word * bits & (1 << bits) - 1
    return words[:, field - 30] >> 30 & 3 | (words[:, 2] >> field & 1) << 2
