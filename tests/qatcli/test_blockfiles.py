"""Block files: what is saved is what runs, whatever the names of the linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from qatcli import events
from qatcli.blockfiles import block_events, block_file, finished_blocks, load_quantized_block, read_linear, save_block
from qatcli.directory import LOG_FILE
from qatcli.errors import InputError
from qatcli.models.blocks import BlockModel
from qatcli.packed import QuantizedLinear, module_quant
from qatcli.runlog import RunLog
from qatcli.shards import load_tensors


class Router(nn.Module):
    """A block with linears of which one's name begins with another's, a bias, a norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 8)
        self.gate_proj = nn.Linear(32, 8, bias=False)
        self.norm = nn.LayerNorm(32)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.layer_scalar * (self.gate(x) + self.gate_proj(x))


class TwoRouters(nn.Module):
    """A model of which block files need no more than its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Router(), Router()])


@pytest.fixture
def linear() -> QuantizedLinear:
    codes = torch.randint(0, 8, (8, 32), dtype=torch.uint8)
    zero_point = torch.randint(0, 8, (8, 2), dtype=torch.uint8)
    return QuantizedLinear(codes, torch.rand(8, 2) + 0.1, zero_point, bits=3, group_size=16, bias=torch.randn(8))


def test_what_is_saved_is_what_runs(tmp_path: Path, linear: QuantizedLinear) -> None:
    blocks: Any = TwoRouters()
    model = BlockModel(cast(Any, None), blocks, "layers")  # no source: nothing is read of it
    name = "layers.1.gate"
    others = {
        "gate_proj.weight": torch.randn(8, 32),
        "norm.weight": torch.randn(32),
        "norm.bias": torch.randn(32),
        "layer_scalar": torch.tensor([2.5]),
    }
    trained = Router()
    trained.load_state_dict(others, strict=False)
    save_block(tmp_path, 1, trained, {name: linear}, prefix="layers.1.", log=RunLog(), event={})
    block = load_quantized_block(tmp_path, model, 1, {name: module_quant(linear)}, torch.device("cpu"))

    expected = Router()
    expected.load_state_dict({**others, "gate.weight": linear.dequantize(), "gate.bias": linear.bias})
    x = torch.randn(5, 32)
    torch.testing.assert_close(block(x), expected(x))
    assert not block.training
    assert all(torch.equal(block.state_dict()[key], value) for key, value in expected.state_dict().items())


def test_a_log_that_is_too_large_is_not_one_without_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOG_FILE).write_text('{"time": 1.0, "event": "block", "index": 0}\n')
    assert list(block_events(tmp_path)) == [0]
    monkeypatch.setattr(events, "LIMIT", 10)
    with pytest.raises(InputError, match="too large"):
        block_events(tmp_path)


def test_a_block_file_is_a_shard_of_a_packed_checkpoint(tmp_path: Path, linear: QuantizedLinear) -> None:
    name = "model.layers.7.gate"
    save_block(tmp_path, 7, Router(), {name: linear}, prefix="model.layers.7.", log=RunLog(), event={})
    assert [file.name for file in tmp_path.iterdir()] == ["model-block-0007.safetensors"]
    tensors = load_tensors(block_file(tmp_path, 7))
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "bias")
    others = ("gate_proj.weight", "norm.weight", "norm.bias", "layer_scalar")
    expected = {f"{name}.{suffix}" for suffix in suffixes} | {f"model.layers.7.{other}" for other in others}
    assert set(tensors) == expected
    _, scale, zero_point = read_linear(tensors, name, module_quant(linear))
    assert torch.equal(scale, linear.scale)
    assert torch.equal(zero_point, linear.zero_point)


def test_a_block_is_kept_if_it_is_as_it_was_written(tmp_path: Path, linear: QuantizedLinear) -> None:
    log = RunLog(tmp_path / LOG_FILE)
    for index in range(4):
        name = f"model.layers.{index}.gate"
        event = {"after": float(index)}
        save_block(tmp_path, index, Router(), {name: linear}, prefix=f"model.layers.{index}.", log=log, event=event)
    assert {index: event["after"] for index, event in finished_blocks(tmp_path).items()} == {0: 0, 1: 1, 2: 2, 3: 3}

    block_file(tmp_path, 2).unlink()
    assert list(finished_blocks(tmp_path)) == [0, 1, 3]
    flipped = bytearray(block_file(tmp_path, 1).read_bytes())
    flipped[-1] ^= 1
    block_file(tmp_path, 1).write_bytes(flipped)
    with pytest.raises(InputError, match="is damaged"):
        finished_blocks(tmp_path)
    block_file(tmp_path, 1).write_bytes(flipped[:-1])
    with pytest.raises(InputError, match="cannot be read"):
        finished_blocks(tmp_path)
