"""The container of GGUF files: what is cut off or made to harm is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from qatcli.errors import InputError
from qatcli.gguf_container import read_container

ALIGNMENT = struct.pack("<Q", 17) + b"general.alignment"


def header(fields: int, tensors: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields)


def test_what_gguf_py_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_array("names", ["a", "b"])
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("x", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields, tensors = read_container(tmp_path / "a.gguf")
    assert (fields["general.architecture"], fields["names"], fields["general.alignment"]) == ("llama", ["a", "b"], 64)
    assert (tensors["x"].shape, tensors["x"].offset % 64) == ((3, 4), 0)
    data = (tmp_path / "a.gguf").read_bytes()
    assert data[tensors["x"].offset :][: values.nbytes] == values.tobytes()
    for length in range(0, tensors["x"].offset - 64, 7):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(InputError, match="GGUF file"):
            read_container(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    "content",
    [
        header(1) + ALIGNMENT + struct.pack("<II", 4, 0),
        header(1) + ALIGNMENT + struct.pack("<IQ", 8, 1) + b"x",
        header(1) + ALIGNMENT + struct.pack("<I", 99),
        header(1) + ALIGNMENT + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000,
        header(2**60),
        header(0, 1) + struct.pack("<Q", 2**63),
    ],
    ids=["no alignment", "alignment of text", "unknown type", "nested", "many fields", "a long name"],
)
def test_a_file_made_to_harm_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(InputError, match="is not a readable GGUF file"):
        read_container(tmp_path / "a.gguf")
