"""BitBLAS tensors of one linear, as GPTQModel's BitBLAS kernel loads them (no repacking, no ladder propagation).

    X.qweight int8 [N, K*b/8]  codes along K, lowest bits first in a byte; 2 and 4 bits LOP3-interleaved
    X.qzeros  int8 [G, N*b/8]  zero points along N, lowest bits first, not interleaved ("zeros" before GPTQModel 5)
    X.scales  fp16 [N, G]      not transposed, unlike GPTQ

LOP3 interleave for 16-bit activations, per little-endian uint32 word with n = 32 / b fields f_i:
    out = OR_i f_i << ((i % 2) * 16 + (i // 2) * b);  for b = 2 additionally swap bytes 1 and 2 of out.
8 bits are not interleaved. 3 bits do not exist: the codes ride unchanged in a 4-bit container.
Source: microsoft/BitBLAS LOP3Permutate; written with numpy because importing bitblas needs a GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]


def container_bits(bits: int) -> int:
    """Bits one code takes in the file: 3 goes into 4."""
    return 4 if bits == 3 else bits


def pack_linear(
    codes: NDArray[np.uint8],
    zero_point: NDArray[np.uint8],
    scale: NDArray[np.float16],
    *,
    bits: int,
    zeros_name: str = "qzeros",
) -> Arrays:
    """The BitBLAS arrays of one linear. Raises ValueError when a row of codes is not whole words."""
    width = container_bits(bits)
    rows, columns = codes.shape
    if columns * width % 32 or rows * width % 8:
        raise ValueError(f"BitBLAS needs rows of whole 32-bit words, got [{rows}, {columns}] at {width} bits")
    return {
        "qweight": _interleave(_compress(codes, width), width).view(np.int8),
        zeros_name: _compress(np.ascontiguousarray(zero_point.T), width).view(np.int8),
        "scales": scale,
    }


def _compress(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    per_byte = 8 // bits
    fields = values.reshape(values.shape[0], -1, per_byte)
    out = np.zeros(fields.shape[:2], np.uint8)
    for i in range(per_byte):
        out |= fields[..., i] << np.uint8(bits * i)
    return out


def _interleave(rows: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return rows
    words = rows.view("<u4")
    mask = np.uint32((1 << bits) - 1)
    out = np.zeros_like(words)
    for i in range(32 // bits):
        out |= (words >> np.uint32(bits * i) & mask) << np.uint32(i % 2 * 16 + i // 2 * bits)
    if bits == 2:
        middle = (out >> np.uint32(8) & np.uint32(0xFF)) << np.uint32(16) | (
            out >> np.uint32(16) & np.uint32(0xFF)
        ) << np.uint32(8)
        out = out & np.uint32(0xFF0000FF) | middle
    return out.view(np.uint8)
