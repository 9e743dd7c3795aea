"""Independent readers: from the arrays of one linear in a file back to (codes, zero_point, scale).

Written from the format descriptions (docs/export-formats.md) and deliberately sharing no code with the packers in
`qatcli.formats.layouts`: those shift and or whole words, these expand the bytes into single bits and gather them.
Used to verify every export and to import checkpoints made by other tools.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
Words = NDArray[Any]  # integer arrays as stored: int32 words or int8 bytes
_ROW_CHUNK = 512  # bounds the eightfold blow-up of single bits
_AWQ_COLUMN_OF_NIBBLE = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@dataclass(frozen=True)
class Triple:
    """Codes uint8 [N, K], zero points uint8 [N, G], scales [N, G] as they were found in a file."""

    codes: U8
    zero_point: U8
    scale: NDArray[Any]


def stream(words: Words, bits: int, length: int) -> U8:
    """Read `length` values of `bits` bits from a dense little-endian stream along the last axis of [R, C]."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if raw.shape[1] * 8 < length * bits:
        raise ValueError(f"{raw.shape[1]} bytes hold fewer than {length} values of {bits} bits")
    weights: U8 = (1 << np.arange(bits)).astype(np.uint8)
    out = np.empty((len(raw), length), np.uint8)
    for start in range(0, len(raw), _ROW_CHUNK):
        single = np.unpackbits(raw[start : start + _ROW_CHUNK], axis=1, bitorder="little", count=length * bits)
        out[start : start + _ROW_CHUNK] = single.reshape(len(single), length, bits) @ weights
    return out


def ten_per_word(words: Words, length: int) -> U8:
    """EfficientQAT's 3-bit words along the last axis: ten values in the low 30 bits, two bits unused."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1, 4)
    single = np.unpackbits(raw, axis=2, bitorder="little")[:, :, :30].reshape(len(raw), -1, 3)
    return np.ascontiguousarray((single @ np.array([1, 2, 4], np.uint8))[:, :length])


def gptq(qweight: Words, qzeros: Words, scales: NDArray[Any], *, bits: int, stored_minus_one: bool = False) -> Triple:
    """GPTQ: qweight [K*b/32, N], qzeros [G, N*b/32], scales [G, N]; `stored_minus_one` for the v1 convention."""
    groups, rows = scales.shape
    codes = stream(np.ascontiguousarray(qweight.T), bits, len(qweight) * 32 // bits)
    zero = stream(_plus_one(qzeros, bits) if stored_minus_one else qzeros, bits, rows)
    if stored_minus_one and bits == 3:
        zero = (zero + np.uint8(1)) & np.uint8(7)  # 3-bit fields cross words, so every reader adds per field
    if zero.shape[0] != groups:
        raise ValueError(f"qzeros has {zero.shape[0]} groups, scales {groups}")
    return Triple(codes, np.ascontiguousarray(zero.T), np.ascontiguousarray(scales.T))


def efficientqat_3bit(qweight: Words, qzeros: Words, scales: NDArray[Any], *, in_features: int) -> Triple:
    """EfficientQAT native 3 bits: qweight [ceil(K/10), N], qzeros [G, ceil(N/10)], zero points as they are.

    2, 4 and 8 bits are GPTQ version 2, bit for bit. Source: EfficientQAT quantize/int_linear_real.py.
    """
    codes = ten_per_word(np.ascontiguousarray(qweight.T), in_features)
    zero = ten_per_word(qzeros, scales.shape[1])
    return Triple(codes, np.ascontiguousarray(zero.T), np.ascontiguousarray(scales.T))


def awq(qweight: Words, qzeros: Words, scales: NDArray[Any]) -> Triple:
    """AWQ GEMM: qweight [K, N/8], qzeros [G, N/8], scales [G, N]."""
    codes, zero = (_awq_columns(words) for words in (qweight, qzeros))
    return Triple(np.ascontiguousarray(codes.T), np.ascontiguousarray(zero.T), np.ascontiguousarray(scales.T))


def bitblas(qweight: Words, qzeros: Words, scales: NDArray[Any], *, bits: int) -> Triple:
    """BitBLAS: qweight int8 [N, K*b/8] (LOP3-interleaved for 2 and 4 bits), qzeros int8 [G, N*b/8], scales [N, G].

    `bits` is the container's width: 4 for 3-bit models.
    """
    rows = len(scales)
    codes = stream(qweight, bits, qweight.shape[1] * 8 // bits)
    if bits != 8:
        codes = codes.reshape(rows, -1, 32 // bits)[:, :, _lop3_slots(bits)].reshape(rows, -1)
    zero = stream(qzeros, bits, rows)
    return Triple(np.ascontiguousarray(codes), np.ascontiguousarray(zero.T), scales)


def pack_quantized(packed: Words, zero_point: Words, scale: NDArray[Any], *, bits: int, in_features: int) -> Triple:
    """compressed-tensors: packed [N, ceil(K*b/32)], zero_point [ceil(N*b/32), G], scale [N, G]."""
    zero = stream(np.ascontiguousarray(zero_point.T), bits, len(scale))
    return Triple(stream(packed, bits, in_features), np.ascontiguousarray(zero.T), scale)


def mlx(weight: Words, scales: NDArray[Any], biases: NDArray[Any], *, bits: int) -> Triple:
    """MLX affine: weight uint32 [N, K*b/32], scales [N, G], biases [N, G], the rounding of -s z for integers z."""
    codes = stream(weight, bits, weight.shape[1] * 32 // bits)
    exact = scales.astype(np.float64)
    zero = np.rint(np.divide(-biases.astype(np.float64), exact, out=np.full_like(exact, -1.0), where=exact != 0))
    outside = (zero < 0) | (zero >= 1 << bits) | ((-zero * exact).astype(biases.dtype) != biases)
    if outside.any():
        raise ValueError(f"{np.count_nonzero(outside)} of {zero.size} biases are no multiples of their scales")
    return Triple(codes, zero.astype(np.uint8), scales)


def _plus_one(words: Words, bits: int) -> Words:
    """Undo v1's `word -= 0x01..01` on whole words, exact modulo 2^32 even where a zero point of 0 borrowed."""
    if bits == 3:
        return words
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return words.view(np.uint32) + ones


def _awq_columns(words: Words) -> U8:
    nibbles = stream(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)
    out = np.empty_like(nibbles)
    out[:, :, _AWQ_COLUMN_OF_NIBBLE] = nibbles
    return out.reshape(len(words), -1)


def _lop3_slots(bits: int) -> NDArray[np.int64]:
    """Where value i of an interleaved 32-bit word sits, counted in fields from the low end.

    Even values fill the low half word in order, odd values the high one; for 2 bits the two middle bytes are swapped.
    """
    per_half = 16 // bits
    value = np.arange(2 * per_half)
    slots = value % 2 * per_half + value // 2
    if bits == 2:
        byte = np.array([0, 2, 1, 3])[slots // 4]
        slots = byte * 4 + slots % 4
    return slots
