"""AWQ (GEMM) tensors of one linear; 4 bits, though 2- and 3-bit codes fit unchanged.

X.qweight int32 [K, N/8]  word c holds columns 8c..8c+7, nibble i holds column 8c + ORDER[i]
X.qzeros  int32 [G, N/8]  zero points in the same order, stored as they are
X.scales  fp16  [G, N]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Arrays = dict[str, NDArray[np.generic]]


def pack_linear(codes: NDArray[np.uint8], zero_point: NDArray[np.uint8], scale: NDArray[np.float16]) -> Arrays:
    """The AWQ arrays of one linear. Raises ValueError when N is no multiple of 8 or a code exceeds 15."""
    if codes.shape[0] % 8:
        raise ValueError(f"AWQ packs 8 outputs per word, got {codes.shape[0]}")
    if codes.max(initial=0) > 15 or zero_point.max(initial=0) > 15:
        raise ValueError("AWQ holds 4-bit codes")
    return {
        "qweight": _pack(np.ascontiguousarray(codes.T)),
        "qzeros": _pack(np.ascontiguousarray(zero_point.T)),
        "scales": np.ascontiguousarray(scale.T),
    }


def _pack(values: NDArray[np.uint8]) -> NDArray[np.int32]:
    columns = values.reshape(values.shape[0], -1, 8)
    words = np.zeros(columns.shape[:2], np.uint32)
    for nibble, column in enumerate(ORDER):
        words |= columns[..., column].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)
