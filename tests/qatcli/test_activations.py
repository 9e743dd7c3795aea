"""Activation streams: the same bytes in memory and in a mapped file, and nothing left behind."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatcli import activations
from qatcli.activations import StreamBudget, advance_stream, fill_stream, stream_budget
from qatcli.errors import ResourceError

CPU = torch.device("cpu")
SHAPE = (6, 5, 8)


class Doubling(nn.Module):
    """A block as transformers has them: keyword arguments, hidden states back alone or as the first of several."""

    def __init__(self, *, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        self.batches: list[int] = []

    def forward(self, hidden: Tensor, *, offset: float) -> Tensor | tuple[Tensor, None]:
        self.batches.append(len(hidden))
        output = 2 * hidden + offset
        return (output, None) if self.as_tuple else output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_and_files_hold_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    memory = StreamBudget(10**6, tmp_path).allocate("a", SHAPE, dtype)
    mapped = StreamBudget(0, tmp_path / "new").allocate("a", SHAPE, dtype)
    assert (tmp_path / "new").is_dir(), "the second is a file"
    hidden = torch.randn(SHAPE).to(dtype)
    for stream in (memory, mapped):
        assert (stream.shape, stream.dtype) == (torch.Size(SHAPE), dtype)
        stream.copy_(hidden)
        advance_stream(stream, Doubling(as_tuple=False), {"offset": 0.5}, batch_size=4, device=CPU)
        stream[2] += 1
    assert torch.equal(memory, mapped)
    assert not torch.equal(memory, hidden)


def test_no_file_is_left(tmp_path: Path) -> None:
    stream = StreamBudget(0, tmp_path).allocate("train-target", SHAPE, torch.float32)
    stream.fill_(3)
    assert list(tmp_path.iterdir()) == []
    assert float(stream.sum()) == 3 * stream.numel()


def test_no_file_is_left_when_the_disk_turns_out_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        StreamBudget(0, tmp_path).allocate("train-target", SHAPE, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_streams_of_one_name_are_separate(tmp_path: Path) -> None:
    budget = StreamBudget(0, tmp_path)
    first = budget.allocate("a", SHAPE, torch.float32).fill_(1)
    second = budget.allocate("a", SHAPE, torch.float32).fill_(2)
    assert float(first.max()) == 1
    assert float(second.min()) == 2


def test_the_budget_is_spent_first_come_first_served(tmp_path: Path) -> None:
    size = 6 * 5 * 8 * 4
    budget = StreamBudget(2 * size + 1, tmp_path / "cache")
    budget.allocate("a", SHAPE, torch.float32)
    budget.allocate("b", SHAPE, torch.float32)
    assert not (tmp_path / "cache").exists()
    assert budget.bytes_left == 1
    budget.allocate("c", SHAPE, torch.float32)
    assert (tmp_path / "cache").exists()
    assert budget.bytes_left == 1


def test_neither_memory_nor_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 0, 6 * 5 * 8 * 4 - 1))
    with pytest.raises(ResourceError) as caught:
        StreamBudget(0, tmp_path).allocate("a", SHAPE, torch.float32)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint is not None
    assert "block_ap.cache.dir" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_budget_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(activations.psutil, "virtual_memory", lambda: memory(1001))
    assert stream_budget(None, tmp_path).bytes_left == 500
    assert stream_budget(1.5, tmp_path).bytes_left == 3 * 2**29
    assert stream_budget(0, tmp_path).bytes_left == 0


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_advance_replaces_every_window_in_place(as_tuple: bool, batch_size: int) -> None:
    stream = torch.randn(SHAPE)
    expected, address = 2 * stream + 0.25, stream.data_ptr()
    block = Doubling(as_tuple=as_tuple)
    advance_stream(stream, block, {"offset": 0.25}, batch_size=batch_size, device=CPU)
    assert torch.equal(stream, expected)
    assert stream.data_ptr() == address
    assert sum(block.batches) == 6
    assert max(block.batches) == min(batch_size, 6)


def test_streams_of_bf16_run_in_bf16() -> None:
    seen: list[torch.dtype] = []

    class Block(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            output = super().forward(hidden)
            seen.append(output.dtype)
            return output

    block = Block(8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        advance_stream(torch.randn(SHAPE).to(dtype), block, {}, batch_size=3, device=CPU)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_fill_writes_what_the_first_block_receives() -> None:
    class Model:
        def first_inputs(self, windows: Tensor, device: torch.device, dtype: torch.dtype) -> Any:
            assert dtype == torch.float32, "embeddings are looked up in full precision, then rounded once"
            for window in windows:
                yield window[None, :, None].to(dtype).expand(1, 5, 8) / 3

    stream = torch.zeros(SHAPE, dtype=torch.bfloat16)
    windows = torch.arange(30, dtype=torch.int32).reshape(6, 5)
    fill_stream(stream, Model(), windows, CPU, torch.bfloat16)  # type: ignore[arg-type]
    expected = (windows[..., None].expand(SHAPE) / 3).bfloat16()
    assert torch.equal(stream, expected)
