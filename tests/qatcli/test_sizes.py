"""Bits per weight, counted from the tensors of checkpoints small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qatcli.packed import PackedCheckpoint, PackedWriter, QuantizedLinear, quantization_config
from qatcli.sizes import packed_size

ROWS, COLUMNS = 64, 96


def checkpoint(path: Path, *, bits: int, group_size: int, scale_dtype: torch.dtype = torch.float16) -> PackedCheckpoint:
    """Two linears of [ROWS, COLUMNS] with a bias, and an embedding of 10 x 7 in bf16."""
    groups = 1 if group_size < 0 else COLUMNS // group_size
    writer = PackedWriter(path)
    for index in range(2):
        linear = QuantizedLinear(
            torch.zeros(ROWS, COLUMNS, dtype=torch.uint8),
            torch.ones(ROWS, groups, dtype=scale_dtype),
            torch.zeros(ROWS, groups, dtype=torch.uint8),
            bits,
            group_size,
            torch.zeros(ROWS, dtype=torch.float16),
        )
        writer.add_linear(f"layers.{index}.proj", linear)
    writer.add_tensor("embed.weight", torch.zeros(10, 7, dtype=torch.bfloat16))
    kind = {"bits": bits, "group_size": group_size, "symmetric": False, "scale_dtype": scale_dtype}
    writer.close({"quantization_config": quantization_config(writer.modules, **kind)})
    return PackedCheckpoint.open(path)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 96, -1])
def test_bits_per_weight_is_the_formula(tmp_path: Path, bits: int, group_size: int) -> None:
    """Codes b, and for every g weights an fp16 scale and a zero point of b bits: b + (16 + b) / g."""
    size = COLUMNS if group_size < 0 else group_size
    sizes = packed_size(checkpoint(tmp_path, bits=bits, group_size=group_size))
    assert sizes["bits_per_weight"] == pytest.approx(bits + (16 + bits) / size, abs=1e-4)
    weights = 2 * ROWS * COLUMNS
    assert sizes["quantized_weights"] == weights
    assert sizes["bytes"] == {
        "codes": weights * bits // 8,
        "scales": 2 * weights // size,
        "zero_points": weights // size * bits // 8,
        "other": 2 * ROWS * 2 + 70 * 2,
    }


def test_bits_per_parameter_counts_everything(tmp_path: Path) -> None:
    sizes = packed_size(checkpoint(tmp_path, bits=2, group_size=32))
    others = 2 * ROWS + 70
    assert sizes["other_parameters"] == others
    total_bits = 2 * ROWS * COLUMNS * (2 + 18 / 32) + 16 * others
    assert sizes["bits_per_parameter"] == pytest.approx(total_bits / (2 * ROWS * COLUMNS + others), abs=1e-4)
    stored = sum(t.numel() * t.element_size() for t in _tensors(tmp_path))
    assert sum(sizes["bytes"].values()) == stored


def test_scales_count_in_the_dtype_they_are_stored_in(tmp_path: Path) -> None:
    sizes = packed_size(checkpoint(tmp_path, bits=4, group_size=32, scale_dtype=torch.float32))
    assert sizes["bits_per_weight"] == pytest.approx(4 + (32 + 4) / 32, abs=1e-4)


def _tensors(path: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for file in path.glob("*.safetensors") for tensor in load_file(file).values()]
