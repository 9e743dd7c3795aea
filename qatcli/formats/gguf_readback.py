"""Independent GGUF reader: the blocks that carry (q - z) * s, without the gguf package.

Shares no code with `layouts.gguf_blocks`: fields are gathered from single bits. Reads Q2_0 (type 42), which gguf-py
0.19 does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qatcli.errors import InputError
from qatcli.gguf_container import read_container

U8 = NDArray[np.uint8]
# type id: name, values per block, bytes per block
_BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    12: ("Q4_K", 256, 144),
    42: ("Q2_0", 64, 18),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a GGUF file: type name, shape in numpy order, absolute offset and size in bytes."""

    type_name: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensor directory of a GGUF file; data is read per tensor."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def rows(self, name: str) -> U8:
        """The raw bytes of a tensor, uint8 [rows, bytes per row]. InputError when the file ends before it."""
        entry = self.tensors[name]
        with open(self.path, "rb") as handle:
            handle.seek(entry.offset)
            raw = np.frombuffer(handle.read(entry.bytes), np.uint8)
        if raw.size != entry.bytes:
            raise InputError(f"{self.path} ends inside tensor {name}")
        return raw.reshape(int(np.prod(entry.shape[:-1])), -1)


@dataclass(frozen=True)
class Decoded:
    """Block values: w = levels * scale + offset; levels int16 [N, K], scale and offset fp32 [N, blocks per row].

    `offset` is None for types without one.
    """

    levels: NDArray[np.int16]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32] | None


def open_gguf(path: Path) -> GgufFile:
    """Parse header, metadata and tensor directory. InputError when the file is not GGUF, cut off or of other types."""
    fields, stored = read_container(path)
    tensors = {}
    for name, entry in stored.items():
        if entry.type_id not in _BLOCKS:
            raise InputError(f"{path}: tensor {name} has ggml type {entry.type_id}, which qat does not write")
        type_name, length, size = _BLOCKS[entry.type_id]
        count = int(np.prod(entry.shape))
        tensors[name] = TensorEntry(type_name, entry.shape, entry.offset, count // length * size)
    return GgufFile(path, fields, tensors)


def decode(type_name: str, rows: U8) -> Decoded:
    """Levels, scales and offsets of the rows [N, bytes per row] of one block type."""
    _, _, size = next(entry for entry in _BLOCKS.values() if entry[0] == type_name)
    blocks = rows.reshape(len(rows), -1, size)
    return _DECODERS[type_name](blocks)


def _q4_0(blocks: U8) -> Decoded:
    return Decoded(_flat(_fields(blocks[..., 2:], 4, _NIBBLES)) - 8, _half(blocks, 0), None)


def _q4_1(blocks: U8) -> Decoded:
    return Decoded(_flat(_fields(blocks[..., 4:], 4, _NIBBLES)), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: U8) -> Decoded:
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little").astype(np.int16)
    return Decoded(_flat(_fields(blocks[..., 6:], 4, _NIBBLES) + 16 * fifth) - 16, _half(blocks, 0), None)


def _q8_0(blocks: U8) -> Decoded:
    signed = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.int16)
    return Decoded(_flat(signed), _half(blocks, 0), None)


def _q2_0(blocks: U8) -> Decoded:
    return Decoded(_flat(_fields(blocks[..., 2:], 2, np.arange(64))) - 1, _half(blocks, 0), None)


def _q2_k(blocks: U8) -> Decoded:
    pair = _fields(blocks[..., :16], 4, np.arange(32)).reshape(*blocks.shape[:2], 16, 2)
    scale, low = _uniform(pair[..., 0]), _uniform(pair[..., 1])
    value = np.arange(256)
    position = value // 128 * 128 + value % 32 * 4 + value % 128 // 32
    return _with_min(_fields(blocks[..., 16:80], 2, position), scale, low, _half(blocks, 80), _half(blocks, 82))


def _q4_k(blocks: U8) -> Decoded:
    packed = blocks[..., 4:16].astype(np.int16)
    first, second, mixed = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = np.concatenate([first & 63, mixed % 16 + (first >> 6) * 16], axis=-1)
    low = np.concatenate([second & 63, mixed // 16 + (second >> 6) * 16], axis=-1)
    value = np.arange(256)
    position = value // 64 * 64 + value % 32 * 2 + value % 64 // 32
    levels = _fields(blocks[..., 16:], 4, position)
    return _with_min(levels, _uniform(scale), _uniform(low), _half(blocks, 0), _half(blocks, 2))


_NIBBLES = np.arange(32) % 16 * 2 + np.arange(32) // 16  # nibble that holds value j of a 32-value block
_DECODERS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q2_0": _q2_0,
    "Q2_K": _q2_k,
    "Q4_K": _q4_k,
}


def _fields(data: U8, bits: int, position: NDArray[np.int64]) -> NDArray[np.int16]:
    """Value j of a block is the field number position[j] of its bytes."""
    single = np.unpackbits(np.ascontiguousarray(data), axis=-1, bitorder="little")
    single = single.reshape(*data.shape[:-1], -1, bits)
    fields = single @ (1 << np.arange(bits)).astype(np.uint8)
    return fields[..., position].astype(np.int16)


def _with_min(
    levels: NDArray[np.int16],
    scale: NDArray[np.int16],
    low: NDArray[np.int16],
    d: NDArray[np.float32],
    dmin: NDArray[np.float32],
) -> Decoded:
    return Decoded(_flat(levels), d * scale, -dmin * low)


def _uniform(values: NDArray[np.int16]) -> NDArray[np.int16]:
    """The common value of a block's sub-blocks, -1 where they differ: qat writes one scale and one min per block."""
    return np.where((values == values[..., :1]).all(axis=-1), values[..., 0], -1).astype(np.int16)


def _half(blocks: U8, start: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2")[..., 0].astype(np.float32)


def _flat(values: NDArray[np.int16]) -> NDArray[np.int16]:
    return values.reshape(len(values), -1)
