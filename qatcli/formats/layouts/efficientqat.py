"""EfficientQAT's native 3-bit tensors, 10 codes per 32-bit word (2, 4 and 8 bits are GPTQ version 2, bit for bit).

    X.qweight int32 [ceil(K/10), N]  code i of a column in word i // 10 at shift 3 (i % 10); the top two bits unused
    X.qzeros  int32 [G, ceil(N/10)]  zero points along N in the same way, stored as they are
    X.scales  float [G, N]

Written for T-MAC, the only runtime that reads 3 bits in this form; published EfficientQAT models use it.
Source: EfficientQAT quantize/int_linear_real.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PER_WORD = 10
Arrays = dict[str, NDArray[np.generic]]


def pack_linear_3bit(codes: NDArray[np.uint8], zero_point: NDArray[np.uint8], scale: NDArray[np.float16]) -> Arrays:
    """The arrays of one 3-bit linear as EfficientQAT stores them."""
    return {
        "qweight": np.ascontiguousarray(_pack(codes).T),
        "qzeros": _pack(np.ascontiguousarray(zero_point.T)),
        "scales": np.ascontiguousarray(scale.T),
    }


def _pack(values: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Along the last axis: [R, C] -> int32 [R, ceil(C / 10)]."""
    padded = np.zeros((len(values), -(-values.shape[1] // PER_WORD) * PER_WORD), np.uint32)
    padded[:, : values.shape[1]] = values
    fields = padded.reshape(len(values), -1, PER_WORD) << np.arange(0, 30, 3, dtype=np.uint32)
    return np.bitwise_or.reduce(fields, axis=2).view(np.int32)
