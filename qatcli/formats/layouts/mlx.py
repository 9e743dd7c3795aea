"""MLX "affine" tensors of one linear, as `mx.quantize` makes them and `mx.quantized_matmul` reads them.

    X.weight  uint32 [N, K*b/32]  codes, dense bitstream along K
    X.scales  fp16   [N, G]
    X.biases  fp16   [N, G]       -s z rounded to fp16: W = q s + bias; a linear's own bias stays X.bias

Groups of 32, 64 or 128. Source: ml-explore/mlx 0.32 (`mx.dequantize` of hand-packed codes of 2, 3, 4 and 8 bits).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qatcli.formats.layouts.bitstream import pack

Arrays = dict[str, NDArray[np.generic]]


def pack_linear(
    codes: NDArray[np.uint8], zero_point: NDArray[np.uint8], scale: NDArray[np.float16], *, bits: int
) -> Arrays:
    """The MLX arrays of one linear; K a multiple of 32."""
    return {"weight": pack(codes, bits).view(np.uint32), "scales": scale, "biases": offsets(zero_point, scale)}


def offsets(zero_point: NDArray[np.uint8], scale: NDArray[np.float16]) -> NDArray[np.float16]:
    """What a code of 0 stands for, fp16 [N, G]: rounded once, exact where z is a power of two."""
    return (-scale.astype(np.float32) * zero_point).astype(np.float16)


def dense_weight(
    codes: NDArray[np.uint8], zero_point: NDArray[np.uint8], scale: NDArray[np.float16]
) -> NDArray[np.float32]:
    """The weight that these arrays stand for, fp32 [N, K]: (q - z) s but for the rounding of the offset."""
    rows, groups = scale.shape
    weight = codes.reshape(rows, groups, -1) * scale.astype(np.float32)[..., None]
    weight += offsets(zero_point, scale).astype(np.float32)[..., None]
    return weight.reshape(rows, -1)
