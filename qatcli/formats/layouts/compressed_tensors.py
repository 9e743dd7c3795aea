"""compressed-tensors "pack-quantized" tensors of one linear: our own packed layout plus the dense shape.

    X.weight_packed     int32 [N, ceil(K*b/32)]  codes, dense bitstream along K
    X.weight_scale      fp16  [N, G]
    X.weight_zero_point int32 [ceil(N*b/32), G]  zero points, dense bitstream along N (dimension 0)
    X.weight_shape      int64 [2]                [N, K]

The library works with signed values and adds 2^(b-1) before packing: the stored fields are our unsigned ones.
3 bits are dense since compressed-tensors 0.18; older releases put 10 values into a word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qatcli.formats.layouts.bitstream import pack, pack_rows

Arrays = dict[str, NDArray[np.generic]]


def pack_linear(
    codes: NDArray[np.uint8], zero_point: NDArray[np.uint8], scale: NDArray[np.float16], *, bits: int
) -> Arrays:
    """The compressed-tensors arrays of one linear; any N and K."""
    return {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale,
        "weight_zero_point": pack_rows(zero_point, bits),
        "weight_shape": np.array(codes.shape, np.int64),
    }
