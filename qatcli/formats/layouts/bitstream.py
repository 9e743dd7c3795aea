"""Dense little-endian bitstream: the packing of GPTQ, compressed-tensors and our own checkpoints.

Value i occupies stream bits [i * bits, (i + 1) * bits); the stream is cut into 32-bit words, lowest bits first.
32 values always fill exactly `bits` words, so 3 bits ("10-1-10-1-10") needs no special case.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Pack along the last axis: [..., L] in 0..2^bits-1 -> int32 [..., ceil(L * bits / 32)], zero padded.

    Raises ValueError for a value that does not fit: it would spill into its neighbour.
    """
    if values.size and int(values.max()) >> bits:
        raise ValueError(f"value {int(values.max())} does not fit in {bits} bits")
    length = values.shape[-1]
    blocks = -(-length // 32)
    padded = np.zeros((*values.shape[:-1], blocks * 32), np.uint8)
    padded[..., :length] = values
    padded = padded.reshape(*values.shape[:-1], blocks, 32)
    words = np.zeros((*values.shape[:-1], blocks, bits), np.uint32)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        field = padded[..., i].astype(np.uint32)
        words[..., word] |= field << np.uint32(shift)  # bits above 32 fall off: they belong to the next word
        if shift + bits > 32:
            words[..., word + 1] |= field >> np.uint32(32 - shift)
    stream = words.reshape(*values.shape[:-1], blocks * bits)
    return np.ascontiguousarray(stream[..., : -(-length * bits // 32)]).view(np.int32)


def pack_rows(values: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Pack along the first axis: [R, C] -> int32 [ceil(R * bits / 32), C]."""
    return np.ascontiguousarray(pack(np.ascontiguousarray(values.T), bits).T)
