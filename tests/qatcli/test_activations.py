"""Activation streams: the same bytes wherever they live, and nothing left behind."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatcli import activations, machine
from qatcli.activations import (
    StreamBudget,
    advance_stream,
    fill_streams,
    in_order,
    read_batches,
    stream_budget,
    write_back,
)
from qatcli.errors import ResourceError
from qatcli.recipe.schema import CacheSection

CPU = torch.device("cpu")
SHAPE = (6, 5, 8)
SIZE = 6 * 5 * 8 * 4  # bytes in fp32


def in_memory(directory: Path) -> StreamBudget:
    return StreamBudget(CPU, 0, 10**6, directory)


def in_files(directory: Path) -> StreamBudget:
    return StreamBudget(CPU, 0, 0, directory)


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
    memory = in_memory(tmp_path).allocate("a", SHAPE, dtype)
    mapped = in_files(tmp_path / "new").allocate("a", SHAPE, dtype)
    assert (tmp_path / "new").is_dir(), "the second is a file"
    hidden = torch.randn(SHAPE).to(dtype)
    for stream in (memory, mapped):
        assert (stream.shape, stream.dtype) == (torch.Size(SHAPE), dtype)
        stream.copy_(hidden)
        advance_stream(stream, Doubling(as_tuple=False), {"offset": 0.5}, batch_size=4, device=CPU)
        stream[2] += 1
    assert torch.equal(memory, mapped)
    assert not torch.equal(memory, hidden)


@pytest.mark.parametrize("directory_of", [in_memory, in_files])
def test_batches_are_new_tensors_in_the_order_asked_for(tmp_path: Path, directory_of: Any) -> None:
    budget = directory_of(tmp_path)
    streams = [budget.allocate(name, SHAPE, torch.float32).copy_(torch.randn(SHAPE)) for name in ("a", "b")]
    before = [stream.clone() for stream in streams]
    batches = [torch.tensor(rows) for rows in ([5, 0], [3], [1, 4, 2], [3])]
    seen = 0
    for rows, found in zip(batches, read_batches(streams, batches, CPU), strict=True):
        for stream, batch in zip(before, found, strict=True):
            assert torch.equal(batch, stream[rows])
            batch.zero_()
            seen += 1
    assert seen == 2 * len(batches)
    assert all(torch.equal(*pair) for pair in zip(streams, before, strict=True)), "what is read is a copy"


def test_files_are_read_ahead_by_a_thread_that_ends_with_its_reader(tmp_path: Path) -> None:
    stream = in_files(tmp_path).allocate("a", SHAPE, torch.float32).fill_(1)
    others = threading.active_count()
    reading = read_batches([stream], in_order(6, 1), CPU)
    next(reading)
    assert threading.active_count() == others + 1
    reading.close()  # as a training loop that gives a block up
    assert threading.active_count() == others


@pytest.mark.parametrize("directory_of", [in_memory, in_files])
def test_everything_is_written_on_leaving(tmp_path: Path, directory_of: Any) -> None:
    stream = directory_of(tmp_path).allocate("a", SHAPE, torch.bfloat16).fill_(-1)
    values = torch.randn(SHAPE)
    with write_back(stream, CPU) as write:
        for rows in in_order(6, 4):
            write(int(rows[0]), values[rows])
    assert torch.equal(stream, values.bfloat16())


def test_a_failed_write_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(activations, "_store", fail)
    stream = in_files(tmp_path).allocate("a", SHAPE, torch.float32)
    with pytest.raises(OSError, match="Input/output"), write_back(stream, CPU) as write:
        write(0, torch.zeros(1, 5, 8))


def test_pages_of_a_file_do_not_stay_in_the_process(tmp_path: Path) -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem"))) * 1024

    stream = in_files(tmp_path).allocate("a", (64, 256, 256), torch.float32)
    before = resident()
    with write_back(stream, CPU) as write:
        for rows in in_order(64, 1):
            write(int(rows[0]), torch.full((1, 256, 256), float(rows[0])))
    total = sum(float(batch[0, 0, 0]) for (batch,) in read_batches([stream], in_order(64, 1), CPU))
    assert total == sum(range(64)), "unmapping lost nothing"
    assert resident() - before < 2**20, "of 16 MiB"


def test_no_file_is_left(tmp_path: Path) -> None:
    stream = in_files(tmp_path).allocate("train-target", SHAPE, torch.float32)
    stream.fill_(3)
    assert list(tmp_path.iterdir()) == []
    assert float(stream.sum()) == 3 * stream.numel()


def test_no_file_is_left_when_the_disk_turns_out_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        in_files(tmp_path).allocate("train-target", SHAPE, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_streams_of_one_name_are_separate(tmp_path: Path) -> None:
    budget = in_files(tmp_path)
    first = budget.allocate("a", SHAPE, torch.float32).fill_(1)
    second = budget.allocate("a", SHAPE, torch.float32).fill_(2)
    assert float(first.max()) == 1
    assert float(second.min()) == 2


def test_the_budget_is_spent_first_come_first_served(tmp_path: Path) -> None:
    budget = StreamBudget(torch.device("cuda"), SIZE, 2 * SIZE + 1, tmp_path)
    assert [budget.place(SIZE) for _ in range(5)] == ["device", "host", "host", "file", "file"]
    assert (budget.device_bytes, budget.host_bytes) == (0, 1)
    assert budget.place(1) == "host", "a small one still fits"


def test_neither_memory_nor_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "disk_space", lambda _: SIZE - 1)
    with pytest.raises(ResourceError) as caught:
        in_files(tmp_path).allocate("a", SHAPE, torch.float32)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint is not None
    assert "block_ap.cache.dir" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_budget_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: 1001)
    monkeypatch.setattr(machine, "device_memory", lambda _: 2001)

    def budget(device: str, device_gb: float | None, host_gb: float | None) -> tuple[int, int]:
        found = stream_budget(torch.device(device), CacheSection(device_gb=device_gb, host_gb=host_gb), tmp_path)
        assert found.directory == tmp_path
        return found.device_bytes, found.host_bytes

    assert budget("cpu", None, None) == (0, 500)
    assert budget("cpu", 8.0, 1.5) == (0, 3 * 2**29), "a CPU has no memory of its own"
    assert budget("cuda", None, None) == (1000, 500)
    assert budget("cuda", 0, 0) == (0, 0)
    assert budget("cuda", 0.5, None) == (2**29, 500)
    assert stream_budget(torch.device("cpu"), CacheSection(dir="/elsewhere"), tmp_path).directory == Path("/elsewhere")


def test_pinned_memory_is_released_before_it_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[int, int] = {}
    released = []

    class Driver:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            known[address] = size
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            released.append((address, f"\n{address:x}-" in Path("/proc/self/maps").read_text()))
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    stream = StreamBudget(torch.device("cuda"), 0, SIZE, Path("unused")).allocate("a", SHAPE, torch.float32)
    rows = stream[2:4].fill_(1)
    assert (stream.shape, stream.dtype, known) == (torch.Size(SHAPE), torch.float32, {stream.data_ptr(): SIZE})
    address = stream.data_ptr()
    del stream
    assert released == [], "a view keeps it"
    del rows
    assert released == [(address, True)]


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

    streams = [torch.zeros(SHAPE, dtype=torch.bfloat16) for _ in range(2)]
    windows = torch.arange(30, dtype=torch.int32).reshape(6, 5)
    fill_streams(streams, Model(), windows, CPU, torch.bfloat16)  # type: ignore[arg-type]
    expected = (windows[..., None].expand(SHAPE) / 3).bfloat16()
    assert all(torch.equal(stream, expected) for stream in streams)


@pytest.mark.gpu
def test_results_do_not_depend_on_the_place(tmp_path: Path) -> None:
    """A sweep and random batches over streams on the device, in pinned memory, in a file, and in memory not pinned."""
    device, shape = torch.device("cuda"), (9, 64, 128)
    torch.manual_seed(0)
    block, start = nn.Linear(128, 128).to(device), torch.randn(shape)
    budgets = {
        "device": StreamBudget(device, 10**9, 0, tmp_path),
        "pinned": StreamBudget(device, 0, 10**9, tmp_path),
        "file": StreamBudget(device, 0, 0, tmp_path),
        "pageable": in_memory(tmp_path),
    }
    orders = [torch.randperm(9).split(2) for _ in range(3)]
    found = {}
    for name, budget in budgets.items():
        stream = budget.allocate("a", shape, torch.float32).copy_(start)
        assert (stream.device.type == "cuda") == (name == "device")
        assert stream.device.type == "cuda" or stream.is_pinned() == (name == "pinned")
        advance_stream(stream, block, {}, batch_size=4, device=device)
        batches = [batch.clone() for order in orders for (batch,) in read_batches([stream], order, device)]
        found[name] = [stream.cpu(), *(batch.cpu() for batch in batches)]
    expected = found.pop("device")
    assert torch.equal(torch.cat(expected[1:6]), expected[0][torch.cat(orders[0])])
    for name, tensors in found.items():
        assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True)), name


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's refusal is not left for the next kernel to stumble over."""
    device, driver = torch.device("cuda"), torch.cuda.cudart()

    class Refusing:
        def cudaHostRegister(self, _address: int, size: int, flags: int) -> int:
            return int(driver.cudaHostRegister(0, size, flags))

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    stream = StreamBudget(device, 0, 10**9, tmp_path).allocate("a", (9, 64, 128), torch.float32)
    assert not stream.is_pinned()
    assert float(torch.ones(8, device=device).sum()) == 8
