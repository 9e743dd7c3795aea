"""Comparison of a GGUF file with its checkpoint: what it holds at a time."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch

from qatcli.formats import compare, gguf_compare
from qatcli.formats.gguf_readback import GgufFile, TensorEntry
from qatcli.packed import PackedCheckpoint, PackedWriter

gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install 'qatcli[gguf]')")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_large_tensor_is_compared_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Memory that `qat plan` promises: the tensor in the file, and little of it decoded."""
    name, target = "model.embed_tokens.weight", "token_embd.weight"
    values = torch.randn(2048, 512).half()
    writer = PackedWriter(tmp_path / "packed")
    writer.add_tensor(name, values)
    writer.close({})
    checkpoint = PackedCheckpoint(tmp_path / "packed", {"model_type": "llama"}, {}, {name: "model.safetensors"})
    eight = gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    stored = bytearray((values.numpy() if kind == "F16" else eight).tobytes())
    file, entry = tmp_path / "model.gguf", TensorEntry(kind, tuple(values.shape), 0, len(stored))
    file.write_bytes(stored)
    found = GgufFile(file, {}, {target: entry})
    monkeypatch.setattr(compare, "AT_A_TIME", 2**14)
    tracemalloc.start()
    try:
        assert gguf_compare._dense_difference(checkpoint, name, target, found, kind) is None
        assert tracemalloc.get_traced_memory()[1] < 3 * values.numel()
    finally:
        tracemalloc.stop()
    stored[-1] ^= 0x40
    file.write_bytes(stored)
    assert "its source" in str(gguf_compare._dense_difference(checkpoint, name, target, found, kind))
