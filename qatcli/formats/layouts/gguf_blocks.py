"""ggml blocks that carry (q - z) * s without requantizing. Rows are cut into blocks; little endian; d, m are fp16.

    Q4_0  32 values  18 B  d | qs[16]               w = (u - 8) d          u = q - z + 8      (2, 3 bits; 4 if z = 8)
    Q4_1  32         20 B  d | m | qs[16]           w = u d + m            u = q, m = -s z    (m rounds to fp16)
    Q5_0  32         22 B  d | qh uint32 | qs[16]   w = (u - 16) d         u = q - z + 16     (up to 4 bits)
    Q8_0  32         34 B  d | int8[32]             w = v d                v = q - z          (if it fits int8)
    Q2_0  64         18 B  d | qs[16]               w = (u - 1) d          z = 1: u = q;  z = 2: u = 3 - q, d = -s
    Q2_K  256        84 B  sc[16] | qs[64] | d | dmin      w = d sc u - dmin m    sc = 1, m = z  (groups of 256 n)
    Q4_K  256       144 B  d | dmin | sc[12] | qs[128]     w = d sc u - dmin m    sc = 1, m = z  (groups of 256 n)

Q4_0, Q4_1, Q5_0: byte j of qs holds value j (low nibble) and j + 16 (high nibble); bit j of qh is bit 4 of value j.
Q2_0: value j is in byte j // 4 at shift 2 (j % 4).
Q2_K: sc byte i serves values 16 i..16 i + 15 as scale | min << 4; qs has two halves of 128 values, byte l of a half
holds values l, l + 32, l + 64, l + 96 at shifts 0, 2, 4, 6.
Q4_K: 8 sub-blocks of 32 with 6-bit scales and mins; with every value below 16 the 12 bytes are
sc_0..sc_3 | m_0..m_3 | (sc_4 | m_4 << 4)..(sc_7 | m_7 << 4). qs has four chunks of 64 values, byte l of a chunk holds
values l and l + 32.
Source: ggml-common.h, ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F16 = NDArray[np.float16]


@dataclass(frozen=True)
class BlockType:
    """One ggml type: its id, values and bytes per block, and its encoder."""

    type_id: int
    length: int
    bytes: int
    encode: Callable[[U8, U8, F16], U8]


def q4_0(codes: U8, zero_point: U8, scale: F16) -> U8:
    """Blocks [N, K / 32 * 18]. Raises ValueError when q - z + 8 leaves 0..15."""
    u = _shifted(codes, zero_point, 8, 15)
    return _rows(_per_block(scale, u, 32), _nibbles(u))


def q4_1(codes: U8, zero_point: U8, scale: F16) -> U8:
    """Blocks [N, K / 32 * 20]; the offset -s z is rounded to fp16."""
    if codes.max(initial=0) > 15:
        raise ValueError("Q4_1 holds 4-bit codes")
    offset = (-scale.astype(np.float32) * zero_point).astype(np.float16)
    return _rows(_per_block(scale, codes, 32), _per_block(offset, codes, 32), _nibbles(codes))


def q5_0(codes: U8, zero_point: U8, scale: F16) -> U8:
    """Blocks [N, K / 32 * 22]. Raises ValueError when q - z + 16 leaves 0..31."""
    u = _shifted(codes, zero_point, 16, 31)
    high = np.packbits((u >> np.uint8(4)).reshape(len(u), -1, 32), axis=-1, bitorder="little")
    return _rows(_per_block(scale, u, 32), high, _nibbles(u & np.uint8(15)))


def q8_0(codes: U8, zero_point: U8, scale: F16) -> U8:
    """Blocks [N, K / 32 * 34]. Raises ValueError when q - z leaves -128..127."""
    v = codes.astype(np.int16) - _columns(zero_point, codes).astype(np.int16)
    if v.min(initial=0) < -128 or v.max(initial=0) > 127:
        raise ValueError("Q8_0 holds q - z in -128..127")
    return _rows(_per_block(scale, codes, 32), v.astype(np.int8).view(np.uint8).reshape(len(v), -1, 32))


def q2_0(codes: U8, zero_point: U8, scale: F16) -> U8:
    """Blocks [N, K / 64 * 18]. Raises ValueError unless codes are 2-bit and every zero point is 1 or 2."""
    if codes.max(initial=0) > 3 or not np.isin(zero_point, (1, 2)).all():
        raise ValueError("Q2_0 holds 2-bit codes with zero points 1 or 2")
    u = np.where(_columns(zero_point, codes) == 2, 3 - codes, codes).astype(np.uint8)
    d = np.where(zero_point == 2, -scale, scale)
    fields = u.reshape(len(u), -1, 16, 4) << np.array([0, 2, 4, 6], np.uint8)
    return _rows(_per_block(d, u, 64), np.bitwise_or.reduce(fields, axis=-1))


def q2_k(codes: U8, zero_point: U8, scale: F16) -> U8:
    """Blocks [N, K / 256 * 84]. Raises ValueError unless codes are 2-bit and groups are multiples of 256."""
    if codes.max(initial=0) > 3:
        raise ValueError("Q2_K holds 2-bit codes")
    d = _per_block(scale, codes, 256)
    mins = _per_value(zero_point, codes, 256)
    scales = np.repeat((np.uint8(1) | mins << np.uint8(4))[..., None], 16, axis=-1)
    fields = codes.reshape(len(codes), -1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    qs = np.bitwise_or.reduce(fields, axis=3)
    return _rows(scales, qs.reshape(*qs.shape[:2], 64), d, d)


def q4_k(codes: U8, zero_point: U8, scale: F16) -> U8:
    """Blocks [N, K / 256 * 144]. Raises ValueError unless codes fit 4 bits and groups are multiples of 256."""
    if codes.max(initial=0) > 15:
        raise ValueError("Q4_K holds 4-bit codes")
    d = _per_block(scale, codes, 256)
    mins = _per_value(zero_point, codes, 256)[..., None]
    ones = np.ones_like(mins)
    scales = np.concatenate([part.repeat(4, -1) for part in (ones, mins, ones | mins << np.uint8(4))], axis=-1)
    halves = codes.reshape(len(codes), -1, 4, 2, 32)
    qs = halves[..., 0, :] | halves[..., 1, :] << np.uint8(4)
    return _rows(d, d, scales, qs.reshape(*qs.shape[:2], 128))


TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(2, 32, 18, q4_0),
    "Q4_1": BlockType(3, 32, 20, q4_1),
    "Q5_0": BlockType(6, 32, 22, q5_0),
    "Q8_0": BlockType(8, 32, 34, q8_0),
    "Q2_K": BlockType(10, 256, 84, q2_k),
    "Q4_K": BlockType(12, 256, 144, q4_k),
    "Q2_0": BlockType(42, 64, 18, q2_0),
}


def choose_type(codes: U8, zero_point: U8, *, bits: int, exact: bool = False) -> str | None:
    """The smallest block type that carries this linear, or None when no type does.

    4-bit asymmetric codes go to Q4_1, whose offset is rounded by half an fp16 ulp, unless `exact` asks for Q5_0.
    """
    columns = codes.shape[1]
    group = columns // zero_point.shape[1]
    if columns % 32 or group % 32:
        return None
    if bits == 2 and group % 64 == 0 and np.isin(zero_point, (1, 2)).all():
        return "Q2_0"
    if group % 256 == 0 and bits == 2:
        return "Q2_K"
    if bits <= 3 or (bits == 4 and bool(np.all(zero_point == 8))):
        return "Q4_0"
    if bits == 4:
        return "Q4_K" if group % 256 == 0 else "Q5_0" if exact else "Q4_1"
    difference = codes.astype(np.int16) - _columns(zero_point, codes)
    return "Q8_0" if difference.min() >= -128 and difference.max() <= 127 else None


def accepts(name: str, codes: U8, zero_point: U8, scale: F16) -> bool:
    """True when the block type `name` can hold this linear."""
    try:
        TYPES[name].encode(codes, zero_point, scale)
    except ValueError:
        return False
    return True


def _columns(values: NDArray[Any], codes: U8) -> NDArray[Any]:
    """Per-group values [N, G] repeated for every column [N, K]."""
    return np.repeat(values, codes.shape[1] // values.shape[1], axis=1)


def _shifted(codes: U8, zero_point: U8, offset: int, highest: int) -> U8:
    u = codes.astype(np.int16) - _columns(zero_point, codes).astype(np.int16) + offset
    if u.min(initial=0) < 0 or u.max(initial=0) > highest:
        raise ValueError(f"q - z + {offset} leaves 0..{highest}")
    return u.astype(np.uint8)


def _per_value(values: NDArray[Any], codes: U8, length: int) -> NDArray[Any]:
    """Per-group values repeated for every block of `length` columns: [N, K / length]."""
    group = codes.shape[1] // values.shape[1]
    if group % length:
        raise ValueError(f"groups of {group} columns are not whole blocks of {length}")
    return np.repeat(values, group // length, axis=1)


def _per_block(values: F16, codes: U8, length: int) -> U8:
    """The bytes of one fp16 per block: uint8 [N, K / length, 2]."""
    repeated = np.ascontiguousarray(_per_value(values, codes, length)).astype("<f2")
    return repeated.view(np.uint8).reshape(*repeated.shape, 2)


def _nibbles(u: U8) -> U8:
    halves = u.reshape(len(u), -1, 2, 16)
    return halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)


def _rows(*parts: U8) -> U8:
    """Concatenate the parts of each block, then the blocks of each row."""
    blocks = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(blocks.reshape(blocks.shape[0], -1))
