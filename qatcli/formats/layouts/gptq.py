"""GPTQ tensors of one linear (GPTQModel 7.x; replaces `X.weight`).

    X.qweight int32 [K*b/32, N]  codes, dense bitstream along K, one column per output
    X.qzeros  int32 [G, N*b/32]  zero points, dense bitstream along N
    X.scales  fp16  [G, N]
    X.g_idx   int32 [K]          k // group_size

Format v2 ("gptq_v2") stores the zero point z. Version 1 ("gptq") stores z - 1 and readers add 1; z = 0 does not fit
there and its writers and readers disagree about it, so version 1 is written for z == 2^(b-1) only (symmetric).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qatcli.formats.layouts.bitstream import pack

Arrays = dict[str, NDArray[np.generic]]


def is_symmetric(zero_point: NDArray[np.uint8], bits: int) -> bool:
    """True when every zero point is the middle of the range, the only case version 1 can carry safely."""
    return bool(np.all(zero_point == 1 << (bits - 1)))


def pack_linear(
    codes: NDArray[np.uint8], zero_point: NDArray[np.uint8], scale: NDArray[np.float16], *, bits: int, version: int = 2
) -> Arrays:
    """The GPTQ arrays of one linear. ValueError when N or K is no multiple of 32, or for asymmetric version 1."""
    rows, columns = codes.shape
    if rows % 32 or columns % 32:
        raise ValueError(f"GPTQ needs multiples of 32, got [{rows}, {columns}]")
    if version == 1 and not is_symmetric(zero_point, bits):
        raise ValueError("GPTQ version 1 stores z - 1 and cannot carry asymmetric zero points safely")
    stored = zero_point - np.uint8(1) if version == 1 else zero_point
    return {
        "qweight": np.ascontiguousarray(pack(codes, bits).T),
        "qzeros": pack(np.ascontiguousarray(stored.T), bits),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": np.arange(columns, dtype=np.int32) // np.int32(columns // zero_point.shape[1]),
    }
